"""How far a pruned model's logits are from the dense one's, all of these or the largest. Pure torch."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AT_A_TIME = 2**21  # logits of a piece: what a cache holds in float32


@dataclass(frozen=True)
class Targets:
    """What the dense model says.

    Attributes:
        chances: logarithms of probabilities, (..., classes); with `largest` those of these classes, and of all others
            together in the last place, (..., K + 1).
        largest: numbers of the K likeliest classes, (..., K), int64; None: all.
        hidden: states between its blocks, (windows, T, d) each; empty where they do not count.
    """

    chances: Tensor
    largest: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()


def all_of(logits: Tensor, hidden: tuple[Tensor, ...] = ()) -> Targets:
    """What logits, (..., classes), say of every class."""
    return Targets(logits.float().log_softmax(-1), hidden=hidden)


def largest_of(logits: Tensor, count: int) -> Targets:
    """What logits, (..., classes), say of the `count` likeliest classes, fewer than all, and of the rest together."""
    numbers = logits.topk(count, -1).indices
    return Targets(_gathered(logits, numbers), numbers)


def _gathered(logits: Tensor, numbers: Tensor) -> Tensor:
    """Logarithms of probabilities of some classes, and of all others together, (..., K + 1)."""
    logits = logits.float()
    rest = logits.scatter(-1, numbers, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, numbers), rest], -1) - logits.logsumexp(-1, keepdim=True)


def divergence(targets: Targets, logits: Tensor) -> Tensor:
    """KL divergence ``sum p (log p - log q)`` of the dense model's p from the pruned one's q, summed over positions.

    Over the largest classes and the rest together it is at most that over all classes (data processing inequality), and
    equal to it where a single class is the rest.

    Args:
        targets: p.
        logits: of q, (..., classes).

    Returns:
        Nats, a float32 scalar.
    """
    if targets.largest is None:
        found: Tensor = _OfAll.apply(targets.chances, logits)
        return found
    return (targets.chances.exp() * (targets.chances - _gathered(logits, targets.largest))).sum()


class _OfAll(torch.autograd.Function):
    """The divergence over all classes, some positions at a time, with its gradient ``q - p``: logits of many positions
    are the largest tensors of a training, and what autograd keeps of them is several times that."""

    @staticmethod
    def forward(ctx: Any, chances: Tensor, logits: Tensor) -> Tensor:
        wanted, found = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (chances, logits))
        total, slope = chances.new_zeros(()), torch.empty_like(found) if ctx.needs_input_grad[1] else None
        step = max(AT_A_TIME // found.shape[-1], 1)
        for at in range(0, len(found), step):
            given = wanted[at : at + step]
            own, weights = found[at : at + step].float().log_softmax(-1), given.exp()
            total += (given - own).mul_(weights).sum()
            if slope is not None:
                slope[at : at + step] = own.exp_().sub_(weights)
        if slope is not None:
            ctx.save_for_backward(slope.view_as(logits))
        return total

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[None, Tensor]:
        return None, ctx.saved_tensors[0] * given[0]


def hidden_difference(targets: Targets, hidden: tuple[Tensor, ...]) -> Tensor:
    """``|h - d|² / |d|²`` of hidden states h and the dense model's d at a position, mean over the states between
    blocks, summed over positions; a float32 scalar."""
    pairs = [(h.float(), d.float()) for h, d in zip(hidden, targets.hidden, strict=True)]
    parts = [((h - d).square().sum(-1) / d.square().sum(-1).clamp(min=1e-12)).sum() for h, d in pairs]
    return torch.stack(parts).mean()
