"""What pruning costs: seconds by phase beside one dense forward pass over the same tokens, FLOPs, and peak memory.

    python benchmarks/cost.py MODEL --num-samples 128 --seq-len 512
    python benchmarks/cost.py --shape opt-1.3b --dtype bfloat16 --blocks 2 --num-samples 8 --seq-len 128

Forward pass and pruning take turns, so that drift of the machine cancels in the ratio, each in a process of its own,
whose peak memory is then its own. On a CPU with one thread (OMP_NUM_THREADS=1) seconds are those of the CPU, since
machines are shared. A prune is all of it: the checkpoint is read block by block from disk, blocks and
gradients are written when they are finished, and the model is saved. Evaluation and the reloading check are apart.

A shape is that of a published OPT with random weights, which costs the same. With `--blocks k` the model has only its
first k blocks: all seconds and FLOPs but those of embeddings and head, which a model has once however deep it is, are
multiplied by what is missing, and the table says so. (What else there is once, reading the text for instance, is
multiplied as well.) Peak memory is that of the process: its resident set, or of the GPU; with fewer blocks it is less.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import Recipe, checkpoint
from snp_llm.checkpoint.journal import Journal
from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.data.sources import BUNDLED
from snp_llm.evaluate.peak import resident_peak
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import run_without_blocks
from snp_llm.pruning.estimate.estimate import estimate
from snp_llm.pruning.pipeline import prune
from snp_llm.pruning.run import read_calibration, resolve
from snp_llm.runtime.device import ONCE, PHASES, Clock, compute_device, matmul_rates, synchronize

T = TypeVar("T")

# Hidden size, blocks, heads; the FFN is four times as wide.
SHAPES = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
}
# The default, with refinement and without, and what no gradients are needed for: with the default's ordering, with the
# paper's, and without a visit to the model.
PLAIN = {"allocation": "variance", "metric": "error", "reference": "self", "dampening": 0.1, "refine": "none"}
CHOICES: dict[str, dict[str, Any]] = {
    "default": {},
    "unrefined": {"refine": "none"},
    "plain": PLAIN,
    "paper": {**PLAIN, "ordering": "zca"},
    "uniform": {**PLAIN, "ordering": "zca", "allocation": "uniform"},
}


@dataclass(frozen=True)
class Cost:
    """One prune beside one forward pass; seconds and FLOPs are those of all blocks of the shape.

    Attributes:
        forward: seconds of the forward pass.
        seconds: by phase of the prune.
        rest: seconds of the prune in no phase.
        flops: that the prune was reckoned to do.
        at_ceiling: seconds that those would take at the measured rate of large products.
        memory: peak, bytes: in forward pass and prune.
    """

    forward: float
    seconds: dict[str, float]
    rest: float
    flops: float
    at_ceiling: float
    memory: tuple[float, float]

    @property
    def whole(self) -> float:
        return sum(self.seconds.values()) + self.rest


def main() -> None:
    args = parse()
    quieten()
    device = compute_device(args.device)
    print(f"    python {' '.join(['benchmarks/cost.py', *map(printable, sys.argv[1:])])}\n")
    with tempfile.TemporaryDirectory(prefix="cost-", dir=args.scratch) as scratch:
        folder, factor = args.model, 1.0
        if args.shape:
            folder, factor = make_shape(args.shape, args.blocks, args.dtype, Path(scratch) / "dense")
        print(heading(args, factor, device))
        columns = ["choices", "windows", "forward, s", "prune, s", "ratio", *(f"{phase}, s" for phase in PHASES)]
        columns += ["rest, s", "TFLOPs", "of ceiling", "peak forward, MB", "peak prune, MB"]
        print(f"| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
        for name in args.choices.split(","):
            for count in args.num_samples:
                costs = [measure(args, folder, name, count, factor, device, Path(scratch)) for _ in range(args.repeats)]
                print(row(name, count, costs), flush=True)
    print(f"\nResident before any model: {IMPORTED / 1e6:.0f} MB, with torch imported.")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", help="hub id, local folder or tiny-opt")
    what.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=None, help="of a shape, the first so many")
    parser.add_argument("--dtype", default="auto", help="of the weights; float32 for shapes")
    parser.add_argument("--num-samples", type=lambda text: [int(n) for n in text.split(",")], default=[128])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--choices", default=",".join(CHOICES), help="rows of the table")
    parser.add_argument("--calibration", default=None, help="default: wikitext2; random token ids for shapes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--hidden-device", default="cpu", help="as for snp-llm prune")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", default=None, help="folder for weights and journals; default: the system's")
    args = parser.parse_args()
    if args.blocks is not None and not args.shape:
        parser.error("--blocks: expected together with --shape")
    return args


def heading(args: argparse.Namespace, factor: float, device: torch.device) -> str:
    name = args.shape or Path(args.model).name
    count = torch.get_num_threads()
    threads = "1 thread, CPU seconds" if count == 1 else f"{count} threads"
    threads = threads if device.type == "cpu" else torch.cuda.get_device_name()
    few = f" Extrapolated from {args.blocks} blocks, times {factor:g}." if factor > 1 else ""
    return (
        f"{name}: windows of {args.seq_len} tokens, batches of {args.batch_size}, sparsity {args.sparsity:g}, "
        f"{device.type}, {threads}, torch {torch.__version__}; medians of {args.repeats}.{few}\n"
    )


def make_shape(name: str, blocks: int | None, dtype: str, folder: Path) -> tuple[str, float]:
    """A checkpoint with random weights, and how many times as many blocks the shape has."""
    hidden, depth, heads = SHAPES[name]
    kept = min(blocks or depth, depth)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    config = OPTConfig(
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        ffn_dim=4 * hidden,
        num_hidden_layers=kept,
        num_attention_heads=heads,
        dropout=0.0,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config).to(wanted)
    model.save_pretrained(folder, max_shard_size="500MB")
    return str(folder), depth / kept


def load(
    args: argparse.Namespace, folder: str, scratch: Path | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model, on disk where there is a scratch folder. A shape gets the bundled tokenizer, which has fewer ids."""
    if not args.shape:
        return checkpoint.load(folder, args.dtype, on_disk=scratch)
    where = {} if scratch is None else {"device_map": {"": "disk"}, "offload_folder": str(scratch)}
    model = OPTForCausalLM.from_pretrained(folder, dtype="auto", **where)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(BUNDLED / checkpoint.TINY_OPT)


