"""What a setting is worth: perplexity above dense, divergence from it and CPU seconds, on several texts, in one table.

    python benchmarks/ablation.py MODEL --calibration wiki.valid.tokens:0-0.8 --text wiki=wiki.valid.tokens:0.8-1 \
        --text prose=heldout.txt:0.5-1 --sparsities 0.2,0.5 --seeds 0,1 --vary refine=none,auto

A text may be a part of a file, from one share of its characters to another, so that settings are chosen on other parts
than the results are reported on. `--set name=value` changes a field of the recipe for all cells, `--vary name=a,b` adds
a dimension. The dense model is visited once for all cells that it is visited alike for.
"""

import argparse
import csv
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from perplexity import tyro_recipe
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from snp_llm import checkpoint
from snp_llm.checkpoint.journal import Journal
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import evaluation_windows
from snp_llm.models.logits import logits_by_window
from snp_llm.pruning.estimate.estimate import decide
from snp_llm.pruning.pipeline import Visited, cut_once, visit
from snp_llm.pruning.run import Run, read_calibration, resolve
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.device import Clock, compute_device

AFTER_THE_VISIT = ("sparsity", "refine", "dampening", "reference", "reference_weight")  # settings that it does not read


def main() -> None:
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dense, tokenizer = checkpoint.load(args.model, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        calibration = part_of(args.calibration, Path(folder))
        texts = {}
        for name, _, text in (item.partition("=") for item in args.text):
            part = Dataset(part_of(text, Path(folder)))
            found = evaluation_windows(tokenizer, part, seq_len=args.seq_len, max_windows=args.max_windows)
            texts[name] = found.tokens
        fixed = {"model": args.model, "calibration": calibration, "seq_len": str(args.seq_len)}
        fixed |= {"num_samples": str(args.num_samples), **dict(item.split("=", 1) for item in args.set)}
        likelihoods = {name: dense_likelihoods(dense, tokens) for name, tokens in texts.items()}
        varied = {name: values.split(",") for name, values in (item.split("=", 1) for item in args.vary)}
        rows, visited = [], dict[Recipe, tuple[Visited, Tensor, float]]()
        for sparsity, seed, *values in itertools.product(
            args.sparsities.split(","), args.seeds.split(","), *varied.values()
        ):
            cell = dict(zip(varied, values, strict=True))
            recipe = tyro_recipe({**fixed, **cell, "sparsity": sparsity, "seed": seed})
            row = {**cell, "sparsity": float(sparsity), "seed": int(seed)}
            rows.append({**row, **measure(dense, tokenizer, recipe, visited, texts, likelihoods)})
            print(
                ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                flush=True,
            )
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"    python {' '.join(sys.argv)}\n\n{table(rows, list(varied), list(texts))}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE[:FROM-TO]")
    parser.add_argument("--sparsities", default="0.2,0.3,0.5")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=A,B")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ablation.csv"))
    return parser.parse_args()


def part_of(text: str, folder: Path) -> str:
    """The file of a text, or of texts with commas between them, cut out into a folder where only a part is meant."""
    names = []
    for item in text.split(","):
        name, _, part = item.rpartition(":") if not Path(item).exists() else (item, "", "")
        if part:
            begin, end = (float(share) for share in part.split("-"))
            whole = Path(name).read_text()
            file = folder / f"{Path(name).stem}-{part}.txt"
            file.write_text(whole[int(begin * len(whole)) : int(end * len(whole))])
            name = str(file)
        names.append(name)
    return ",".join(names)


def dense_likelihoods(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """Log-probabilities of every next token, by window, in half precision: (T - 1, vocabulary) each."""
    found = logits_by_window(model, tokens, 1, compute_device("auto"))
    return [functional.log_softmax(logits[0, :-1].float(), -1).half() for logits, _ in found]


def measure(
    dense: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    visited: dict[Recipe, tuple[Visited, Tensor, float]],
    texts: dict[str, Tensor],
    likelihoods: dict[str, list[Tensor]],
) -> dict[str, float]:
    """Perplexity above dense, mean divergence and agreement of the likeliest tokens on every text, and CPU seconds."""
    resolved = decide(dense, resolve(recipe, dense, tokenizer))
    run = Run(resolved, Clock(compute_device("auto")), Journal())
    key = replace(recipe, **{name: getattr(Recipe(model="tiny-opt"), name) for name in AFTER_THE_VISIT})
    start = time.process_time()
    if key not in visited:
        windows = read_calibration(tokenizer, resolved, dense)
        found = visit(dense, windows, run.phase("visit"))
        visited[key] = (found, windows.tokens, time.process_time() - start)
        start = time.process_time()
    before, tokens, seconds = visited[key]
    pruned, _ = cut_once(before, tokens, run.phase(f"cut {recipe}"))
    row = {"seconds": seconds + time.process_time() - start, "refining": run.clock.seconds["refinement"]}
    for name, windows in texts.items():
        losses = torch.zeros(4, dtype=torch.float64)  # of the dense model, of the pruned one, divergence, agreement
        passes = logits_by_window(pruned, windows, 1, compute_device("auto"))
        for (logits, window), wanted in zip(passes, likelihoods[name], strict=True):
            here, there, right = functional.log_softmax(logits[0, :-1].float(), -1), wanted.float(), window[0, 1:, None]
            sums = [-there.gather(1, right).sum(), -here.gather(1, right).sum()]
            sums += [(there.exp() * (there - here)).sum(), (here.argmax(1) == there.argmax(1)).sum()]
            losses += torch.stack([s.double().cpu() for s in sums])
        mean = losses / (len(windows) * (windows.shape[1] - 1))
        row[name] = float(mean[1].exp() - mean[0].exp())
        row[f"{name} divergence"], row[f"{name} agreement"] = float(mean[2]), float(mean[3])
    return row


def table(rows: list[dict[str, Any]], names: list[str], texts: list[str]) -> str:
    """Means over seeds of perplexity above dense, divergence and seconds; half the range where there are several."""
    sparsities = sorted({row["sparsity"] for row in rows})
    columns = [f"{text}, {100 * s:g} %" for s in sparsities for text in texts]
    lines = ["| " + " | ".join([*names, *columns, "CPU s", "refining"]) + " |"]
    lines.append("|" + "---|" * len(names) + "---:|" * (len(columns) + 2))
    for key in dict.fromkeys(tuple(row[n] for n in names) for row in rows):
        mine = [row for row in rows if tuple(row[n] for n in names) == key]
        entries = []
        for s, text in itertools.product(sparsities, texts):
            here = [row for row in mine if row["sparsity"] == s]
            values = [row[text] for row in here]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            divergence = 1000 * statistics.mean(row[f"{text} divergence"] for row in here)
            entries.append(f"{statistics.mean(values):.2f}{spread} ({divergence:.1f})")
        entries += [f"{statistics.mean(row[k] for row in mine):.0f}" for k in ("seconds", "refining")]
        lines.append("| " + " | ".join([*key, *entries]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
