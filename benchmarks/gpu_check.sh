#!/usr/bin/env bash
# Checks of snp-llm that need a GPU, and what a prune costs there, in one command of at most nine minutes.
#
#   bash benchmarks/gpu_check.sh [PROJECT] [STAGE...]
#
# PROJECT is a checkout of the project (default: . or the first folder below that has snp_llm/). Stages, in the order in
# which they run, each in a process of its own with a limit of its own, so that one that fails takes no other along:
#   env       versions, card, memory
#   tests     the suite's own tests that need CUDA
#   prune     the command itself, as users type it, on the bundled model: prune, eval, bench
#   same      CPU against GPU, hidden states on cpu, cuda and disk, float32 and bfloat16, with TF32 allowed, on a small
#             trained OPT
#   micro     copies from and to the host; factorisations and greedy elimination at the widths of OPT
#   cost13    opt-1.3b's shape, four blocks, hidden states on cpu and on cuda: seconds by phase, peak against estimate
#   whole13   opt-1.3b's shape, all blocks, the whole command with evaluation and reloading, hidden states on cuda
#   cost67    opt-6.7b's shape, two blocks, hidden states on cuda
#   cost130   opt-13b's shape, two blocks, likewise
#   profile   kernels by time of a prune of two blocks of opt-1.3b's shape
#   memory    a prune and a perplexity in a card that is nearly full: halved batches, sums and algebra on the CPU
# Weights are random and made here; nothing is downloaded. The last lines are a table; everything is in $OUT/gpu_check.log
# and, a line of JSON a result, in $OUT/gpu_check.jsonl.
#
# Needs torch with CUDA, transformers, accelerate, rich. tyro may be missing: then the commands are called without their
# parser. Wheels in .whl/ of the working directory are installed first (tyro, docstring-parser, typeguard, rich).
# GPU_CHECK_MODEL is a folder with a small trained OPT for the stage "same"; without it that takes the bundled one.
# GPU_CHECK_SECONDS (430) is for all of it, so that two runs fit into a quarter of an hour; what is left over is said, to be
# named as stages of a second run. GPU_CHECK_TINY=1 runs everything in miniature, to try the script elsewhere; with
# GPU_CHECK_REHEARSE=1 too on a simulated device, but for "profile", which nothing simulates.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
PROJECT=${1:-}
[ $# -gt 0 ] && shift
if [ -z "$PROJECT" ]; then
  for d in . */ */*/; do [ -f "$d/snp_llm/__init__.py" ] && PROJECT=$d && break; done
fi
[ -f "$PROJECT/snp_llm/__init__.py" ] || { echo "no snp_llm/ in '$PROJECT'; say where the project is"; exit 2; }
PROJECT=$(cd "$PROJECT" && pwd)
OUT=${OUT:-$(mktemp -d)}; mkdir -p "$OUT"
WORK=$(mktemp -d)
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PROJECT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export GPU_CHECK_WORK=$WORK GPU_CHECK_OUT=$OUT GPU_CHECK_PROJECT=$PROJECT GPU_CHECK_HERE=$HERE
if ls .whl/*.whl >/dev/null 2>&1; then
  $PYTHON -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$WORK/site" .whl/*.whl \
    && export PYTHONPATH="$PYTHONPATH:$WORK/site"
fi
END=$((SECONDS + ${GPU_CHECK_SECONDS:-430}))
: >"$OUT/gpu_check.jsonl"

cat >"$WORK/check.py" <<'P'
import dataclasses, importlib.util, json, os, shutil, subprocess, sys, time, types
from contextlib import contextmanager
from pathlib import Path

WORK, OUT, PROJECT = (Path(os.environ[f"GPU_CHECK_{n}"]) for n in ("WORK", "OUT", "PROJECT"))
TINY = os.environ.get("GPU_CHECK_TINY") == "1"
REHEARSED = TINY and os.environ.get("GPU_CHECK_REHEARSE")  # on a machine without a GPU
HAS_TYRO = importlib.util.find_spec("tyro") is not None
if not HAS_TYRO:  # recipes only need it to be described
    class Same:
        def __getitem__(self, item):
            return item

        def __call__(self, *args, **kwargs):
            return None

    tyro, conf = types.ModuleType("tyro"), types.ModuleType("tyro.conf")
    conf.Positional = conf.OmitArgPrefixes = conf.arg = Same()
    conf.__getattr__ = lambda name: Same()
    tyro.conf, tyro.MISSING, tyro.cli = conf, object(), None
    sys.modules.update({"tyro": tyro, "tyro.conf": conf})

import torch

if REHEARSED:  # the device that the project's own tests simulate, and what this script asks of torch.cuda besides
    from tests.rehearsal import rehearsed

    context = rehearsed("cuda", 80e9)
    simulated = context.__enter__()
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *_: simulated.peak
SHAPES = {  # hidden size, blocks, heads
    "opt-1.3b": (2048, 24, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
}
VOCABULARY, POSITIONS, WINDOWS = 50272, 2048, 128
if TINY:
    SHAPES = {name: (64 if name == "opt-1.3b" else 128, 3, 4) for name in SHAPES}
    VOCABULARY, POSITIONS, WINDOWS = 512, 64, 8
STAGE = ""


def note(**facts):
    line = json.dumps({"stage": STAGE, **facts})
    print(line, flush=True)
    with open(OUT / "gpu_check.jsonl", "a") as file:
        file.write(line + "\n")


def seconds_of(run, repeats=3):
    """Median, with the device waited for."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def make_shape(name, blocks):
    """A checkpoint of a published shape with random weights, and a tokenizer with as many words."""
    folder = WORK / f"{name}-{blocks}"
    if folder.exists():
        return str(folder)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    hidden, depth, heads = SHAPES[name]
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=(18 if TINY else 4) * hidden,
        num_hidden_layers=min(blocks, depth), num_attention_heads=heads, max_position_embeddings=POSITIONS, dropout=0.0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("cuda"):
            model = OPTForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="2GB")
    del model
    torch.cuda.empty_cache()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w1", eos_token="w2").save_pretrained(folder)
    return str(folder)


def load(folder, dtype, on_disk):
    """As the command does; nothing refuses."""
    from snp_llm import checkpoint

    return checkpoint.load(folder, dtype, on_disk=on_disk)


@contextmanager
def patched_estimate(found):
    """Keeps what the run was estimated to take."""
    from snp_llm.cli import prune as command

    before = command.estimate

    def keep(*args, **kwargs):
        found.append(before(*args, **kwargs))
        return found[-1]

    command.estimate = keep
    try:
        yield
    finally:
        command.estimate = before


def prune(folder, output, **settings):
    """The whole command, without its parser; its report, seconds, peak and estimate."""
    from snp_llm.cli.prune import run_prune
    from snp_llm.recipe.commands import Talk
    from snp_llm.recipe.recipe import Recipe

    recipe = Recipe(folder, output=str(WORK / output), overwrite=True, **settings)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found, start = [], time.perf_counter()
    with patched_estimate(found):
        run_prune(recipe, ["gpu_check"], Talk(quiet=True))
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    report = json.loads((WORK / output / "prune_report.json").read_text())
    return report, elapsed, torch.cuda.max_memory_allocated(), found[0]


def prune_only(folder, **settings):
    """Nothing but the pruning itself, to the last block: no evaluation, no reloading."""
    from snp_llm.checkpoint.journal import Journal
    from snp_llm.pruning.estimate.estimate import estimate
    from snp_llm.pruning.pipeline import prune as prune_model
    from snp_llm.pruning.run import resolve
    from snp_llm.recipe.recipe import Recipe

    recipe = Recipe(folder, calibration="random", device="cuda", num_samples=WINDOWS, seq_len=POSITIONS, **settings)
    scratch = WORK / "journal"
    shutil.rmtree(scratch, ignore_errors=True)
    dense, tokenizer = load(folder, "auto", scratch / "dense")
    needed = estimate(dense, resolve(recipe, dense))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    pruned = prune_model(dense, tokenizer, recipe, journal=Journal(scratch / "journal", behind=True))
    torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    return pruned, elapsed, torch.cuda.max_memory_allocated(), needed


def env():
    import accelerate, transformers

    note(
        torch=torch.__version__, transformers=transformers.__version__, accelerate=accelerate.__version__,
        card=torch.cuda.get_device_name(), free=torch.cuda.mem_get_info(), tyro=HAS_TYRO, cpus=os.cpu_count(),
        out_dtype="dtype" in torch.ops.aten.mm.overloads(),
        halves=sorted({f for f in Path("/proc/cpuinfo").read_text().split() if f in ("avx512_fp16", "avx512_bf16", "amx_bf16", "amx_fp16")}),
    )


def tests():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/linalg/test_gram.py", "-k", "tensor_cores"],
        cwd=PROJECT, capture_output=True, text=True,
    )
    note(rc=run.returncode, last=run.stdout.strip().splitlines()[-3:], errors=run.stderr[-300:])


def bundled():
    return {"calibration": "bundled", "eval_dataset": "bundled"}


def prune_command():
    from snp_llm.cli.bench import run_bench
    from snp_llm.cli.evaluate import run_evaluate
    from snp_llm.recipe.commands import BenchRecipe, EvaluationRecipe, Talk

    samples = {"num_samples": 8} if TINY else {}
    report, elapsed, peak, needed = prune("tiny-opt", "tiny", sparsity=0.3, device="cuda", **samples)
    note(what="prune", seconds=round(elapsed, 1), device=report["device"], peak=peak)
    pruned = str(WORK / "tiny")
    limit = {"max_windows": 2} if TINY else {}
    run_evaluate(EvaluationRecipe(("tiny-opt", pruned), device="cuda", trust_remote_code=True, **limit), Talk(quiet=True))
    run_bench(
        BenchRecipe("tiny-opt", pruned, batch_sizes=(1,), prompt_lengths=(64,), new_tokens=4, device="cuda", memory=HAS_TYRO and not REHEARSED, trust_remote_code=True),
        ["gpu_check"], Talk(quiet=True),
    )
    note(what="eval and bench", ok=True)
    for settings in ({"target_latency": "0.8x"}, {"max_perplexity_increase": "5%"}, {"layout": "padded"}, {"layout": "uniform"}, {"ordering": "zca"}, {"refine": "none", "measured_cuts": 0}):
        try:
            report, elapsed, peak, _ = prune("tiny-opt", "option", device="cuda", eval=False, num_samples=16, **settings)
            note(what=f"prune {settings}", seconds=round(elapsed, 1), sparsity=report["sparsity"]["achieved"])
        except Exception as error:
            note(what=f"prune {settings}", FAILED=f"{type(error).__name__}: {str(error)[:300]}")


def same():
    """The same run on both devices. In float32 nearly all units must be the same and weights close; see the numbers."""
    from safetensors.torch import load_file

    trained = next((p for p in map(Path, filter(None, (os.environ.get("GPU_CHECK_MODEL"), Path(os.environ["GPU_CHECK_HERE"]).parent / "models/opt-7m"))) if p.exists()), None)
    model = str(trained) if trained and not TINY else "tiny-opt"
    base = {"sparsity": 0.3, "num_samples": 8 if TINY else 32, "seq_len": 256, "eval": not TINY, **bundled()}
    runs = {
        "cpu float32": {"device": "cpu", "dtype": "float32"},
        "cuda float32": {"device": "cuda", "dtype": "float32"},
        "cuda float32, hidden cuda": {"device": "cuda", "dtype": "float32", "hidden_device": "cuda"},
        "cuda float32, hidden disk": {"device": "cuda", "dtype": "float32", "hidden_device": "disk"},
        "cuda float32 again": {"device": "cuda", "dtype": "float32"},
        "cuda float32, TF32 allowed": {"device": "cuda", "dtype": "float32"},
        "cuda bfloat16": {"device": "cuda", "dtype": "bfloat16"},
        "cuda float16": {"device": "cuda", "dtype": "float16"},
    }
    kept, weights, ppl = {}, {}, {}
    for name, settings in runs.items():
        torch.set_float32_matmul_precision("high" if "TF32" in name else "highest")  # must make no difference
        try:
            report, elapsed, peak, needed = prune(model, "same", **base, **settings)
        except Exception as error:
            note(what=name, FAILED=f"{type(error).__name__}: {str(error)[:400]}")
            continue
        kept[name] = [set(site["kept"]) for site in report["sites"]]
        files = sorted((WORK / "same").glob("*.safetensors"))
        weights[name] = {k: v.float() for f in files for k, v in load_file(f).items()}
        ppl[name] = {which: report[which].get("perplexity") for which in ("dense", "pruned")}
        first = next(iter(kept))
        units = [len(a & b) / max(len(a | b), 1) for a, b in zip(kept[name], kept[first])]
        against = {}
        for other in {first, "cuda float32"} & set(weights):
            both = [k for k in weights[name] if k in weights[other] and weights[name][k].shape == weights[other][k].shape]
            gap = max((float((weights[name][k] - weights[other][k]).norm() / weights[other][k].norm().clamp_min(1e-30)) for k in both), default=None)
            against[other] = {"same_shape": f"{len(both)} of {len(weights[name])}", "largest_relative_distance": gap}
        note(
            what=name, seconds=round(elapsed, 1), peak=peak, estimated=needed.peak("device"), units_shared_mean=sum(units) / len(units),
            units_shared_least=min(units), against=against, perplexities=ppl[name], errors=[s["relative_error"] for s in report["sites"]][-2:],
        )


def micro():
    gib = 2**20 if TINY else 2**30
    fresh = lambda: torch.empty(gib, dtype=torch.uint8)
    on_device, host, pinned = torch.zeros(gib, dtype=torch.uint8, device="cuda"), torch.zeros(gib, dtype=torch.uint8), torch.zeros(gib, dtype=torch.uint8)
    rates = {
        "device to device": 2 * gib / seconds_of(on_device.clone),
        "host to device": gib / seconds_of(lambda: on_device.copy_(host)),
        "device to host": gib / seconds_of(lambda: host.copy_(on_device)),
        "device to fresh host": gib / seconds_of(lambda: fresh().copy_(on_device)),
    }
    if not TINY:
        pinned = pinned.pin_memory()
        rates["pinned to device"] = gib / seconds_of(lambda: on_device.copy_(pinned))
        rates["device to pinned"] = gib / seconds_of(lambda: pinned.copy_(on_device))
    note(what="GB/s", **{k: round(v / 1e9, 2) for k, v in rates.items()})
    del on_device, host, pinned
    from snp_llm.linalg.gram import add_moments, empty_moments
    from snp_llm.linalg.ldl import build_subspace, held_out_curve, make_definite
    from snp_llm.linalg.least_squares import _solve
    from snp_llm.linalg.ordering import OrderingProblem, order_units

    for n, d, size in ((64, 32, 1),) if TINY else ((2048, 2048, 64), (8192, 2048, 1), (5120, 5120, 128), (20480, 5120, 1)):
        facts = {}
        x = torch.randn(8192, n, device="cuda").half()
        moments = empty_moments(n, torch.float16, "cuda")
        facts["sums of 8,192 tokens"] = seconds_of(lambda: add_moments(moments, x))
        gram = x.float().T @ x.float()
        del moments
        for dtype in (torch.float32,) if n > 10_000 else (torch.float32, torch.float64):
            name = str(dtype)[-7:]
            G = gram.to(dtype)
            W = torch.randn(d, n, device="cuda", dtype=dtype)
            definite = make_definite(G.clone(), 0.1)
            torch.cuda.synchronize()

            def timed(what, run):
                torch.cuda.reset_peak_memory_stats()
                start = time.perf_counter()
                result = run()
                torch.cuda.synchronize()
                facts[f"{what} {name}"] = round(time.perf_counter() - start, 4)
                return result

            timed("definite (first, warms up)", lambda: make_definite(G.clone(), 0.1))
            timed("definite", lambda: make_definite(G.clone(), 0.1))
            definite.factor()
            timed("inverse", definite.inverse)
            for keep in (0, int(0.7 * n / size)):
                problem = OrderingProblem(definite, W, torch.ones(n // size, dtype=torch.float64, device="cuda"), size, 0, keep)
                order = timed(f"greedy, {keep} kept", lambda: order_units("greedy", problem))
            channels = torch.arange(n, device="cuda")
            subspace = timed("subspace", lambda: build_subspace(definite, channels))
            timed("held-out curve", lambda: held_out_curve(W, subspace.L, G.clone()))
            factor = definite.factor()
            timed("solve of d_out rows", lambda: _solve(factor, W))
            del definite, G, W, subspace, factor, problem
        note(what=f"n = {n}, d = {d}, unit of {size}", **{k: round(v, 4) for k, v in facts.items()})
        del gram, x
        torch.cuda.empty_cache()


def cost(name, blocks, **settings):
    depth = SHAPES[name][1]
    folder = make_shape(name, blocks)
    pruned, elapsed, peak, needed = prune_only(folder, sparsity=0.3, **settings)
    factor = depth / min(blocks, depth)
    note(
        what=f"{name}, {blocks} of {depth} blocks, {settings}", seconds=round(elapsed, 1), times_all_blocks=round(elapsed * factor, 1),
        phases={k: round(v, 2) for k, v in pruned.seconds.items()}, peak_GB=round(peak / 1e9, 2), estimated_GB=round(needed.peak("device") / 1e9, 2),
        reserved_GB=round(torch.cuda.max_memory_reserved() / 1e9, 2),
    )


def cost13():
    for place in ("cuda", "cpu"):
        cost("opt-1.3b", 4, hidden_device=place, refine="none")
    cost("opt-1.3b", 4, hidden_device="cuda")  # with as many steps of refinement as the rest has time for


def whole13():
    folder = make_shape("opt-1.3b", 24)
    text = WORK / "eval.txt"
    count = 2_000 if TINY else 290_000
    words = torch.randint(4, VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))
    text.write_text(" ".join(f"w{i}" for i in words.tolist()))
    report, elapsed, peak, needed = prune(
        folder, "whole", sparsity=0.3, device="cuda", hidden_device="cuda", calibration="random", num_samples=WINDOWS, eval_dataset=str(text),
    )
    seconds = report.get("seconds", {})
    spent = sum(seconds.values()) if isinstance(seconds, dict) else None
    note(what="opt-1.3b, whole command", seconds=round(elapsed, 1), phases=seconds, evaluation_speed_and_page=round(elapsed - spent, 1) if spent else None,
         peak_GB=round(peak / 1e9, 2), estimated_GB=round(needed.peak("device") / 1e9, 2))


def profile():
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    folder = make_shape("opt-1.3b", 2)
    with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        prune_only(folder, sparsity=0.3, hidden_device="cuda", refine="none")
    averages = seen.key_averages()
    table = averages.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=70)
    (OUT / "profile.txt").write_text(table + "\n" + averages.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=70))
    print("\n".join(table.splitlines()[:26]))
    note(what="profile.txt", ok=True)


def memory():
    """Takes most of the card, with plain allocations, so that fallbacks have to be used; results must not change."""
    from snp_llm.evaluate.perplexity import perplexity

    folder = make_shape("opt-1.3b", 2)
    spare = {}
    windows = torch.randint(4, VOCABULARY, (2 if TINY else 96, POSITIONS), generator=torch.Generator().manual_seed(0))
    for room in (None, 4e9, 1.6e9):
        if room is not None and not TINY:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            spare["taken"] = torch.empty(int(max(0, free - room)), dtype=torch.uint8, device="cuda")
        try:
            pruned, elapsed, peak, _ = prune_only(folder, sparsity=0.3, refine="none")
            note(what=f"room {room}", seconds=round(elapsed, 1), peak_GB=round((peak - (spare["taken"].numel() if spare else 0)) / 1e9, 2),
                 kept=[len(site.kept) for site in pruned.sites], units=[sum(site.kept.tolist()) for site in pruned.sites])
            del pruned
            note(what=f"room {room}, perplexity", value=perplexity(load(folder, "auto", WORK / "again")[0], windows, device="cuda"))
        except Exception as error:
            note(what=f"room {room}", FAILED=f"{type(error).__name__}: {str(error)[:300]}")
        spare.clear()


STAGES = {
    "env": env, "tests": tests, "prune": prune_command, "same": same, "micro": micro, "cost13": cost13, "whole13": whole13,
    "cost67": lambda: cost("opt-6.7b", 2, hidden_device="cuda", refine="none"),
    "cost130": lambda: cost("opt-13b", 2, hidden_device="cuda", refine="none"),
    "profile": profile, "memory": memory,
}

STAGE = sys.argv[1]
start = time.perf_counter()
try:
    STAGES[STAGE]()
except BaseException as error:
    import traceback

    traceback.print_exc()
    note(FAILED=f"{type(error).__name__}: {str(error)[:500]}", where=traceback.format_exc().strip().splitlines()[-6:])
    sys.exit(1)
finally:
    note(what="stage", seconds=round(time.perf_counter() - start, 1))
P

limit() {  # seconds a stage may take
  case $1 in env) echo 60 ;; tests) echo 60 ;; prune) echo 100 ;; same) echo 110 ;; micro) echo 60 ;; cost13) echo 90 ;;
    whole13) echo 150 ;; cost67) echo 60 ;; cost130) echo 75 ;; profile) echo 60 ;; *) echo 60 ;; esac
}
[ $# -eq 0 ] && set -- env prune same micro cost13 whole13 cost130 cost67 profile memory tests
for stage in "$@"; do
  left=$((END - SECONDS))
  if [ $left -lt 15 ]; then echo "== $stage: no time left"; continue; fi
  most=$(limit "$stage")
  [ "${GPU_CHECK_TINY:-}" = 1 ] && most=3000
  [ $most -gt $left ] && most=$left
  echo "== $stage (at most $most s)"
  timeout -k 5 "$most" "$PYTHON" "$WORK/check.py" "$stage" >"$WORK/$stage.log" 2>&1
  rc=$?
  cat "$WORK/$stage.log" >>"$OUT/gpu_check.log"
  grep '^{"stage"' "$WORK/$stage.log" | cut -c1-1500
  [ $rc -ne 0 ] && { echo "== $stage: rc $rc"; tail -n 12 "$WORK/$stage.log" | cut -c1-300; }
done
echo "== failures"
grep -c FAILED "$OUT/gpu_check.jsonl"
grep FAILED "$OUT/gpu_check.jsonl" | cut -c1-400
rm -rf "$WORK"
