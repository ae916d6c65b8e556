"""What `snp-llm inspect` and `--dry-run` estimate, beside what a prune really took.

    python benchmarks/estimates.py MODEL --calibration DATA/wiki.valid.tokens

Host memory is the process's peak. That FLOPs are what torch counts is a test of the suite.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from snp_llm import Recipe, checkpoint
from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.pruning import pipeline, run
from snp_llm.pruning.estimate.estimate import estimate
from snp_llm.runtime.device import compute_device, matmul_rates
from snp_llm.runtime.numbers import human_bytes, human_flops, human_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--paper", action="store_true", help="the paper's choices instead of the defaults")
    args = parser.parse_args()
    recipe = Recipe(
        args.model,
        calibration=args.calibration,
        num_samples=args.num_samples,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
    )
    if args.paper:
        recipe = replace(
            recipe,
            ordering="zca",
            allocation="variance",
            metric="error",
            reference="self",
            dampening=0.01,
            refine="none",
        )
    skeleton = load_skeleton(args.model)
    recipe = run.resolve(recipe, skeleton)
    needed = estimate(skeleton, recipe)
    device = compute_device("auto")
    guess = needed.seconds(matmul_rates(device, needed.dtypes))
    model, tokenizer = checkpoint.load(args.model, "auto")
    start = time.perf_counter()
    result = pipeline.prune(model, tokenizer, recipe)
    seconds = time.perf_counter() - start
    print(f"time: estimated {human_time(guess)}, took {human_time(seconds)}")
    rates = matmul_rates(device, needed.dtypes)
    for work in needed.work:
        print(f"  {work.what}: {human_flops(work.flops)}, {replace(needed, work=(work,)).seconds(rates):.1f} s")
    print("  " + ", ".join(f"{phase} {value:.1f} s" for phase, value in result.seconds.items()))
    print(f"host memory: estimated {human_bytes(needed.peak('host'))}, peak {human_bytes(peak_bytes())}")
    for part in needed.parts("host"):
        print(f"  {part.what}: {human_bytes(part.bytes)}")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        print(f"device memory: estimated {human_bytes(needed.peak('device'))}, peak {human_bytes(peak)}")


def peak_bytes() -> int:
    """Most host memory that this process has held."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main()
