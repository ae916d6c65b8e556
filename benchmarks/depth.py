"""Depth against width at equal parameters: perplexity, and how many times as fast as the dense model, in one table.

    python benchmarks/depth.py MODEL --calibration wiki.valid.tokens --evaluation wiki.test.raw --sparsities 0.17,0.33

The model is pruned by `--depth never`, `only` and `auto`, and once without the repair of what stays: `blocks cut out`.
Then the dense model and the pruned ones take turns at prefilling one window and at decoding, and medians of the ratios
to the dense model's neighbouring turn count. One seed; calibration and evaluation as of `snp-llm prune`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from snp_llm import checkpoint, perplexity, prune
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import evaluation_windows
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.layouts import assemble
from snp_llm.models.size import model_size
from snp_llm.models.surgery import NoBlock
from snp_llm.recipe.recipe import Recipe

ROUNDS, NEW_TOKENS = 9, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--sparsities", default="0.1,0.2,0.3")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--refine", default="auto")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dense, tokenizer = checkpoint.load(args.model, "auto")
    evaluated = evaluation_windows(
        tokenizer, Dataset(args.evaluation), seq_len=args.seq_len, max_windows=args.max_windows
    )
    models: dict[tuple[str, str], tuple[PreTrainedModel, list[int]]] = {}
    for sparsity in args.sparsities.split(","):
        for depth in ("never", "only", "auto"):
            recipe = Recipe(
                model=args.model,
                sparsity=float(sparsity),
                depth=depth,  # type: ignore[arg-type]
                calibration=args.calibration,
                num_samples=args.num_samples,
                seq_len=args.seq_len,
                refine=args.refine,
            )
            found = prune(dense, tokenizer, recipe)
            models[sparsity, f"--depth {depth}"] = found.model, found.gone
            print(f"{sparsity} {depth}: blocks {found.gone} gone", file=sys.stderr, flush=True)
            if depth == "only":
                left = [NoBlock() if i in found.gone else block for i, block in enumerate(find_blocks(dense))]
                cut = assemble(dense, find_anatomy(dense).family, nn.ModuleList(left))
                models[sparsity, "blocks cut out"] = cut, found.gone
    whole = model_size(dense, args.seq_len).block_linear
    before = perplexity(dense, evaluated.tokens)
    print(f"    python {' '.join(sys.argv)}\n\ndense: perplexity {before:.2f}\n")
    print("| asked | | removed | blocks gone | perplexity | above dense | prefill | decode |")
    print("|" + "---|" * 8)
    speeds = ratios(dense, [model for model, _ in models.values()], evaluated.tokens[:1])
    for ((sparsity, name), (model, gone)), (prefill, decode) in zip(models.items(), speeds, strict=True):
        after, removed = perplexity(model, evaluated.tokens), 1 - model_size(model, args.seq_len).block_linear / whole
        print(
            f"| {sparsity} | {name} | {removed:.3f} | {len(gone)} | {after:.2f} | {100 * (after / before - 1):.1f} % "
            f"| {prefill:.2f}x | {decode:.2f}x |",
            flush=True,
        )


@torch.no_grad()
def ratios(dense: PreTrainedModel, models: list[PreTrainedModel], window: torch.Tensor) -> list[tuple[float, float]]:
    """How many times as fast as the dense model each of the others prefills a window and decodes after 8 tokens."""
    works: list[Callable[[PreTrainedModel], object]] = [
        lambda model: model(window),
        lambda model: model.generate(window[:, :8], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS),
    ]
    found = []
    for model in models:
        both = []
        for work in works:
            turns = []
            for _ in range(ROUNDS + 1):
                times = []
                for one in (dense, model):
                    start = time.perf_counter()
                    work(one)
                    times.append(time.perf_counter() - start)
                turns.append(times[0] / times[1])
            both.append(statistics.median(turns[1:]))
        found.append((both[0], both[1]))
    return found


if __name__ == "__main__":
    main()
