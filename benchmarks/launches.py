"""What a prune asks of a GPU, phase by phase, counted without one: operations, answers waited for, bytes sent there.

    PYTHONPATH=. python benchmarks/launches.py opt-7m --num-samples 16 --seq-len 256

The run is placed on the simulated device of the test suite, so all of it is computed on the CPU. An operation of torch
counts as one, whether it is one kernel on a GPU, several (a sort, a factor) or a library's call. What the host asks for
without an operation on the device's tensors, numbers in a row for instance, is not seen.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from snp_llm import Recipe, checkpoint, prune
from snp_llm.runtime.device import Clock
from tests.rehearsal import Device, rehearsed

COUNTED = ("kernels", "waits", "uploaded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or tiny-opt")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--refine", default="none")
    args = parser.parse_args()
    recipe = Recipe(device="cuda", calibration="bundled", **vars(args))
    dense, tokenizer = checkpoint.load(args.model, "auto")
    with rehearsed("cuda") as gpu, by_phase(gpu) as counts:
        prune(dense, tokenizer, recipe)
    print(f"{Path(args.model).name}, {args.num_samples} windows of {args.seq_len} tokens, refine {args.refine}\n")
    print("| | operations | waited for | MB sent |\n|---|---:|---:|---:|")
    for name, count in counts.items():
        print(f"| {name} | {count['kernels']:,} | {count['waits']:,} | {count['uploaded'] / 1e6:.1f} |")


@contextmanager
def by_phase(gpu: Device) -> Iterator[dict[str, Counter]]:
    """Counts of what happens on the device in each phase of the clock, those of a phase within another apart."""
    counts: dict[str, Counter] = defaultdict(Counter)
    known, timed, on = Counter(), Clock.phase, ["no phase"]

    def settle() -> None:
        now = Counter(kernels=gpu.kernels, waits=gpu.waits, uploaded=sum(gpu.uploads.values()))
        for what in COUNTED:
            counts[on[-1]][what] += now[what] - known[what]
        known.update({what: now[what] - known[what] for what in COUNTED})

    @contextmanager
    def phase(clock: Clock, name: str) -> Iterator[None]:
        settle()
        on.append(name)
        with timed(clock, name):
            yield
        settle()
        on.pop()

    with mock.patch.object(Clock, "phase", phase):
        yield counts
        settle()


if __name__ == "__main__":
    main()
