"""Perplexity against sparsity, for every ordering and allocation, in one run: CSV, Markdown table, plot.

    python benchmarks/perplexity.py MODEL --sparsities 0.1,0.2,0.3,0.4,0.5

All cells share the model, the calibration windows of a seed and the evaluation windows. With several seeds a cell is
the mean over them and the CSV has every run. `--set name=value` changes a field of the recipe for all cells, and
`--vary name=a,b` adds a dimension (for instance `--vary absorb_bias=true,false`). `--from-csv` draws part of an earlier
run again, of the orderings and allocations named.
"""

import argparse
import csv
import dataclasses
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, get_type_hints

import transformers
import tyro

from snp_llm import Recipe, checkpoint, perplexity, prune
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import evaluation_windows
from snp_llm.pruning.run import resolve
from snp_llm.report.figures import Line, Panel, quality_figure
from snp_llm.runtime.device import compute_device

ORDERINGS = "zca,saw,variance,residual,obs,greedy,random"


def main() -> None:
    args = parse()
    if args.from_csv:
        redraw(args)
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fixed = dict(item.split("=", 1) for item in args.set)
    base = tyro_recipe({"model": args.model, **fixed})
    dense, tokenizer = checkpoint.load(args.model, base.dtype)
    base = resolve(base, dense)
    windows = evaluation_windows(
        tokenizer,
        Dataset(base.eval_dataset or "wikitext2", base.eval_split, base.text_column),
        seq_len=base.seq_len or 512,
        max_windows=args.max_windows,
    )
    device = compute_device(base.device)

    def measure(model: transformers.PreTrainedModel) -> float:
        return perplexity(model, windows.tokens, batch_size=base.batch_size, device=device)

    dense_perplexity = measure(dense)
    print(f"{args.model}: dense perplexity {dense_perplexity:.3f} on {windows.description}", flush=True)

    varied = {"ordering": args.orderings.split(","), "allocation": args.allocations.split(",")}
    varied |= {name: values.split(",") for name, values in (item.split("=", 1) for item in args.vary)}
    rows: list[dict[str, Any]] = []
    for values in itertools.product(*varied.values()):
        for sparsity, seed in itertools.product(args.sparsities.split(","), args.seeds.split(",")):
            cell = dict(zip(varied, values, strict=True))
            recipe = tyro_recipe({"model": args.model, **fixed, **cell, "sparsity": sparsity, "seed": seed})
            start = time.perf_counter()
            pruned = prune(dense, tokenizer, recipe)
            seconds = time.perf_counter() - start
            kept = sum(len(r.kept) * r.site.cost for r in pruned.sites)
            row = {
                **cell,
                "sparsity": float(sparsity),
                "seed": int(seed),
                "achieved": 1 - kept / sum(r.site.units * r.site.cost for r in pruned.sites),
                "perplexity": measure(pruned.model),
                "dense": dense_perplexity,
                "seconds": seconds,
            }
            rows.append(row)
            name = ", ".join(f"{k} {v}" for k, v in cell.items())
            print(f"{name}, {sparsity}, seed {seed}: {row['perplexity']:.3f} ({seconds:.1f} s)", flush=True)

    args.output.mkdir(parents=True, exist_ok=True)
    with open(args.output / f"{args.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    caption = f"{Path(args.model).name}, dense {dense_perplexity:.2f}; evaluated on {windows.description}"
    table = markdown(rows, list(varied), caption)
    (args.output / f"{args.name}.md").write_text(f"    python {' '.join(sys.argv)}\n\n{table}\n")
    plot(rows, list(varied), caption, args.output / f"{args.name}.png")
    print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sparsities", default="0.1,0.2,0.3,0.4,0.5")
    parser.add_argument("--orderings", default=ORDERINGS)
    parser.add_argument("--allocations", default="uniform,variance")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--max-windows", type=int, default=None)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=A,B")
    parser.add_argument("--from-csv", type=Path)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="perplexity")
    return parser.parse_args()


def redraw(args: argparse.Namespace) -> None:
    """Table and plot of a part of an earlier run."""
    with open(args.from_csv, newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    wanted = set(itertools.product(args.orderings.split(","), args.allocations.split(",")))
    rows = [row for row in rows if (row["ordering"], row["allocation"]) in wanted]
    for row in rows:
        row |= {name: float(row[name]) for name in ("sparsity", "perplexity", "dense")}
    caption = f"{Path(args.model).name}, dense {rows[0]['dense']:.2f}"
    plot(rows, ["ordering", "allocation"], caption, args.output / f"{args.name}.png")
    print(markdown(rows, ["ordering", "allocation"], caption))


def tyro_recipe(values: dict[str, str]) -> Recipe:
    """A recipe from strings, parsed exactly as the command line parses them."""
    hints = get_type_hints(Recipe)
    unknown = set(values) - {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise SystemExit(f"unknown recipe field {sorted(unknown)[0]!r}")
    arguments = [values["model"]]
    for name, value in values.items():
        flag = name.replace("_", "-")
        if hints[name] is bool:
            arguments.append(f"--{flag}" if value == "true" else f"--no-{flag}")
        elif name != "model":
            arguments += [f"--{flag}", value]
    return tyro.cli(Recipe, args=arguments)


def cells(rows: list[dict[str, Any]], names: list[str]) -> dict[tuple[str, ...], dict[float, list[float]]]:
    """Perplexities over seeds, by combination and sparsity."""
    table: dict[tuple[str, ...], dict[float, list[float]]] = {}
    for row in rows:
        curve = table.setdefault(tuple(str(row[n]) for n in names), {})
        curve.setdefault(row["sparsity"], []).append(row["perplexity"])
    return table


def markdown(rows: list[dict[str, Any]], names: list[str], caption: str) -> str:
    """Mean perplexity, with the spread (half of max - min) where there are several seeds."""
    sparsities = sorted({row["sparsity"] for row in rows})
    table = cells(rows, names)
    best = {s: min(statistics.mean(curve[s]) for curve in table.values()) for s in sparsities}
    lines = [
        f"{caption}.",
        "",
        "| " + " | ".join([*names, *(f"{100 * s:g} %" for s in sparsities)]) + " |",
        "|" + "---|" * len(names) + "---:|" * len(sparsities),
    ]
    for key, curve in table.items():
        entries = []
        for s in sparsities:
            mean = statistics.mean(curve[s])
            text = f"{mean:.2f}" + (f" ± {(max(curve[s]) - min(curve[s])) / 2:.2f}" if len(curve[s]) > 1 else "")
            entries.append(f"**{text}**" if mean == best[s] else text)
        lines.append("| " + " | ".join([*key, *entries]) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], names: list[str], caption: str, path: Path) -> None:
    """Excess perplexity over dense, logarithmic above 1, one line a combination, and a panel for each of the last
    setting that varies where more than one does."""
    dense, panels = rows[0]["dense"], dict[str, list[Line]]()
    for key, curve in cells(rows, names).items():
        *first, last = key
        sparsities = sorted(curve)
        excess = [statistics.mean(curve[s]) - dense for s in sparsities]
        line = Line(", ".join(first) if first else last, [100 * s for s in sparsities], excess)
        panels.setdefault(f"{names[-1]} {last}" if first else caption, []).append(line)
    axes = ("block-linear parameters removed, %", "perplexity above dense")
    drawn = [Panel(title, *axes, lines, baseline=0, symlog=True) for title, lines in panels.items()]
    quality_figure(drawn, size=(9 / len(drawn), 4.5)).savefig(path, dpi=150)


if __name__ == "__main__":
    main()
