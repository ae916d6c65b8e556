"""Every option that the README and the page of the commands name, run at least once, through the command line's own
parser, on the bundled model.

What would need the Hub, the harness for tasks or a compiler stops where these begin; all else is done as for a user,
with few tokens and, where the option is about something else, with the settings that cost least.
"""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from snp_llm import Recipe
from snp_llm.checkpoint import hub
from snp_llm.cli import export, parse
from snp_llm.evaluate import side_by_side
from snp_llm.models import blocks
from snp_llm.pruning.widths import latency
from tests.quick import without_page, without_reloading

ROOT = Path(__file__).parent.parent.parent
README = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/commands.md"))
FOREIGN = {"--num_processes"}  # of accelerate
MINE = "ordering: variance\nreference: self\ndampening: 0.1\nallocation: uniform\n"  # no visit, nothing held out
FEW = "--num-samples 4 --seq-len 64 --no-eval --calibration bundled --output {output}"
CHEAP = "--refine none --ordering variance --reference self --dampening 0.1 --allocation uniform"
RUNS = (
    "prune tiny-opt --sparsity 0.2 --ordering obs --metric error --allocation variance --reference dense "
    f"--reference-weight 0.5 --dampening 0.1 --head-unit query --layout padded --refine 2 --measured-cuts 2 {FEW}",
    f"prune tiny-opt --bos once --ffn-sparsity 0.5 --head-sparsity 0.0 --layout uniform --round-to 32 {CHEAP} {FEW}",
    f"prune tiny-opt --dtype bfloat16 --hidden-device disk --resume {CHEAP} {FEW}",
    f"prune tiny-opt --target-params 0.8x --experts channels --refine none {FEW}",
    f"prune tiny-opt --target-size 4MB --overwrite {CHEAP} {FEW}",
    f"prune tiny-opt --depth only --for q4_0 --refine none {FEW}",
    f"prune tiny-opt --target-flops 0.8x {CHEAP} {FEW}",
    f"prune tiny-opt --target-latency 0.8x --latency-table latency.json {CHEAP} {FEW}",
    f"prune tiny-opt --max-perplexity-increase 50% {CHEAP} {FEW}",
    f"prune tiny-opt --config mine.yaml --log-level error {FEW}",
    f"prune tiny-opt --push-to-hub ada/small --private --quiet {CHEAP} {FEW}",
    f"prune tiny-opt --dry-run --json {FEW}",
    "eval tiny-opt --dataset bundled --stride 32 --seq-len 64 --max-windows 2",
    "eval pruned --tasks here --include-path . --limit 2 --no-perplexity --save",
    "bench tiny-opt pruned --batch-sizes 1 --prompt-lengths 8 --compile --save --new-tokens 1 --repeats 1 --no-memory",
    "push pruned ada/small --private",
    "recover pruned --tokens 512 --calibration bundled --no-eval --overwrite",
    "export pruned --to gguf",
    *(f"{command} --help" for command in ("inspect", "prune", "eval", "bench", "report", "push")),
)
# Of these runs, to be done sooner, and not in the README.
UNNAMED = {"--no-eval", "--max-windows", "--no-perplexity", "--new-tokens", "--repeats", "--no-memory"}

