"""What the README and the docs show is what happens: every block of code in them is run, parsed or read.

A block's kind follows from its language and its first words; a block of no kind fails. Blocks run where they can
without hub and GPU, in a temporary folder, with these in place of what they name:

- a folder `*-snp-*` that is read: `tiny-opt` pruned once, with evaluation and the check in a fresh process, which the
  other runs do without;
- any other model: `small-opt`, a random OPT of three blocks, or with `--for`, `wide-opt` of one block whose rows fit;
- datasets of the hub: `bundled`; local texts: files with the bundled text; budgets: ones that a small model can meet;
- 8 windows of 32 tokens.

Python code that reads what another engine or quantiser makes is compiled and no more.

Those of other pages than the README are only parsed unless exhaustive tests are asked for, which run them as well.

What needs write access to the hub or several processes, or measures times, is parsed by the programs' own parsers and
goes no further.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from torch.distributed.run import get_args_parser as torchrun_parser

import snp_llm
from snp_llm.cli import bench, evaluate, export, families, inspect, main, parse, prune, push, recover, report
from snp_llm.data.sources import BUNDLED
from snp_llm.linalg.allocation import SiteBudget
from snp_llm.linalg.ordering import OrderingProblem
from snp_llm.models.families.family import Family
from snp_llm.recipe.file import read_settings
from snp_llm.recipe.groups import GROUPS
from snp_llm.runtime.version import __version__
from tests.conftest import save_model, small_opt
from tests.quick import without_page, without_reloading

ROOT = Path(__file__).parent.parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks/RESULTS.md"]

OFFLINE = {  # values of options that would need the hub, a GPU or a large model
    "--calibration": "bundled",
    "--calibration-split": "train",
    "--eval-dataset": "bundled",
    "--dataset": "bundled",
    "--target-params": "0.9x",
    "--target-size": "0.9x",
    "--target-flops": "0.9x",
    "--max-perplexity-increase": "50%",
    "--stride": "16",
}
QUICK = ["--num-samples", "8", "--seq-len", "32", "--no-eval"]
ENGINES = re.compile("import onnxruntime|BitsAndBytesConfig")  # in code that reads what they have made
MODULES = {"snp_llm.prune": "prune", "snp_llm.evaluate": "eval", "snp_llm.recovery": "recover"}
# Programs that are not this project's: nothing of their commands is checked but that they are these.
FOREIGN = {"vllm", "llama-quantize", "convert_hf_to_gguf.py", "build", "twine"}
OPTIONAL = {"gguf", "llama_cpp", "onnx", "onnxscript", "onnxruntime", "matplotlib", "psutil"}  # of extras
OPTIONAL |= {"compressed_tensors", "llmcompressor"}  # of environments of their own
# What pieces of code for the inside of the package may take as given.
GIVEN = {
    "Family": Family,
    "OrderingProblem": OrderingProblem,
    "SiteBudget": SiteBudget,
    "quick_prune": lambda *given, **settings: quick_prune(*given, **settings),
    "Sequence": Sequence,
    "Tensor": torch.Tensor,
}
# Commands with these go no further than the parser: they write to the Hub, print, need an extra or a GPU, or depend on
# how busy the machine is.
PARSED_ONLY = {"--push-to-hub", "--help", "--target-latency", "--tasks", "--include-path", "cuda"}
FOREIGN_OPTIONS = {"--help", "--no-deps", "--machine"}  # of pip and accelerate


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def find_blocks(page: Path) -> Iterator[Block]:
    for token in MarkdownIt().parse(page.read_text()):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            yield Block(page, token.map[0] + 1, token.info.strip(), token.content)


BLOCKS = [block for page in PAGES for block in find_blocks(page)]


def commands(block: Block) -> list[list[str]]:
    """The commands of a block, as words without variables before them; of one with prompts, what stands behind them."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if text.startswith("$ "):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    parts = [part for line in lines for part in line.split(" && ")]
    read = [shlex.split(part, comments=True) for part in parts]
    return [[*dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)] for words in read if words]


