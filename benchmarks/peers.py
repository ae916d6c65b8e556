"""Published one-shot structured pruning methods against this package: one model, the same tokens, the same budget.

    python benchmarks/peers.py MODEL --calibration wiki.valid.tokens --validation wikitext=wiki.valid.tokens@second \
        --evaluation wikitext=wiki.test.raw

The methods are in peers/, one file each with its reference; most have several settings. All cells of a seed share the
calibration windows, and all cells the texts. Of each method, and of this package, the setting counts that has the
lowest perplexity on the --validation texts, at each sparsity; the --evaluation texts say nothing about which.
`TEXT@first` and `TEXT@second` are the halves of a text; no validation window may be one that is calibrated on.

`--ours NAME:field=value,...` adds settings of this package. Cells are stored in --work as they are measured, from
where a run that was interrupted goes on; a cell is measured anew when the weights, a window or a setting has changed,
a recipe's defaults included, but not when code has: take another folder then. Writes a CSV with every cell, a
Markdown table and a plot. What a method cannot do stands in the table with the reason.
"""

import argparse
import hashlib
import itertools
import json
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peers import NAMES, PEERS, Method, make_methods
from peers.measure import Quality, answered, dense_logits, make_questions, quality
from peers.report import Row, Text, markdown, plot, read_csv, write_csv
from peers.snp import OURS, PAPER, make_recipe
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import checkpoint
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import Windows, evaluation_windows, mixed_windows
from snp_llm.runtime.device import compute_device
from snp_llm.runtime.errors import SnpError

HALVES = {"": (0.0, 1.0), "first": (0.0, 0.5), "second": (0.5, 1.0)}

Measure = Callable[[PreTrainedModel], tuple[dict[str, Quality], dict[str, float]]]


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    if args.redraw:
        rows, keys = read_csv(args.output / f"{args.name}.csv")
        plot(rows, keys, Path(args.model).name, args.output / f"{args.name}.png")
        return 0
    if args.work is not None:
        args.work.mkdir(parents=True, exist_ok=True)
        return run(args, args.work)
    with tempfile.TemporaryDirectory(prefix="peers-") as work:
        return run(args, Path(work))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or local folder")
    parser.add_argument("--calibration", default="wikitext2", help="as for snp-llm prune")
    parser.add_argument(
        "--validation", action="append", metavar="LABEL=TEXT", help="settings are chosen on these texts"
    )
    parser.add_argument("--evaluation", action="append", metavar="LABEL=TEXT", help="what is reported")
    parser.add_argument(
        "--methods", default=f"{','.join(NAMES)},ours-*", help=f"of {','.join(NAMES)}, ours, or `FAMILY-*`"
    )
    parser.add_argument("--ours", action="append", default=[], metavar="NAME:FIELD=VALUE,...", help="also a method")
    parser.add_argument("--sparsities", type=numbers, default=numbers("0.2,0.3,0.5"))
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256, help="of calibration and of the texts")
    parser.add_argument("--max-windows", type=int, default=64, help="of each text")
    parser.add_argument("--questions", type=int, default=0, help="which of four continuations is real, of each text")
    parser.add_argument("--dtype", default="auto", help="of the weights, while pruning and measuring")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--work", type=Path, default=None, help="kept, and used again; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="peers")
    parser.add_argument("--stored", action="store_true", help="measure nothing: report what is in --work, cell by cell")
    parser.add_argument("--redraw", action="store_true", help="only the plot, of what an earlier run wrote to --output")
    args = parser.parse_args(arguments)
    if args.stored and args.work is None:
        parser.error("--stored: expected together with --work, where the cells are")
    args.command = printable(sys.argv[1:] if arguments is None else arguments)
    args.ours = {OURS: {}} | dict(map(settings_of, args.ours))
    try:
        args.methods = chosen_names(args.methods, [*NAMES, *args.ours])
    except ValueError as error:
        parser.error(str(error))
    args.texts = [
        (role, *item.split("=", 1))
        for role, items in (("validation", args.validation), ("evaluation", args.evaluation or ["wikitext2=wikitext2"]))
        for item in items or []
    ]
    return args


