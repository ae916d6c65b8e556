"""What pruning costs: seconds by phase, over the time of one dense forward pass on the same tokens, and peak memory.

    python benchmarks/cost.py MODEL --num-samples 128 --seq-len 512

Forward pass and pruning take turns in one process, so that drift of the machine cancels in the ratio. Loading and
evaluation are apart. Peak memory is the resident set, sampled every 5 ms.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import transformers

from snp_llm import Recipe, checkpoint, prune
from snp_llm.device import compute_device, synchronize
from snp_llm.pipeline import read_calibration, resolve

# What no gradients are needed for, with the default's ordering, and with the paper's.
PLAIN = {"allocation": "variance", "metric": "error", "target": "self", "dampening": 0.1}
CHOICES: dict[str, dict[str, Any]] = {"default": {}, "plain": PLAIN, "paper": {**PLAIN, "ordering": "zca"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--choices", default=",".join(CHOICES), help="rows of the table")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    imported = resident()
    dense, tokenizer = checkpoint.load(args.model, "auto")
    loaded = resident()
    recipe = Recipe(
        model=args.model,
        sparsity=args.sparsity,
        calibration=args.calibration,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
    )
    windows = read_calibration(tokenizer, resolve(recipe, dense), dense)
    device = compute_device(recipe.device)
    print(f"    python {' '.join(sys.argv)}\n")
    print(
        f"{args.model}: {windows.tokens.numel():,} tokens, batches of {args.batch_size}, sparsity {args.sparsity:g}, "
        f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians of {args.repeats}.\n"
    )
    columns = ("choices", "forward, s", "prune, s", "ratio")
    phases = ("calibration", "linear algebra", "surgery")
    memory = ("peak forward, MB", "peak prune, MB")
    print("| " + " | ".join((*columns, *phases, *memory)) + " |")
    print("|---|" + "---:|" * 8)
    for name in args.choices.split(","):
        chosen = Recipe(**{**recipe.as_dict(), **CHOICES[name]})
        forwards, prunes, shares = [], [], []
        peaks = [0.0, 0.0]
        for repeat in range(1 + args.repeats):  # the first is a warm-up
            with sampled_peak() as peak:
                seconds = forward_seconds(dense, windows.tokens, args.batch_size, device)
            forward_peak = peak[0]
            with sampled_peak() as peak:
                start = time.perf_counter()
                pruned = prune(dense, tokenizer, chosen)
                elapsed = time.perf_counter() - start
            if repeat:
                forwards.append(seconds)
                prunes.append(elapsed)
                shares.append(pruned.seconds)
                peaks = [max(peaks[0], forward_peak), max(peaks[1], peak[0])]
        ratio = statistics.median(p / f for p, f in zip(prunes, forwards, strict=True))
        figures = [statistics.median(forwards), statistics.median(prunes), ratio]
        figures += [statistics.median(s[phase] for s in shares) for phase in phases]
        cells = [name, *(f"{x:.2f}" for x in figures), *(f"{x:.0f}" for x in peaks)]
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\nResident before loading the model {imported:.0f} MB, after {loaded:.0f} MB.")


@torch.no_grad()
def forward_seconds(
    model: transformers.PreTrainedModel, tokens: torch.Tensor, batch_size: int, device: torch.device
) -> float:
    """One plain forward pass over all tokens."""
    model.to(device)
    start = time.perf_counter()
    for batch in tokens.split(batch_size):
        model(batch.to(device), use_cache=False)
    synchronize(device)
    return time.perf_counter() - start


def resident() -> float:
    return psutil.Process().memory_info().rss / 1e6


@contextmanager
def sampled_peak() -> Iterator[list[float]]:
    """The largest resident set while the context lasts, MB, in the list's only element."""
    peak, done = [resident()], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