class ParsedError(Exception):
    """Raised where a program has understood its arguments, in place of what it would do next."""


EVERYTHING = "\n".join(block.text for block in BLOCKS)
PRUNED = set(re.findall(r"[\w.-]+-snp-\w+\b(?!\.)", EVERYTHING))  # folders that are read


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer):
    """Where blocks are read: a model, texts and recipes under the names that the docs give them."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(small_opt(), tokenizer, folder / "small-opt")
    wide = {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 512, "num_hidden_layers": 1}
    save_model(small_opt(**wide), tokenizer, folder / "wide-opt")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    text = (BUNDLED / "calibration.txt").read_text()[:20_000]
    for name in {"notes.txt", *re.findall(r"[\w-]+\.(?:txt|jsonl)", EVERYTHING)}:
        rows = json.dumps({"text": text, "body": text}) + "\n"
        (folder / name).write_text(text if name.endswith(".txt") else rows)
    for block in BLOCKS:
        if block.language == "yaml" and (named := re.match(r"# ([\w-]+\.yaml)\n", block.text)):
            (folder / named[1]).write_text(block.text)
    for name in PRUNED:
        (folder / name).mkdir()
        shutil.copy(ROOT / "recipes/tiny-opt-demo.yaml", folder / name / "recipe.yaml")
    return folder


@pytest.fixture(scope="module")
def folder(files):
    """Where blocks run: pruned models besides."""
    folder = files
    options = ["--calibration", "bundled", "--eval-dataset", "notes.txt", *QUICK, "--round-to", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        without_reloading(patch.setattr)
        assert parse.prune_main(["tiny-opt", "--output", "pruned", *options, "--eval"]) == 0
    for name in PRUNED:
        shutil.copytree(folder / "pruned", folder / name, dirs_exist_ok=True)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    without_reloading(monkeypatch.setattr)
    without_page(monkeypatch.setattr)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    return folder


@pytest.fixture(scope="module")
def done() -> set[tuple[str, ...]]:
    """Commands that ran already, as substituted: many blocks show the same."""
    return set()


ELSEWHERE = [block for block in BLOCKS if block.page != ROOT / "README.md"]


@pytest.mark.parametrize(
    "block", [b if b not in ELSEWHERE else pytest.param(b, marks=pytest.mark.exhaustive) for b in BLOCKS], ids=str
)
def test_a_block_does_what_it_says(block, here, done, monkeypatch):
    if block.language == "python":
        run_python(block)
    else:
        understand(block, here, monkeypatch, lambda words: run_or_parse(words, done, monkeypatch))


@pytest.mark.parametrize("block", ELSEWHERE, ids=str)
def test_a_block_is_understood(block, files, monkeypatch):
    if block.language == "python":
        compile(block.text, str(block), "exec")
    else:
        understand(block, files, monkeypatch, lambda words: run_or_parse(words, None, monkeypatch))


def understand(
    block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], None]
) -> None:
    """What is no Python: commands by a function that takes their words, everything else here."""
    monkeypatch.chdir(folder)
    if block.language == "yaml":
        assert read_settings(re.match(r"# (.*)\n", block.text)[1])
    elif block.language == "":
        for words in commands(block):
            command(words)
    elif block.language == "diff":
        named, *added = block.text.splitlines()
        lines = (ROOT / named.removeprefix("--- a/")).read_text().splitlines()
        assert all(line.startswith("+") and line[1:] in lines for line in added)
    else:
        assert block.language == "text", (
            f"{block}: {block.language!r} is no kind of block"
        )  # formulas, and nothing else


def run_python(block: Block) -> None:
    code = block.text.replace('"facebook/opt-1.3b"', '"small-opt"').replace('"wikitext2"', '"bundled"')
    code = code.replace("snp_llm.prune(", "quick_prune(")
    compiled = compile(code, str(block), "exec")
    if ENGINES.search(code) or ("torch.onnx" in code and find_spec("onnxscript") is None):
        return
    exec(compiled, dict(GIVEN))


def quick_prune(*given: Any, **settings: Any) -> snp_llm.PrunedModel:
    """`snp_llm.prune` on few tokens."""
    return snp_llm.prune(*given, **{"seq_len": 32, "round_to": 4, "refine": "none", **settings, "num_samples": 8})


def run_or_parse(words: list[str], done: set[tuple[str, ...]] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One command, by the program that it calls; parsed, where nothing is to be done."""
    if words[0] == "accelerate":
        launcher = pytest.importorskip("accelerate.commands.launch").launch_command_parser()
        launched = launcher.parse_args(words[2:])
        assert words[1] == "launch" and launched.module
        return parse_own(["python", "-m", launched.training_script, *launched.training_script_args], monkeypatch)
    if words[0] == "torchrun":
        launched = torchrun_parser().parse_args(words[1:])
        assert launched.module
        return parse_own(["python", "-m", launched.training_script, *launched.training_script_args], monkeypatch)
    if words[:2] == ["python", "-m"]:
        if words[2] in FOREIGN:
            return None
        words = words[2:]
    elif words[0] == "python":
        words = words[1:]
    program = words[0]
    if program == "snp-llm" or program in MODULES:
        words = own(words)
        if words[1] in ("help", "--version"):
            try:
                assert call_own(words, monkeypatch) == 0
            except SystemExit as stop:
                assert stop.code == 0
            return None
        if done is None or words[1] not in ("prune", "eval") or PARSED_ONLY & set(words):
            return parse_own(words, monkeypatch)
        offline = substitute(words)
        if tuple(offline) not in done:
            done.add(tuple(offline))
            assert call_own(offline, monkeypatch) == 0, offline
    elif program.startswith(("benchmarks/", "recipes/")):
        parse_script(words, monkeypatch)
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif program == "pip":
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), extra
    else:
        assert program in FOREIGN, f"{shlex.join(words)}: say in this test how it is checked"
    return None