pytestmark = pytest.mark.usefixtures("quick_prunes")


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_every_option_that_is_named_is_run_and_no_other():
    assert options(" ".join(RUNS)) - UNNAMED == options(README) - FOREIGN
    assert not UNNAMED & options(README)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run: a recipe, and a pruned model."""
    folder = tmp_path_factory.mktemp("options")
    (folder / "mine.yaml").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        without_page(patch.setattr)
        without_reloading(patch.setattr)
        patch.chdir(folder)
        assert parse.prune_main(["tiny-opt", *shlex.split(f"{CHEAP} {FEW}".format(output="pruned"))]) == 0
    return folder


@pytest.fixture
def ticks(monkeypatch):
    """A clock that no machine's load moves: a block takes a nanosecond for every parameter that it has, the rest of the
    model as long as 100,000."""
    clock = SimpleNamespace(now=0.0)
    run_block, run_rest = blocks.run_block, blocks.run_without_blocks

    def block(module, *given):
        clock.now += 1e-9 * sum(p.numel() for p in module.parameters())
        return run_block(module, *given)

    def rest(*given):
        clock.now += 1e-4
        return run_rest(*given)

    def timed(run, _device):
        before = clock.now
        run()
        return clock.now - before

    monkeypatch.setattr(latency, "run_block", block)
    monkeypatch.setattr(latency, "run_without_blocks", rest)
    monkeypatch.setattr(latency, "timed", timed)


@pytest.fixture
def outside(monkeypatch):
    """What was asked of the Hub, the harness and the compiler."""
    asked = []
    monkeypatch.setattr(hub, "check_access", lambda name: asked.append(("access", name)))
    monkeypatch.setattr(
        hub, "push", lambda folder, name, *, private: asked.append((str(folder), name, private)) or "url"
    )
    written = {"output": "file", "bytes": 0, "what": "", "engine": "", "difference": None}
    monkeypatch.setattr(export, "TO", {"gguf": lambda *given: asked.append("gguf") or written})
    monkeypatch.setattr(side_by_side, "check_harness", lambda: None)
    monkeypatch.setattr(side_by_side, "find_tasks", lambda tasks: asked.append(tasks))
    monkeypatch.setattr(side_by_side, "run_tasks", lambda *_given, **_named: {"here": {"acc": 0.5}})
    monkeypatch.setattr("importlib.metadata.version", lambda _name: "0")
    monkeypatch.setattr("torch.compile", lambda module, **_named: asked.append("compiled") or module)
    return asked


# What other tests in this folder type as well.
ELSEWHERE = ("--dtype", "--target-size", "--target-flops", "--max-perplexity", "--config", "--depth", "--target-params")


@pytest.mark.parametrize(
    "run",
    [pytest.param(r, marks=pytest.mark.exhaustive) if any(o in r for o in ELSEWHERE) else r for r in RUNS],
)
def test_an_option_does_what_it_says(run, folder, ticks, outside, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    output = tmp_path / "output"
    command, *words = shlex.split(run.format(output=output))
    main = {"eval": parse.evaluate_main}.get(command) or getattr(parse, f"{command}_main")
    if "--help" in words:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0 and "usage:" in capsys.readouterr().out
        return
    assert main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    if "--dry-run" in words:
        assert json.loads(printed)["asked"] == "0.3" and not output.exists()
    elif command == "prune":
        as_asked(words, json.loads((output / "prune_report.json").read_text()), outside)
    elif "--tasks" in words:
        assert (outside[0].names, outside[0].include_path, outside[0].limit) == (["here"], ".", 2)
        assert json.loads((folder / "pruned/prune_report.json").read_text())["tasks"]["here"]["limit"] == 2
    elif command == "eval":
        assert "windows of 64 that begin every 32" in printed
    elif command == "bench":
        assert "compiled" in outside and len(json.loads((folder / "pruned/bench.json").read_text())["cells"]) == 2
    elif command == "recover":
        assert (folder / "pruned-recovered/model.safetensors").exists() and "divergence" in printed
    else:
        assert outside == (["gguf"] if command == "export" else [("pruned", "ada/small", True)])


def as_asked(words: list[str], report: dict, outside: list) -> None:
    """Every setting stands in the report as it was typed, and the budget is met."""
    typed = dict(zip(words, [*words[1:], ""], strict=True))
    names = {f"--{field.name.replace('_', '-')}": field.name for field in fields(Recipe)}
    for option in set(typed) & set(names):
        value = report["recipe"][names[option]]
        assert value is True if typed[option].startswith("--") else str(value) == typed[option], option
    dense, pruned = report["dense"], report["pruned"]
    if "--target-params" in typed:
        assert pruned["size"]["parameters"] <= 0.8 * dense["size"]["parameters"]
    elif "--target-size" in typed:
        assert pruned["size"]["bytes"] <= 4e6 < dense["size"]["bytes"]
    elif "--target-flops" in typed:
        assert pruned["size"]["flops"] <= 0.8 * dense["size"]["flops"]
    elif "--target-latency" in typed:
        # By that clock a model takes as many nanoseconds less as its blocks have parameters less.
        whole = 1e9 * json.loads(Path("latency.json").read_text())["whole"]
        left = whole - dense["size"]["parameters"] + pruned["size"]["parameters"]
        assert 0.79 * whole < left <= 0.8 * whole + 1
    elif "--max-perplexity-increase" in typed:
        assert report["trials"] and report["sparsity"]["target"] > 0.3
    elif "--push-to-hub" in typed:
        assert outside == [("access", "ada/small"), (str(Path(typed["--output"])), "ada/small", True)]
    elif "--config" in typed:
        assert report["recipe"]["ordering"] == "variance" and report["recipe"]["sparsity"] == 0.3
