"""Published one-shot structured pruning methods against this package: one model, the same tokens, the same budget.

    python benchmarks/peers.py MODEL --calibration wiki.valid.tokens --evaluation wikitext=wiki.test.raw

The methods are in peers/, one file each with its reference. All cells of a seed share the calibration windows, and all
cells the evaluation windows. Cells are stored in --work as they are measured, from where a run that was interrupted
goes on; a cell is measured anew when the weights, a window or a setting has changed, a recipe's defaults included, but
not when code has: take another folder then. Writes a CSV with every cell, a Markdown table and a plot. Exits with 1 if
a method could not prune at some sparsity.
"""

import argparse
import csv
import hashlib
import itertools
import json
import logging
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peers import NAMES, PEERS, Method, make_methods
from peers.snp import PAPER, make_recipe
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import checkpoint, perplexity
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import Windows, calibration_windows, evaluation_windows
from snp_llm.report.figures import Line, Panel, quality_figure
from snp_llm.runtime.device import compute_device
from snp_llm.runtime.errors import SnpError

FARTHEST_FROM_TARGET = 0.01
OURS = "ours"

log = logging.getLogger("peers")


@dataclass(frozen=True)
class Row:
    """One cell; `perplexity` by evaluation text. The dense model is a method of its own, at sparsity 0."""

    method: str
    sparsity: float
    seed: int
    achieved: float
    seconds: float
    perplexity: dict[str, float] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    if args.redraw:
        redraw(args)
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
    parser.add_argument("--evaluation", action="append", metavar="LABEL=TEXT", help="may be given several times")
    parser.add_argument("--methods", type=names, default=list(NAMES), help=f"of {','.join(NAMES)}")
    parser.add_argument("--sparsities", type=numbers, default=numbers("0.1,0.2,0.3,0.4,0.5"))
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0])
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256, help="of calibration and of evaluation")
    parser.add_argument("--max-windows", type=int, default=128)
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
    args.evaluation = dict(item.split("=", 1) for item in args.evaluation or ["wikitext2=wikitext2"])
    return args


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"unknown method {unknown[0]!r}; expected some of {', '.join(NAMES)}")
    return chosen


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
    """All cells, the CSV growing with them, then the report; 1 if a cell failed."""
    dense, tokenizer = checkpoint.load(args.model, args.dtype)
    texts = {label: read_text(args, tokenizer, name) for label, name in args.evaluation.items()}
    calibration = {seed: read_calibration(args, tokenizer, seed) for seed in args.seeds}
    methods = all_methods(args, tokenizer)
    shared = {
        "model": fingerprint(dense),
        "evaluation": {label: windows.digest for label, windows in texts.items()},
        "batch_size": args.batch_size,
    }
    device = compute_device("auto")

    def measure(model: PreTrainedModel) -> dict[str, float]:
        return {
            label: perplexity(model, windows.tokens, batch_size=args.batch_size, device=device)
            for label, windows in texts.items()
        }

    first = once(work, "dense", shared, lambda: Row("dense", 0.0, 0, 0.0, 0.0, measure(dense)))
    assert first is not None
    rows = [first]
    args.output.mkdir(parents=True, exist_ok=True)
    failures = 0
    for name, seed in itertools.product(args.methods, args.seeds):
        windows = calibration[seed]
        cells = measure_method(methods[name], dense, windows.tokens, seed, measure)
        for sparsity in args.sparsities:
            settings = shared | {"calibration": windows.digest, "method": name, "sparsity": sparsity, "seed": seed}
            settings |= recipe_settings(args, name, sparsity, seed)
            try:
                compute = None if args.stored else partial(cells, sparsity)
                row = once(work, f"{name}-{100 * sparsity:g}-{seed}", settings, compute)
                if row is not None:
                    rows.append(row)
            except SnpError as error:
                failures += 1
                log.error("%s, sparsity %g, seed %d: failed: %s", name, sparsity, seed, error)
        write_csv(rows, list(texts), args.output / f"{args.name}.csv")
    if len(rows) > 1:
        report = markdown(args, rows, texts, calibration[args.seeds[0]], methods)
        (args.output / f"{args.name}.md").write_text(report)
        captions = {label: windows.description for label, windows in texts.items()}
        plot(rows, captions, methods, Path(args.model).name, args.output / f"{args.name}.png")
        print(report)
    return 1 if failures else 0


def read_text(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, name: str) -> Windows:
    return evaluation_windows(tokenizer, Dataset(name), seq_len=args.seq_len, max_windows=args.max_windows)