def own(words: list[str]) -> list[str]:
    """A command of this package in its first spelling."""
    modules = {name: ["snp-llm", command] for name, command in MODULES.items()}
    return [*modules.get(words[0], words[:1]), *words[1:]]


def substitute(words: list[str]) -> list[str]:
    """The command with what a machine without hub and GPU has."""
    program, command, *rest = words
    recipe = rest[rest.index("--config") + 1] if "--config" in rest else None
    if rest[0].startswith("-"):
        assert recipe is not None, "the model comes first"
        model = [] if recipe.endswith("/recipe.yaml") else ["small-opt"]
    else:
        count = next((at for at, word in enumerate(rest) if word.startswith("-")), len(rest))
        other = "wide-opt" if "--for" in rest else "small-opt"
        model = [word if Path(word).exists() else other for word in rest[:count]]
        rest = rest[count:]
    for at, (option, value) in enumerate(pairwise(rest), start=1):
        if option in OFFLINE and value != "random" and not Path(value).exists():
            rest[at] = OFFLINE[option]
    if command == "eval":
        given = [] if "--dataset" in rest else ["--dataset", "bundled"]
        return [program, command, *model, *rest, *given, "--seq-len", "32", "--max-windows", "4"]
    given = [] if "--calibration" in rest else ["--calibration", "bundled"]
    rounded = [] if "--for" in rest else ["--round-to", "4"]
    return [program, command, *model, *rest, *given, *QUICK, *rounded, "--overwrite"]


def call_own(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", words)
    return main.main()


def parse_own(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line understands it; what it would do then is left out."""
    words = own(words[2:] if words[0] == "python" else words)
    with monkeypatch.context() as patch:
        for room in (bench, evaluate, export, families, inspect, prune, push, recover, report):
            for name in [name for name in dir(room) if name.startswith("run_")]:
                patch.setattr(room, name, stop)
        with pytest.raises(ParsedError):
            call_own(words, patch)


def parse_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark script understands it."""
    understood = argparse.ArgumentParser.parse_args
    script = ROOT / words[0]
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda *given, **named: stop(understood(*given, **named)))
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str(script.parent))
        try:
            with pytest.raises(ParsedError):
                runpy.run_path(str(script), run_name="__main__")
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            pytest.skip(f"{words[0]} needs {error.name}")