def measure(
    args: argparse.Namespace, folder: str, name: str, count: int, factor: float, device: torch.device, scratch: Path
) -> Cost:
    """A forward pass, then a prune, each in a process of its own."""
    recipe = Recipe(
        model=folder,
        sparsity=args.sparsity,
        calibration=args.calibration or ("random" if args.shape else "wikitext2"),
        num_samples=count,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        device=args.device,
        hidden_device=args.hidden_device,
        **CHOICES[name],
    )
    forward, rest, forward_peak = in_own_process(run_forward, args, recipe, device)
    seconds, elapsed, prune_peak = in_own_process(run_prune, args, recipe, device, scratch)
    times = {phase: 1.0 if phase == ONCE else factor for phase in PHASES}
    skeleton = load_skeleton(folder, "auto" if args.shape else args.dtype)
    needed = estimate(skeleton, resolve(recipe, skeleton))
    rates = matmul_rates(device, needed.dtypes)
    repeated = {work.what: 1.0 if ONCE in work.what else factor for work in needed.work}
    return Cost(
        forward=(forward - rest) * factor + rest,
        seconds={phase: times[phase] * seconds[phase] for phase in PHASES},
        rest=factor * (elapsed - sum(seconds.values())),
        flops=sum(repeated[work.what] * work.flops for work in needed.work),
        at_ceiling=sum(repeated[work.what] * work.flops / rates[work.dtype] for work in needed.work),
        memory=(forward_peak, prune_peak),
    )


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of this module returns in a fresh process, whose memory is then its alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=quieten) as pool:
        return pool.submit(function, *arguments).result()


