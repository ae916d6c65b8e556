"""Perplexity against sparsity and against measured speed: the picture in the README.

    python benchmarks/speed.py MODEL --calibration wiki.valid.tokens --evaluation wiki.test.raw --beside peers-MODEL.csv

Methods of peers/ prune to several sparsities on the same tokens. Then each pruned model and the dense one take turns at
prefill, and what counts is the ratio of neighbours, so that whatever else the machine does cancels. Writes a CSV with
every cell, a Markdown table and a plot; `--beside`, the table of cells of benchmarks/peers.py, has more methods and
seeds for the plot's left half. `--redraw` only plots, from an earlier run's CSV.
"""

import argparse
import csv
import itertools
import logging
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peers import NAMES, PEERS, make_methods
from peers import report as peers_report
from peers.snp import OURS
from transformers import PreTrainedModel

from snp_llm import checkpoint, perplexity
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import calibration_windows, evaluation_windows
from snp_llm.evaluate.cells import Cell
from snp_llm.evaluate.speed import random_tokens, seconds_of
from snp_llm.evaluate.turns import quartiles
from snp_llm.report.figures import Line, Panel, quality_figure
from snp_llm.runtime.device import compute_device

TITLES = {method.name: method.title for method in PEERS.values()} | {"snp": "SNP as in the paper", OURS: OURS}


@dataclass(frozen=True)
class Row:
    """One pruned model; `dense` is the perplexity before, `speed` how many times as fast as before, with quartiles."""

    method: str
    sparsity: float
    achieved: float
    perplexity: float
    dense: float
    speed: float
    speed_low: float
    speed_high: float


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.basicConfig(format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name}.csv"
    if not args.redraw:
        rows, conditions = run(args)
        write_csv(rows, path)
        text = markdown(rows, conditions)
        path.with_suffix(".md").write_text(text)
        print(text)
    plot(read_csv(path), args.beside, args.text, path.with_suffix(".png"))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or local folder")
    parser.add_argument("--calibration", default="wikitext2", help="as for snp-llm prune")
    parser.add_argument("--evaluation", default="wikitext2", help="as for snp-llm eval")
    parser.add_argument("--methods", default="flap,slicegpt,osscar,snp,ours", help=f"of {','.join(NAMES)}, ours")
    parser.add_argument("--sparsities", default="0.1,0.2,0.3,0.4,0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256, help="of calibration, evaluation and prefill")
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=8, help="prefilled at a time")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each model beside the dense one")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--beside", type=Path, default=None, metavar="CSV", help="cells of benchmarks/peers.py")
    parser.add_argument("--text", default="evaluation wikitext", help="of --beside")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="speed")
    parser.add_argument("--redraw", action="store_true")
    args = parser.parse_args(arguments)
    args.methods = args.methods.split(",")
    args.sparsities = [float(value) for value in args.sparsities.split(",")]
    if unknown := [name for name in args.methods if name not in (*NAMES, OURS)]:
        parser.error(f"unknown method {unknown[0]!r}; expected some of {', '.join(NAMES)}, ours")
    return args


def run(args: argparse.Namespace) -> tuple[list[Row], str]:
    """All cells, and in one line what they were measured on. Pruning comes first: it would disturb the clock."""
    dense, tokenizer = checkpoint.load(args.model, args.dtype)
    evaluation = Dataset(args.evaluation)
    text = evaluation_windows(tokenizer, evaluation, seq_len=args.seq_len, max_windows=args.max_windows)
    draw = {"num_samples": args.num_samples, "seq_len": args.seq_len, "seed": args.seed}
    calibration = calibration_windows(tokenizer, Dataset(args.calibration), **draw)
    settings: dict[str, Any] = {
        "model": Path(args.model).name,
        "calibration": args.calibration,
        "num_samples": args.num_samples,
        "seq_len": args.seq_len,
    }
    methods = PEERS | {method.name: method for method in make_methods(tokenizer, settings, {OURS: {}})}
    device = compute_device("auto")
    before = perplexity(dense, text.tokens, device=device)
    pruned = []
    for name in args.methods:
        prune = methods[name].prepare(dense, calibration.tokens, args.seed)
        for sparsity in args.sparsities:
            result = prune(sparsity)
            pruned.append((name, sparsity, result, perplexity(result.model, text.tokens, device=device)))
            print(f"{name}, {sparsity}: {pruned[-1][-1]:.3f}", flush=True)
    cell = Cell("prefill", args.prompts, args.seq_len, 0)
    rows = []
    for name, sparsity, result, after in pruned:
        low, middle, high = speed_up(dense.to(device), result.model.to(device), cell, args.repeats)
        rows.append(Row(name, sparsity, result.achieved, after, before, middle, low, high))
        print(f"{name}, {sparsity}: {middle:.2f} times as fast ({low:.2f} to {high:.2f})", flush=True)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    conditions = (
        f"{Path(args.model).name}, dense {before:.2f}; calibrated on {calibration.description}; perplexity on "
        f"{text.description}. Prefill of {args.prompts} x {args.seq_len} tokens, {args.repeats} turns: median of dense "
        f"over pruned time, with its quartiles; {device.type}{threads}, "
        f"{str(dense.dtype).removeprefix('torch.')}, eager, torch {torch.__version__}."
    )
    return rows, conditions