def stop(*_given: object, **_named: object) -> None:
    raise ParsedError


def test_there_are_blocks_of_every_kind():
    assert {block.language for block in BLOCKS} == {"", "python", "yaml", "text", "diff"}
    assert len(BLOCKS) > 40


def test_options_that_are_named_exist(capsys, monkeypatch):
    known = {*FOREIGN_OPTIONS, *re.findall(r"--[a-z-]+", main.USAGE)}
    for command in set(re.findall(r"^  snp-llm (\w+)", main.USAGE, re.M)) - {"help", "completion"}:
        with pytest.raises(SystemExit):
            call_own(["snp-llm", command, "--help"], monkeypatch)
        known |= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    for page in PAGES:
        for option in set(re.findall(r"`(--[a-z-]+)", page.read_text())):
            assert option in known, f"{page.name}: {option}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in links(page):
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            assert found.is_relative_to(ROOT) and found.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in headings(found), f"{page.name}: {target}"


def links(page: Path) -> Iterator[str]:
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for child in token.children or []:
            target = str(child.attrs.get("href") or child.attrs.get("src") or "")
            if target and not target.startswith("http"):
                yield target


def headings(page: Path) -> set[str]:
    tokens = MarkdownIt().parse(page.read_text())
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


RECOVERED = (
    *("command", "recipe", "versions", "dense", "text", "sha256", "held_out", "item", "items", "steps", "seconds"),
    *("divergence", "kept", "history", "figures", "device", "another"),
)
SAMPLES = {f"samples[].{name}" for name in ("picture", "label")}  # of classifiers of images
RECOVERIES = {"recovery", *(f"recovery[].{name}" for name in RECOVERED)}  # of `snp-llm recover`
SAMPLES |= {f"samples[].{model}_chance" for model in ("dense", "pruned")}


def test_every_key_of_a_report_is_explained(folder):
    report = json.loads((folder / "pruned/prune_report.json").read_text())
    page = (ROOT / "docs/report.md").read_text()
    described = set(re.findall(r"`([\w.\[\] ]+)`", page))
    recipes = (ROOT / "docs/recipes.md").read_text()
    for key in keys(report):
        explained = f"`{key.removeprefix('recipe.')}`" in recipes if key.startswith("recipe.") else key in described
        assert explained, key
    first_column = {name for row in re.findall(r"^\|([^|]*)\|", page, re.M) for name in re.findall(r"`([^`]+)`", row)}
    elsewhere = {
        "trials[].sparsity",
        "trials[].perplexity_rise",
        "tasks",
        "perplexities",
        *SAMPLES,
        *RECOVERIES,
    }  # not in this run's
    assert first_column - {*keys(report)} == elsewhere


def keys(value: object, path: str = "") -> Iterator[str]:
    """Paths of all keys; lists of objects by their first."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield path + name
            yield from keys(inner, f"{path}{name}.")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from keys(value[0], path[:-1] + "[].")


def test_every_setting_is_in_the_docs():
    """In the table, beside its group."""
    page = (ROOT / "docs/recipes.md").read_text()
    for group, names in GROUPS.items():
        rows = re.findall(rf"^\| {group} \|([^|]*)\|", page, re.M)
        assert sorted(re.findall("`([^`]+)`", " ".join(rows))) == sorted(names)


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and str(citation["version"]) == __version__
    paper = citation["preferred-citation"]
    assert "2405.17506" in paper["url"] and [a["family-names"] for a in paper["authors"]] == [
        "Offergeld",
        "Gerven",
        "Ahmad",
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    if find_spec("mkdocs") is None or find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "site/docs/how_it_works/index.html").exists()
    assert (tmp_path / "site/benchmarks/results/peers-opt-7m.png").exists()
