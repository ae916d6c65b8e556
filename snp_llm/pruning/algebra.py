"""Where and in which type a site's statistics are factored: on the device if there is room, else on the CPU."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from snp_llm.linalg.gram import Moments, completed
from snp_llm.pruning.statistics import Statistics, moved, with_each
from snp_llm.runtime.device import place_for, trim_host_memory, where_it_fits

T = TypeVar("T")

ALGEBRA_MATRICES = 5  # as large as a Gram matrix are held at most where it is factorised, in float64 if need be

# From so many channels on a site is ordered and factored in float32: half the memory and half the time on a CPU, a
# fraction of it on GPUs that have little float64. Smaller ones cost next to nothing anyway.
SINGLE_PRECISION_FROM = 1024


def with_algebra(name: str, statistics: Statistics, compute: Callable[[Statistics], T]) -> T:
    """What `compute` makes of a site's statistics, on the device where they are if there is room, else on the CPU.

    Args:
        name: of the site.
        statistics: of it; left as they are.
        compute: what factorises them; leaves no trace when it runs out of memory.
    """
    statistics = for_algebra(name, statistics)

    def on(device: torch.device) -> T:
        here = statistics.moments.second.device == device
        return compute(statistics if here else _on_cpu(statistics))

    return where_it_fits(f"{name}: linear algebra", statistics.moments.second.device, on)


def for_algebra(name: str, statistics: Statistics) -> Statistics:
    """Statistics on the device where they are if there is room for factorising them, else on the CPU.

    What the batches before took of host memory is handed back first.
    """
    trim_host_memory()
    device = statistics.moments.second.device

    def whole(place: torch.device) -> Statistics:
        there = statistics if place == device else _on_cpu(statistics)
        found: Statistics = with_each(there, lambda part: completed(part) if isinstance(part, Moments) else part)
        return found

    statistics = where_it_fits(f"{name}: sums", device, whole)
    second = statistics.moments.second
    size = ALGEBRA_MATRICES * second.numel() * algebra_dtype(len(second), second.dtype).itemsize
    here = place_for(name, "algebra", size, second.device) == second.device
    return statistics if here else _on_cpu(statistics)


def _on_cpu(statistics: Statistics) -> Statistics:
    gradient = statistics.gradient
    return replace(moved(statistics), gradient=None if gradient is None else gradient.cpu())


def algebra_dtype(n: int, weights: torch.dtype) -> torch.dtype:
    """The type in which a site of n channels is ordered and factored, unless that solves badly; weights are of a type,
    or sums are."""
    return torch.float32 if n >= SINGLE_PRECISION_FROM and weights != torch.float64 else torch.float64