def run_forward(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> tuple[float, float, float]:
    """Seconds of one plain pass over all calibration tokens, those of embeddings and head, and peak memory."""
    dense, tokenizer = load(args, recipe.model, None)
    tokens = read_calibration(tokenizer, resolve(recipe, dense), dense).tokens
    forward, rest = forward_seconds(dense, tokens, args.batch_size, device)
    return forward, rest, peak_memory(device)


def run_prune(
    args: argparse.Namespace, recipe: Recipe, device: torch.device, scratch: Path
) -> tuple[dict[str, float], float, float]:
    """Seconds of a whole prune by phase and in all, and peak memory."""
    clock = Clock(device)
    matmul_rates(device, [torch.float32])  # warms up
    with tempfile.TemporaryDirectory(dir=scratch) as work:
        start = time.perf_counter()
        with clock.phase("loading"):
            dense, tokenizer = load(args, recipe.model, Path(work) / "dense")
        pruned = prune(dense, tokenizer, recipe, journal=Journal(Path(work) / "journal"))
        with clock.phase("saving"):
            checkpoint.save(pruned.model, tokenizer, Path(work) / "pruned")
        elapsed = time.perf_counter() - start
    seconds = {phase: pruned.seconds[phase] + clock.seconds[phase] for phase in PHASES}
    return seconds, elapsed, peak_memory(device)


def row(name: str, count: int, costs: list[Cost]) -> str:
    def middle(values: Iterator[float]) -> float:
        return statistics.median(values)

    figures = [middle(c.forward for c in costs), middle(c.whole for c in costs)]
    figures += [middle(c.whole / c.forward for c in costs)]
    figures += [middle(c.seconds[phase] for c in costs) for phase in PHASES]
    figures += [middle(c.rest for c in costs), middle(c.flops for c in costs) / 1e12]
    share = middle(c.at_ceiling / c.whole for c in costs)
    peaks = [max(c.memory[at] for c in costs) / 1e6 for at in (0, 1)]
    cells = [name, f"{count}", *(f"{x:.2f}" for x in figures), f"{100 * share:.0f} %", *(f"{x:.0f}" for x in peaks)]
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def forward_seconds(
    model: PreTrainedModel, tokens: torch.Tensor, batch_size: int, device: torch.device
) -> tuple[float, float]:
    """One plain forward pass over all tokens, and the part of it that is embeddings and head."""
    model.to(device)
    blocks = find_blocks(model)
    batches = [batch.to(device) for batch in tokens.split(batch_size)]
    model(batches[0], use_cache=False)  # warms up
    seconds = []
    for run in (
        lambda batch: model(batch, use_cache=False),
        lambda batch: run_without_blocks(model, blocks, batch),
    ):
        synchronize(device)
        start = time.perf_counter()
        for batch in batches:
            run(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    model.to("cpu")
    return seconds[0], seconds[1]


def peak_memory(device: torch.device) -> float:
    """Most bytes that this process has held: on a GPU of its memory, else resident."""
    return float(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak())


def quieten() -> None:
    if torch.get_num_threads() == 1:
        time.perf_counter = time.process_time
    if torch.get_num_threads() == 1 and not torch.cuda.is_available():
        time.perf_counter = time.process_time  # what else the machine does costs none of these
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.logging.get_logger("accelerate.big_modeling").setLevel("ERROR")


def printable(argument: str) -> str:
    """Of files and folders only the names: the command may be published."""
    return Path(argument).name if "/" in argument and Path(argument).exists() else argument


IMPORTED = resident_peak()

if __name__ == "__main__":
    main()