def read_calibration(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, seed: int) -> Windows:
    draw = {"num_samples": args.num_samples, "seq_len": args.seq_len, "seed": seed}
    return calibration_windows(tokenizer, Dataset(args.calibration), **draw)


def package_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a recipe that this run sets; all others keep their defaults."""
    return {
        "model": Path(args.model).name,
        "calibration": args.calibration,
        "num_samples": args.num_samples,
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
    }


def all_methods(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Method]:
    return PEERS | {method.name: method for method in make_methods(tokenizer, package_settings(args))}


def recipe_settings(args: argparse.Namespace, name: str, sparsity: float, seed: int) -> dict[str, Any]:
    """The whole recipe, for the package's own methods: a cell is measured anew when a default has changed."""
    if name in PEERS:
        return {}
    settings = package_settings(args) | {"calibration": Path(args.calibration).name}
    return {"recipe": make_recipe(settings, {} if name == OURS else PAPER, sparsity, seed).as_dict()}


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def measure_method(
    method: Method,
    dense: PreTrainedModel,
    tokens: torch.Tensor,
    seed: int,
    measure: Callable[[PreTrainedModel], dict[str, float]],
) -> Callable[[float], Row]:
    """Prunes and measures at one sparsity after the other.

    What they share is computed at the first; its time counts in every cell, as if each had been pruned alone.
    """
    prepared: list[Any] = []

    def cell(sparsity: float) -> Row:
        start = time.perf_counter()
        if not prepared:
            prepared.append(method.prepare(dense, tokens, seed))
            prepared.append(time.perf_counter() - start)
        prune, shared_seconds = prepared
        start = time.perf_counter()
        result = prune(sparsity)
        seconds = shared_seconds + time.perf_counter() - start
        if abs(result.achieved - sparsity) > FARTHEST_FROM_TARGET:
            log.warning("%s: sparsity %g asked for, %.4f achieved", method.name, sparsity, result.achieved)
        return Row(method.name, sparsity, seed, result.achieved, seconds, measure(result.model))

    return cell