def chosen_names(wanted: str, known: Sequence[str]) -> list[str]:
    """Method names, `osscar-*` standing for osscar and all that begin with `osscar-`.

    Raises:
        ValueError: no such method.
    """
    chosen: list[str] = []
    for name in wanted.split(","):
        stem = name.removesuffix("-*")
        found = [k for k in known if k == name or (stem != name and (k == stem or k.startswith(f"{stem}-")))]
        if not found:
            raise ValueError(f"--methods: unknown method {name!r}; expected some of {', '.join(known)}")
        chosen += found
    return list(dict.fromkeys(chosen))


def settings_of(text: str) -> tuple[str, dict[str, Any]]:
    """`refined:refine=400,seed=1` as a method's name and fields of its recipe."""
    name, _, fields = text.partition(":")
    pairs = (field.split("=", 1) for field in fields.split(",") if field)
    return f"{OURS}-{name}", {key: yaml.safe_load(value) for key, value in pairs}


def numbers(text: str) -> list[float]:
    return [float(value) for value in text.split(",")]


def printable(arguments: Sequence[str]) -> str:
    """The command as others may see it: of files and folders only the names."""
    return " ".join(["python benchmarks/peers.py", *map(_without_folders, arguments)])


def _without_folders(argument: str) -> str:
    label, equals, value = argument.rpartition("=")
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.:-]+", value) and not Path(value).exists()
    return argument if is_hub_id or "/" not in value else f"{label}{equals}{Path(value).name}"


def run(args: argparse.Namespace, work: Path) -> int:
    """All cells, the CSV growing with them, then the report; 1 if a method could do nothing at all."""
    dense, tokenizer = checkpoint.load(args.model, args.dtype)
    calibration = {seed: read_calibration(args, tokenizer, seed) for seed in args.seeds}
    texts = [read_text(args, tokenizer, role, label, name) for role, label, name in args.texts]
    check_apart(texts, calibration.values())
    methods = PEERS | {m.name: m for m in make_methods(tokenizer, package_settings(args), args.ours)}
    shared = {
        "model": fingerprint(dense),
        "texts": {text.key: text.windows.digest for text in texts},
        "questions": args.questions,
        "batch_size": args.batch_size,
    }
    measure = None if args.stored else make_measure(args, dense, texts)
    first = once(
        work,
        "dense",
        shared,
        None if measure is None else lambda: Row("dense", "dense", 0.0, 0, 0.0, 0.0, *measure(dense)),
    )
    if first is None:
        raise SystemExit(f"--stored: {work} has no cell of the dense model on these texts.")
    rows = [first]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, seed in itertools.product(args.methods, args.seeds):
        windows = calibration[seed]
        cells = None if measure is None else measure_method(methods[name], dense, windows.tokens, seed, measure)
        for sparsity in args.sparsities:
            settings = shared | {"calibration": windows.digest, "method": name, "sparsity": sparsity, "seed": seed}
            settings |= recipe_settings(args, name, sparsity, seed)
            compute = None if cells is None else lambda cells=cells, sparsity=sparsity: cells(sparsity)
            row = once(work, f"{name}-{100 * sparsity:g}-{seed}", settings, compute)
            rows += [] if row is None else [row]
        write_csv(rows, texts, args.output / f"{args.name}.csv")
    if len(rows) > 1:
        report = markdown(args.command, rows, texts, next(iter(calibration.values())), methods)
        (args.output / f"{args.name}.md").write_text(report)
        plot(rows, [text.key for text in texts], Path(args.model).name, args.output / f"{args.name}.png")
        print(report)
    return int(len(rows) > 1 and all(row.failed for row in rows[1:]))


def read_text(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, role: str, label: str, name: str) -> Text:
    """A half of a text, or all of it: windows to measure on, and what comes after them for questions."""
    name, _, half = name.partition("@")
    if half not in HALVES:
        raise SystemExit(f"--{role} {label}: expected TEXT, TEXT@first or TEXT@second, got @{half}.")
    windows = evaluation_windows(tokenizer, Dataset(name), seq_len=args.seq_len)
    begin, end = (int(share * len(windows.tokens)) for share in HALVES[half])
    tokens = windows.tokens[begin:end]
    measured = tokens[: args.max_windows]
    said = f"{windows.origin}{f', {half} half' if half else ''}, {len(measured)} windows of {args.seq_len} tokens"
    digest = hashlib.sha256(measured.numpy().tobytes()).hexdigest()
    rest = tokens[args.max_windows :].flatten()
    return Text(role, label, replace(windows, tokens=measured, description=said, digest=digest), rest)


