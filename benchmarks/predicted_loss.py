"""Predicted against measured loss, site by site: where the two disagree, widths are chosen wrongly.

    python benchmarks/predicted_loss.py MODEL --calibration TEXT --evaluation TEXT

One site at a time is cut to each share of its units and repaired, in an otherwise dense model, and the mean negative
log-likelihood on the evaluation text is compared with what the allocation believed before. CSV, a table of ratios, and
a plot with both axes logarithmic.
"""

import argparse
import copy
import csv
import statistics
import sys
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from snp_llm import Recipe, checkpoint, perplexity
from snp_llm.checkpoint.journal import Journal
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import evaluation_windows
from snp_llm.models.site import Site, site_bias, site_weight
from snp_llm.pruning.cut import cut
from snp_llm.pruning.pipeline import Visited, visit
from snp_llm.pruning.run import Run, read_calibration, resolve
from snp_llm.pruning.sensitivity import sum_up
from snp_llm.pruning.statistics import empty_sums, held_out
from snp_llm.pruning.stream import Stream, capture
from snp_llm.report.figures import SitePoint, prediction_figure
from snp_llm.runtime.device import Clock, compute_device
from snp_llm.runtime.signs import Signs


def main() -> None:
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = checkpoint.load(args.model, args.dtype)
    recipe = Recipe(
        model=args.model,
        calibration=args.calibration,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        reference="self",
        round_to=1,
    )
    recipe = resolve(recipe, model)
    texts = evaluation_windows(tokenizer, Dataset(args.evaluation), seq_len=args.seq_len, max_windows=args.max_windows)
    clock = Clock(compute_device("auto"))
    windows = read_calibration(tokenizer, recipe, model)
    run = Run(recipe, clock, Journal(), Signs(step=partial(print, flush=True)))
    visited = visit(model, windows, run)
    stream = capture(visited.anatomy, windows.tokens, run)
    shares = [float(s) for s in args.shares.split(",")]
    rows = measure(visited, stream, texts.tokens, shares, args.every, run)
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / f"{args.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    caption = (
        f"{Path(args.model).name}, {args.num_samples} calibration windows of {args.seq_len} tokens, measured on "
        f"{texts.description}"
    )
    text = markdown(rows, caption)
    (args.output / f"{args.name}.md").write_text(text)
    plot(rows, caption, args.output / f"{args.name}.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--evaluation", default="wikitext2")
    parser.add_argument("--shares", default="0.9,0.7,0.5", help="of its units that a site keeps")
    parser.add_argument("--every", type=int, default=1, help="one block of so many")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="predicted_loss")
    return parser.parse_args()


def measure(
    visited: Visited, stream: Stream, tokens: Tensor, shares: list[float], every: int, run: Run
) -> list[dict[str, Any]]:
    """One row for every site and share: predicted and measured rise of the mean loss."""
    anatomy, recipe, clock = visited.anatomy, run.recipe, run.clock
    model, blocks = anatomy.model, anatomy.blocks

    def mean_loss() -> float:
        return log(perplexity(model, tokens, batch_size=recipe.batch_size, device=clock.device))

    base, rows, held = mean_loss(), [], held_out(stream.total)
    for index, block in enumerate(blocks):
        here = anatomy.sites_of(index)
        weights = [site_weight(block, site) for site in here]
        sums = [
            empty_sums(s.name, W, clock.device, stream.storage, drifting=False, holding_out=True)
            for s, W in zip(here, weights, strict=True)
        ]
        sums = sum_up(block, here, sums, stream.before(index), held, clock)
        for site, W, site_sums in zip(here, weights, sums, strict=True):
            if index % every:
                continue
            curves = visited.curves[anatomy.sites.index(site)]
            assert curves is not None and curves.loss is not None
            found = site_sums.statistics(W, site_bias(block, site), curves.gradient)
            for width in widths(site, shares):
                narrow = copy.deepcopy(block)
                cut(narrow, site, found, width, run)
                blocks[index] = narrow
                rise = mean_loss() - base
                blocks[index] = block
                row = {"site": site.name, "kind": site.kind, "block": index, "width": width, "units": site.units}
                rows.append({**row, "predicted": float(curves.loss[width]), "measured": rise})
                print(", ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def widths(site: Site, shares: list[float]) -> list[int]:
    """Widths at these shares of the units, whole units of every group, each once and never all."""
    found = {max(site.step, round(share * site.units / site.step) * site.step) for share in shares}
    return sorted(w for w in found if w < site.units)


def markdown(rows: list[dict[str, Any]], caption: str) -> str:
    """Measured over predicted, by kind of site and third of the depth."""
    depth = max(row["block"] for row in rows) + 1
    command = [Path(sys.argv[0]).name, *(Path(a).name if "/" in a else a for a in sys.argv[1:])]
    lines = [
        "# Predicted and measured loss",
        "",
        f"    python benchmarks/{' '.join(command)}",
        "",
        f"{caption}. Rise of the mean negative log-likelihood when one site is cut: median of measured over predicted, "
        "and the range of both.",
        "",
        "| sites | count | measured / predicted | predicted | measured |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind in ("attention", "ffn"):
        for third, name in enumerate(("first", "middle", "last")):
            group = [r for r in rows if r["kind"] == kind and r["block"] * 3 // depth == third]
            if not group:
                continue
            ratio = statistics.median(r["measured"] / r["predicted"] for r in group if r["predicted"] > 0)
            ranges = [
                f"{min(r[key] for r in group):.1e} to {max(r[key] for r in group):.1e}"
                for key in ("predicted", "measured")
            ]
            lines.append(f"| {kind}, {name} third | {len(group)} | {ratio:.2f} | {' | '.join(ranges)} |")
    ranked = torch.tensor([[r["predicted"], r["measured"]] for r in rows], dtype=torch.float64).argsort(0).argsort(0)
    correlation = float(torch.corrcoef(ranked.double().T)[0, 1])
    return "\n".join([*lines, "", f"Rank correlation over all {len(rows)} cuts: {correlation:.3f}.", ""])


def plot(rows: list[dict[str, Any]], caption: str, path: Path) -> None:
    """One point a cut; on the line where they agree, below it the prediction was too dark."""
    shown = [row for row in rows if row["measured"] > 0]
    points = [[SitePoint(r["block"], r["kind"], r[key]) for r in shown] for key in ("predicted", "measured")]
    names = ("predicted rise of the mean loss", "measured rise")
    figure = prediction_figure(*points, names=names, size=(6, 4.5))
    said = f"{caption}\n{len(rows) - len(shown)} cuts that lowered the loss have no place here"
    figure.axes[0].set_title(said, fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
