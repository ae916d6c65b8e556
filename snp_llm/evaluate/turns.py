"""Two models timed in turns, so that drift of the machine cancels, and what their times say. Knows no models."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from snp_llm.runtime.device import synchronize

TOO_NOISY = "too noisy to say"  # in place of a ratio

NOTHING_SEEN = 0.05  # spread of a ratio that hides no difference worth a word


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one model is as another, over passes of both in turns.

    Attributes:
        ratio: median.
        low, high: quartiles.
    """

    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Speeds:
    """How fast a dense and a pruned model are.

    Attributes:
        per_second: tokens or images, at the median of the passes of each.
        ratio: how many times as fast the pruned one is.
    """

    per_second: tuple[float, ...]
    ratio: Ratio


def speeds_of(items: int, times: Sequence[Sequence[float]]) -> Speeds:
    """Speeds from the seconds of each model in every turn, in which it goes through so many items."""
    return Speeds(tuple(items / statistics.median(of_one) for of_one in times), ratio_of(times))


def ratio_of(times: Sequence[Sequence[float]]) -> Ratio:
    """How many times as fast the second of two is, from the seconds of each in every turn."""
    low, middle, high = quartiles([a / b for a, b in zip(*times, strict=True)])
    return Ratio(middle, low, high)


def says_something(ratio: float, low: float, high: float) -> bool:
    """Whether a ratio of speeds is not lost in its spread: the quartiles lie closer together than it is from 1."""
    return high - low <= max(abs(ratio - 1), NOTHING_SEEN)


def speed_words(ratio: float, low: float, high: float) -> str:
    """A ratio of speeds with its spread, for people, where it says something."""
    return f"{ratio:.2f} ({low:.2f} to {high:.2f})" if says_something(ratio, low, high) else TOO_NOISY


def in_turns(passes: Sequence[Callable[[], float]], turns: int) -> list[list[float]]:
    """Seconds of each pass in every turn; each turn starts with another one.

    Args:
        passes: each does something once and returns how many seconds it took.
        turns: how many times each.
    """
    times: list[list[float]] = [[] for _ in passes]
    for turn in range(turns):
        for at in range(len(passes)):
            at = (at + turn) % len(passes)
            times[at].append(passes[at]())
    return times


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that something takes on a device."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