def read_calibration(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seed: int) -> Windows:
    draw = {"num_samples": args.num_samples, "seq_len": args.seq_len, "seed": seed}
    return mixed_windows(tokenizer, Dataset(args.calibration), **draw)


def check_apart(texts: Sequence[Text], calibration: Any) -> None:
    """Exits where a window that settings are chosen on, or that is reported, is calibrated on as well."""
    seen = {tuple(window.tolist()) for windows in calibration for window in windows.tokens}
    for text in texts:
        if any(tuple(window.tolist()) in seen for window in text.windows.tokens):
            raise SystemExit(f"--{text.role} {text.label}: has windows that are calibrated on. Use another half.")


def package_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a recipe that this run sets; all others keep their defaults."""
    return {
        "model": Path(args.model).name,
        "calibration": args.calibration,
        "num_samples": args.num_samples,
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
    }


def recipe_settings(args: argparse.Namespace, name: str, sparsity: float, seed: int) -> dict[str, Any]:
    """The whole recipe, for the package's own methods: a cell is measured anew when a default has changed."""
    if name in PEERS:
        return {}
    settings = package_settings(args) | {"calibration": Path(args.calibration).name}
    return {"recipe": make_recipe(settings, args.ours.get(name, PAPER), sparsity, seed).as_dict()}


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_measure(args: argparse.Namespace, dense: PreTrainedModel, texts: Sequence[Text]) -> Measure:
    """What is measured on every model: its quality on every text, and questions of the evaluation texts answered."""
    device, batch = compute_device("auto"), args.batch_size
    expected = {text.key: dense_logits(dense, text.windows.tokens, batch, device) for text in texts}
    asked = [text for text in texts if args.questions and text.role == "evaluation"]
    questions = {text.label: make_questions(text.rest, args.questions) for text in asked}

    def measure(model: PreTrainedModel) -> tuple[dict[str, Quality], dict[str, float]]:
        return (
            {t.key: quality(model, expected[t.key], t.windows.tokens, batch, device) for t in texts},
            {label: answered(model, asked, batch, device) for label, asked in questions.items()},
        )

    return measure


def measure_method(
    method: Method, dense: PreTrainedModel, tokens: torch.Tensor, seed: int, measure: Measure
) -> Callable[[float], Row]:
    """Prunes and measures at one sparsity after the other; what cannot be done is a row that says why.

    What they share is computed at the first; its CPU time counts in every cell, as if each had been pruned alone.
    """
    prepared: list[Any] = []

    def cell(sparsity: float) -> Row:
        start = time.process_time()
        try:
            if not prepared:
                prepared.append(method.prepare(dense, tokens, seed))
                prepared.append(time.process_time() - start)
            prune, shared_seconds = prepared
            start = time.process_time()
            result = prune(sparsity)
        except SnpError as error:
            return Row(method.name, method.family, sparsity, seed, 0.0, 0.0, {}, {}, str(error))
        seconds = shared_seconds + time.process_time() - start
        return Row(method.name, method.family, sparsity, seed, result.achieved, seconds, *measure(result.model))

    return cell


def once(work: Path, stem: str, settings: dict[str, Any], measure: Callable[[], Row] | None) -> Row | None:
    """The row of an earlier run with the same settings, or a new one, or None where none is to be measured."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = work / f"{stem}-{key[:12]}.json"
    if file.exists():
        row, origin = Row.from_dict(json.loads(file.read_text())["row"]), "stored"
    elif measure is None:
        return None
    else:
        row, origin = measure(), "measured"
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps({"settings": settings, "row": asdict(row)}, indent=1))
        unfinished.replace(file)
    values = ", ".join(f"{key} {q.perplexity:.3f} ({q.kl:.4f})" for key, q in row.quality.items())
    values = row.failed or f"{values}; achieved {row.achieved:.4f}, {row.seconds:.1f} CPU s"
    print(f"{stem}: {values}, {origin}", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
