"""Depth against width at equal budgets: perplexity, and how many times as fast as the dense model, in one table.

    python benchmarks/depth.py MODEL --calibration wiki.valid.tokens --evaluation wiki.test.raw --sparsities 0.17 0.33
    python benchmarks/depth.py MODEL --calibration wiki.valid.tokens --evaluation wiki.test.raw --latencies 0.9x 0.7x

The model is visited once, and pruned by `--depth never`, `only` and `auto`. Beside them stand its blocks cut out and
nothing repaired: those that `only` takes, and those of block influence and angular distance. Then the dense model
and the pruned ones take turns at prefilling one window and at decoding, and medians of the ratios to the dense model's
neighbouring turn count; blocks cut out are as fast as `only` where they are as many. One seed; calibration and texts
for evaluation, of which there may be several, as of `snp-llm prune`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from snp_llm import checkpoint, perplexity
from snp_llm.checkpoint.journal import Journal
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import evaluation_windows
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.depth import gone_blocks
from snp_llm.models.layouts import assemble
from snp_llm.models.size import model_size
from snp_llm.models.surgery import NoBlock
from snp_llm.pruning.distances import with_distances
from snp_llm.pruning.estimate.estimate import decide
from snp_llm.pruning.pipeline import Visited, cut_once, visit
from snp_llm.pruning.run import Run, read_calibration, resolve
from snp_llm.pruning.widths.latency import read_or_measure
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.runtime.device import Clock, compute_device

NEW_TOKENS, CUT = 24, "cut out"

Row = tuple[str, PreTrainedModel, str]  # its name, the model, and how many blocks, and parts of others, are gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True, nargs="+")
    parser.add_argument("--sparsities", nargs="*", default=[])
    parser.add_argument("--latencies", nargs="*", default=[], help="as of --target-latency")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--refine", default="auto", help="steps, auto or none")
    parser.add_argument("--rounds", type=int, default=9, help="of speeds")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dense, tokenizer = checkpoint.load(args.model, "auto")
    refine = int(args.refine) if args.refine.isdigit() else args.refine
    asked = Recipe(
        args.model, calibration=args.calibration, num_samples=args.num_samples, seq_len=args.seq_len, refine=refine
    )
    recipe = decide(dense, resolve(asked, dense, tokenizer))
    run = Run(replace(recipe, depth="auto"), Clock(compute_device("auto")), Journal())
    windows = read_calibration(tokenizer, recipe, dense)
    visited, tokens = visit(dense, windows, run), windows.tokens
    texts = [
        evaluation_windows(tokenizer, Dataset(text), seq_len=args.seq_len, max_windows=args.max_windows).tokens
        for text in args.evaluation
    ]
    whole, before = model_size(dense, args.seq_len).block_linear, [perplexity(dense, text) for text in texts]
    print(f"    python {' '.join(sys.argv)}\n\ndense: perplexity {' and '.join(f'{p:.2f}' for p in before)}\n")
    rises = " | ".join(f"perplexity of {Path(text).stem} | above dense" for text in args.evaluation)
    print(f"| asked | | removed | blocks gone, and parts of others | {rises} | prefill | decode |")
    print("|" + "---|" * (6 + 2 * len(texts)), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        table = str(Path(scratch) / "latencies.json")
        if args.latencies:  # one for all
            asked = {"target_latency": args.latencies[0], "latency_table": table, "sparsity": None}
            read_or_measure(visited.anatomy, replace(recipe, **asked))
        budgets = [(f"{float(s):.0%}", {"sparsity": float(s)}) for s in args.sparsities]
        budgets += [
            (f"{x} time", {"target_latency": x, "latency_table": table, "sparsity": None}) for x in args.latencies
        ]
        for name, budget in budgets:
            for way, model, gone in pruned_models(visited, tokens, replace(recipe, **budget), run):
                after = [perplexity(model, text) for text in texts]
                removed = 1 - model_size(model, args.seq_len).block_linear / whole
                found = [f"{p:.2f} | {100 * (p / old - 1):.1f} %" for p, old in zip(after, before, strict=True)]
                fast = ["", ""] if way.startswith(CUT) else ratios(dense, model, texts[0][:1], args.rounds)
                print(f"| {name} | {way} | {removed:.3f} | {gone} | {' | '.join(found + fast)} |", flush=True)


def pruned_models(visited: Visited, tokens: torch.Tensor, recipe: ResolvedRecipe, run: Run) -> Iterator[Row]:
    """The model pruned to one budget in every way."""
    anatomy, budget = visited.anatomy, f"{recipe.sparsity}-{recipe.target_latency}"
    inside = [i for i, site in enumerate(anatomy.sites) if not site.whole_block]
    sites = tuple(anatomy.sites[i] for i in inside)
    widths_alone = Visited(replace(anatomy, sites=sites), [visited.curves[i] for i in inside])
    kept_whole = tuple(replace(site, droppable=site.whole_block) for site in anatomy.sites)
    blocks_alone = Visited(replace(anatomy, sites=kept_whole), visited.curves)
    ways = {
        "`--depth never`": ("never", widths_alone),
        "`--depth only`, as `--layout uniform` has it": ("only", blocks_alone),
        "`--depth only`": ("only", visited),
        "`--depth auto`": ("auto", visited),
    }
    for way, (depth, here) in ways.items():
        ours = replace(run.phase(f"{budget} {way}"), recipe=replace(recipe, depth=depth))
        model, results = cut_once(here, tokens, ours)
        left = [(r.site, len(r.kept)) for r in results]
        blocks = gone_blocks(*zip(*left, strict=True))
        parts = [s.kind for s, width in left if not width and not s.whole_block and s.block not in blocks]
        yield way, model, ", ".join([str(len(blocks)), *(f"{parts.count(k)} {k}" for k in dict.fromkeys(parts))])
    anatomy = blocks_alone.anatomy
    for score in ("loss", "influence", "angular"):
        by = replace(recipe, depth="only", depth_score=score)
        curves = [*visited.curves]
        if score != "loss":
            curves = with_distances(curves, anatomy, tokens, replace(run.phase(score), recipe=by))
        gone = gone_blocks(anatomy.sites, Visited(anatomy, curves).widths(by))
        left = [NoBlock() if index in gone else block for index, block in enumerate(find_blocks(anatomy.model))]
        yield f"{CUT}, by {score}", assemble(anatomy.model, anatomy.family, nn.ModuleList(left)), str(len(gone))


@torch.no_grad()
def ratios(dense: PreTrainedModel, model: PreTrainedModel, window: torch.Tensor, rounds: int) -> list[str]:
    """How many times as fast as the dense model another prefills a window, and decodes after 8 tokens."""
    works: list[Callable[[PreTrainedModel], object]] = [
        lambda model: model(window),
        lambda model: model.generate(window[:, :8], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS),
    ]
    both = []
    for work in works:
        turns = []
        for _ in range(rounds + 1):
            times = []
            for one in (dense, model):
                start = time.perf_counter()
                work(one)
                times.append(time.perf_counter() - start)
            turns.append(times[0] / times[1])
        both.append(f"{statistics.median(turns[1:]):.2f}x")
    return both


if __name__ == "__main__":
    main()