def speed_up(dense: PreTrainedModel, pruned: PreTrainedModel, cell: Cell, repeats: int) -> tuple[float, float, float]:
    """Quartiles of dense over pruned time, the two taking turns."""
    device = next(dense.parameters()).device
    tokens = random_tokens(dense, cell, device)
    pair = (dense, pruned)
    for model in pair:  # warms up
        seconds_of(model, tokens, cell, device)
    ratios = []
    for turn in range(repeats):
        seconds = {at: seconds_of(pair[at], tokens, cell, device) for at in ((0, 1) if turn % 2 == 0 else (1, 0))}
        ratios.append(seconds[0] / seconds[1])
    return quartiles(ratios)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__dataclass_fields__)
        for row in rows:
            writer.writerow(value if isinstance(value, str) else f"{value:.6g}" for value in vars(row).values())


def read_csv(path: Path) -> list[Row]:
    with open(path, newline="") as file:
        cells = [*csv.DictReader(file)]
    return [Row(cell.pop("method"), **{name: float(value) for name, value in cell.items()}) for cell in cells]


def markdown(rows: Sequence[Row], conditions: str) -> str:
    """Perplexity above dense, and speed with its quartiles, by method and sparsity."""
    sparsities = sorted({row.sparsity for row in rows})
    lines = [conditions]
    for title, show in (
        ("perplexity above dense", lambda r: f"{r.perplexity - r.dense:.2f}"),
        ("times as fast", lambda r: f"{r.speed:.2f} ({r.speed_low:.2f} to {r.speed_high:.2f})"),
    ):
        lines += ["", f"| {title} | " + " | ".join(f"{100 * s:g} %" for s in sparsities) + " |"]
        lines.append("|---|" + "---:|" * len(sparsities))
        for name, own in itertools.groupby(rows, key=lambda row: row.method):
            shown = {row.sparsity: show(row) for row in own}
            lines.append(f"| {TITLES[name]} | " + " | ".join(shown[s] for s in sparsities) + " |")
    return "\n".join([*lines, ""])


def plot(rows: Sequence[Row], beside: Path | None, text: str, path: Path) -> None:
    """Perplexity above dense against what is gone and against what is gained, at the width of a README."""
    cells = cells_of(rows) if beside is None else cells_beside(beside, text)
    by_sparsity = []
    for name in cells:
        sparsities = sorted(cells[name])
        means = [statistics.mean(cells[name][s]) for s in sparsities]
        by_sparsity.append(Line(TITLES.get(name, name), [100 * s for s in sparsities], means, emphasised=name == OURS))
    by_speed = [
        Line(TITLES[name], *zip(*((r.speed, r.perplexity - r.dense) for r in own), strict=True), name == OURS)
        for name, own in ((n, [r for r in rows if r.method == n]) for n in dict.fromkeys(r.method for r in rows))
    ]
    excess = "perplexity above dense"
    panels = [
        Panel("", "parameters removed, % of the block-linear ones", excess, by_sparsity, baseline=0, symlog=True),
        Panel("", "prefill speed, dense = 1", excess, by_speed, baseline=0, symlog=True),
    ]
    quality_figure(panels, size=(4.5, 4.8)).savefig(path, dpi=200)


def cells_of(rows: Sequence[Row]) -> dict[str, dict[float, list[float]]]:
    """Perplexities above dense, by method and sparsity."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(row.method, {}).setdefault(row.sparsity, []).append(row.perplexity - row.dense)
    return found


def cells_beside(path: Path, text: str) -> dict[str, dict[float, list[float]]]:
    """Perplexities above dense, by family and sparsity, of the settings that count in a table of peers.py."""
    (dense, *rows), _ = peers_report.read_csv(path)
    return {
        family: {
            s: [row.quality[text].perplexity - dense.quality[text].perplexity for row in found]
            for s, found in curve.items()
            if not any(row.failed for row in found)
        }
        for family, curve in peers_report.choose(rows).items()
    }


if __name__ == "__main__":
    sys.exit(main())