def once(work: Path, stem: str, settings: dict[str, Any], measure: Callable[[], Row] | None) -> Row | None:
    """The row of an earlier run with the same settings, or a new one, or None where none is to be measured."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = work / f"{stem}-{key[:12]}.json"
    if file.exists():
        row, origin = Row(**json.loads(file.read_text())["row"]), "stored"
    elif measure is None:
        return None
    else:
        row, origin = measure(), "measured"
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps({"settings": settings, "row": asdict(row)}, indent=1))
        unfinished.replace(file)
    values = ", ".join(f"{label} {value:.3f}" for label, value in row.perplexity.items())
    print(f"{stem}: {values}; achieved {row.achieved:.4f}, {row.seconds:.1f} s, {origin}", flush=True)
    return row


def write_csv(rows: Sequence[Row], labels: Sequence[str], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "sparsity", "seed", "achieved", "seconds", *(f"perplexity {x}" for x in labels)])
        for row in rows:
            start = (row.method, row.sparsity, row.seed, f"{row.achieved:.6f}", f"{row.seconds:.3f}")
            writer.writerow([*start, *(f"{row.perplexity[x]:.6f}" for x in labels)])


Cells = dict[str, dict[float, list[float]]]


def excesses(rows: Sequence[Row], label: str) -> Cells:
    """Perplexity above dense over seeds, by method and sparsity, on one evaluation text."""
    dense = rows[0].perplexity[label]
    table: Cells = {}
    for row in rows[1:]:
        table.setdefault(row.method, {}).setdefault(row.sparsity, []).append(row.perplexity[label] - dense)
    return table


def markdown(
    args: argparse.Namespace,
    rows: Sequence[Row],
    texts: dict[str, Windows],
    calibration: Windows,
    methods: dict[str, Method],
) -> str:
    """The report for people: command, a table of excess and one of perplexity for each text, seconds, references."""
    sparsities = sorted({row.sparsity for row in rows[1:]})
    chosen = list(dict.fromkeys(row.method for row in rows[1:]))
    seeds = len({row.seed for row in rows[1:]})
    lines = [
        f"    {args.command}",
        "",
        f"{Path(args.model).name}; calibrated on {calibration.description}, {seeds} seed{'s' if seeds > 1 else ''}. "
        "Sparsity is the share of the blocks' linear weights that is removed (for SliceGPT: as many parameters in all, "
        f"its Q matrices included){', mean over seeds ± half the range' if seeds > 1 else ''}. "
        f"{torch.get_num_threads()} threads, {compute_device('auto').type}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}.",
    ]
    head = [" | ".join(["method", *(f"{100 * s:g} %" for s in sparsities)]), "---|" + "---:|" * len(sparsities)]
    header = [f"| {head[0]} |", f"|{head[1]}"]
    for label, windows in texts.items():
        dense, table = rows[0].perplexity[label], excesses(rows, label)
        lines += ["", f"## {label}", "", f"{windows.description}; dense perplexity {dense:.2f}."]
        for title, offset in (("Perplexity above dense:", 0.0), ("Perplexity:", dense)):
            lines += ["", title, "", *header]
            lines += table_lines(table, chosen, sparsities, methods, offset)
            if not offset and OURS in table and len(table) > 1:
                lines.append(ratio_line(table, sparsities, methods))
    lines += ["", "## Time and achieved sparsity", ""]
    lines += ["| method | seconds, median | farthest from the target | source |", "|---|---:|---:|---|"]
    for name in chosen:
        mine = [row for row in rows[1:] if row.method == name]
        seconds = statistics.median(row.seconds for row in mine)
        farthest = max(abs(row.achieved - row.sparsity) for row in mine)
        lines.append(f"| {methods[name].title} | {seconds:.1f} | {farthest:.4f} | {methods[name].reference} |")
    return "\n".join([*lines, "", f"![perplexity above dense]({args.name}.png)", ""])


def table_lines(
    table: Cells, chosen: Sequence[str], sparsities: Sequence[float], methods: dict[str, Method], offset: float
) -> Iterator[str]:
    means = {s: [statistics.mean(curve[s]) for curve in table.values() if s in curve] for s in sparsities}
    for name in chosen:
        entries = []
        for s in sparsities:
            values = table[name].get(s)
            if values is None:
                entries.append("-")
                continue
            mean = statistics.mean(values)
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            text = f"{mean + offset:.2f}{spread}"
            entries.append(f"**{text}**" if mean == min(means[s]) else text)
        yield "| " + " | ".join([methods[name].title, *entries]) + " |"


def ratio_line(table: Cells, sparsities: Sequence[float], methods: dict[str, Method]) -> str:
    """Ours over the best of all others; where that one loses nothing there is no ratio."""
    entries = []
    for s in sparsities:
        others = {name: statistics.mean(curve[s]) for name, curve in table.items() if name != OURS and s in curve}
        if s not in table[OURS] or not others:
            entries.append("-")
            continue
        best = min(others, key=others.__getitem__)
        ratio = f"{statistics.mean(table[OURS][s]) / others[best]:.2f}" if others[best] > 0 else "-"
        entries.append(f"{ratio} ({methods[best].title})")
    return "| " + " | ".join(["ours / best peer", *entries]) + " |"


def redraw(args: argparse.Namespace) -> None:
    """The plot of an earlier run, from its table of cells and the captions in its report."""
    with open(args.output / f"{args.name}.csv", newline="") as file:
        cells = list(csv.DictReader(file))
    labels = [column.removeprefix("perplexity ") for column in cells[0] if column.startswith("perplexity ")]
    rows = [
        Row(
            cell["method"],
            float(cell["sparsity"]),
            int(cell["seed"]),
            float(cell["achieved"]),
            float(cell["seconds"]),
            {label: float(cell[f"perplexity {label}"]) for label in labels},
        )
        for cell in cells
    ]
    sections = (args.output / f"{args.name}.md").read_text().split("\n## ")
    said = {section.splitlines()[0]: section.splitlines()[2].split(";")[0] for section in sections[1:]}
    _, tokenizer = checkpoint.load(args.model, args.dtype)
    captions = {label: said[label] for label in labels}
    plot(rows, captions, all_methods(args, tokenizer), Path(args.model).name, args.output / f"{args.name}.png")


def plot(rows: Sequence[Row], captions: dict[str, str], methods: dict[str, Method], model: str, path: Path) -> None:
    """Excess perplexity over dense, logarithmic above 1, one line a method, one panel a text."""
    panels = []
    for label, caption in captions.items():
        lines = []
        for name, curve in excesses(rows, label).items():
            sparsities = sorted(curve)
            means = [statistics.mean(curve[s]) for s in sparsities]
            lines.append(Line(methods[name].title, [100 * s for s in sparsities], means, emphasised=name == OURS))
        title = f"{model}, {label}\n{caption}, dense {rows[0].perplexity[label]:.2f}"
        x_label = "parameters removed, % of the block-linear ones"
        panels.append(Panel(title, x_label, "perplexity above dense", lines, baseline=0, symlog=True))
    quality_figure(panels, size=(7, 5)).savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
