"""When what is trained on, and how fast: order of windows, learning rate, how much of the budget is used up."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Budget:
    """How long a training is; at least one of both is there.

    Attributes:
        items: tokens or images.
        seconds: of training.
    """

    items: int | None
    seconds: float | None

    def used(self, items: int, seconds: float) -> float:
        """The share of it that is used up, from 0 to 1."""
        shares = [items / self.items] if self.items else []
        shares += [seconds / self.seconds] if self.seconds else []
        return min(max(shares), 1.0)


@dataclass(frozen=True)
class Order:
    """Windows in the order in which they are trained on: all of them drawn anew, again and again.

    Attributes:
        count: how many there are.
        batch: so many a step; all of them, where there are fewer.
        seed: of the draws.
    """

    count: int
    batch: int
    seed: int

    def at(self, step: int) -> list[int]:
        """Numbers of the windows of a step."""
        batch = min(self.batch, self.count)
        round, place = divmod(step, self.count // batch)
        generator = torch.Generator().manual_seed(self.seed + round)
        chosen: list[int] = torch.randperm(self.count, generator=generator)[
            place * batch : (place + 1) * batch
        ].tolist()
        return chosen


def rate(used: float, highest: float, warmup: float) -> float:
    """The learning rate at a share of the budget: a line up to the highest, then half a cosine down to 0."""
    if used < warmup:
        return highest * max(used, warmup / 100) / warmup
    return highest * (1 + math.cos(math.pi * (used - warmup) / (1 - warmup))) / 2
