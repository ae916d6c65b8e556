"""Predicted loss against measured divergence, site by site: where the two disagree, widths are chosen wrongly.

    python benchmarks/predicted_loss.py MODEL --calibration TEXT

What the allocation corrects its predictions by, with more cuts of every site: each alone is cut to some of its units
and repaired in the dense model, and the mean divergence of the next token from the dense model's, on held-out
calibration windows, is compared with what was predicted. CSV, a table of ratios, and a plot with both axes logarithmic.
"""

import argparse
import csv
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from snp_llm import Recipe, checkpoint
from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import find_anatomy
from snp_llm.pruning.run import Run, read_calibration, resolve
from snp_llm.pruning.sensitivity import visit_dense
from snp_llm.report.figures import SitePoint, prediction_figure
from snp_llm.runtime.device import Clock, compute_device


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
        round_to=1,
        measured_cuts=args.cuts,
    )
    recipe = resolve(recipe, model)
    windows = read_calibration(tokenizer, recipe, model)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, Clock(compute_device("auto")), Journal(Path(folder)))
        anatomy = find_anatomy(model)
        visit_dense(anatomy, windows.tokens, run)
        predicted, measured = (run.journal.phase(name) for name in ("curves", "measured"))
        rows: list[dict[str, Any]] = []
        for site in anatomy.sites:
            loss, cuts = predicted.get(site.block, f"{site.path} loss"), measured.get(0, site.name)
            assert loss is not None and cuts is not None
            for width, divergence in cuts.tolist():
                row = {"site": site.name, "kind": site.kind, "block": site.block, "width": int(width)}
                row |= {"units": site.units, "predicted": float(loss[int(width)]), "measured": divergence}
                rows.append(row)
    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / f"{args.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    caption = f"{Path(args.model).name}, {windows.description}"
    text = markdown(rows, caption)
    (args.output / f"{args.name}.md").write_text(text)
    plot(rows, caption, args.output / f"{args.name}.png")
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--cuts", type=int, default=3, help="of every site")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="predicted_loss")
    return parser.parse_args()


def markdown(rows: list[dict[str, Any]], caption: str) -> str:
    """Measured over predicted, by kind of site and third of the depth."""
    depth = max(row["block"] for row in rows) + 1
    command = [Path(sys.argv[0]).name, *(Path(a).name if "/" in a else a for a in sys.argv[1:])]
    lines = [
        "# Predicted and measured loss",
        "",
        f"    python benchmarks/{' '.join(command)}",
        "",
        f"{caption}. Mean divergence from the dense model when one site is cut, in nats: median of measured over "
        "predicted, and the range of both.",
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
    shown = [row for row in rows if row["measured"] > 0 and row["predicted"] > 0]
    points = [[SitePoint(r["block"], r["kind"], r[key]) for r in shown] for key in ("predicted", "measured")]
    names = ("predicted rise of the mean loss", "measured divergence")
    figure = prediction_figure(*points, names=names, size=(6, 4.5))
    figure.axes[0].set_title(caption, fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
