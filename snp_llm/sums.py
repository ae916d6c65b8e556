"""Sums of a site over calibration tokens, apart for the windows that are held out. Knows tensors, not blocks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snp_llm import ranks
from snp_llm.linalg.gram import Drift, Moments, add_drift, add_moments, empty_drift, empty_moments
from snp_llm.models.families import Projection, weight_of

HELD_OUT_EVERY = 8  # one window of so many is held out


@dataclass(frozen=True)
class Statistics:
    """What calibration says of a site.

    Attributes:
        moments: of its inputs, all tokens.
        drift: what its output lacks of its target, all tokens; None where the target is its own dense output.
        held_moments, held_drift: the same over the windows that were held out; None without.
        gradient: F, second moment of the loss gradient at its output, a token, (d_out, d_out); None where not needed.
    """

    moments: Moments
    drift: Drift | None = None
    held_moments: Moments | None = None
    held_drift: Drift | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class Sums:
    """Sums of a site over calibration tokens, apart for the windows that are held out.

    Attributes:
        moments, drift: of its inputs, and of what its output lacks (None without targets), over all other windows.
        held_moments, held_drift: over those held out, or None where nothing is chosen by them.
        gradient: moments of the loss gradient at its output, over all windows, or None.
    """

    moments: Moments
    drift: Drift | None
    held_moments: Moments | None
    held_drift: Drift | None
    gradient: Moments | None = None

    def statistics(self, gradient: Tensor | None) -> Statistics:
        """With the held-out windows as part of the whole. Sums in place: these sums are used up."""
        moments, held, drift, held_drift = self.moments, self.held_moments, self.drift, self.held_drift
        if held is None or held.tokens == 0:
            return Statistics(moments, drift, gradient=gradient)
        total = Moments(moments.second.add_(held.second), moments.first.add_(held.first), moments.tokens + held.tokens)
        if drift is not None and held_drift is not None:
            drift = Drift(drift.cross.add_(held_drift.cross), drift.first.add_(held_drift.first))
        return Statistics(total, drift, held, held_drift, gradient)


def empty_sums(
    out: Projection, device: torch.device, *, drifting: bool, holding_out: bool, with_gradient: bool = False
) -> Sums:
    """Sums of no tokens."""
    (d_out, n), dtype = weight_of(out).shape, out.weight.dtype
    return Sums(
        moments=empty_moments(n, dtype, device),
        drift=empty_drift(d_out, n, dtype, device) if drifting else None,
        held_moments=empty_moments(n, dtype, device) if holding_out else None,
        held_drift=empty_drift(d_out, n, dtype, device) if drifting and holding_out else None,
        gradient=empty_moments(d_out, dtype, device) if with_gradient else None,
    )


def add_batch(sums: Sums, inputs: Tensor, lacking: Tensor | None, held: Tensor) -> Sums:
    """Adds a batch, in place, and returns the sums with the new counts.

    Args:
        sums: of the site.
        inputs: of its out-projection, (batch, T, n), or with its windows flattened, as OPT has them.
        lacking: of its output, (batch, T, d_out), or None without targets.
        held: which windows are held out, (batch,), bool.
    """
    held, inputs = held.to(inputs.device), inputs.reshape(len(held), -1, inputs.shape[-1])
    if sums.held_moments is None or not held.any():
        if sums.drift is not None and lacking is not None:
            add_drift(sums.drift, lacking, inputs)
        return replace(sums, moments=add_moments(sums.moments, inputs))
    if sums.drift is not None and sums.held_drift is not None and lacking is not None:
        add_drift(sums.drift, lacking[~held], inputs[~held])
        add_drift(sums.held_drift, lacking[held], inputs[held])
    return replace(
        sums,
        moments=add_moments(sums.moments, inputs[~held]),
        held_moments=add_moments(sums.held_moments, inputs[held]),
    )


def add_gradient(sums: Sums, gradient: Tensor) -> Sums:
    """Adds the loss gradient at the site's output, (..., d_out), in place."""
    assert sums.gradient is not None
    return replace(sums, gradient=add_moments(sums.gradient, gradient))


def over_all_ranks(sums: Sums, held: Tensor, length: int) -> Sums:
    """Sums over the calibration tokens of all ranks, in place.

    Args:
        sums: over this rank's.
        held: which of all calibration windows are held out, (windows,), bool.
        length: tokens in each.
    """
    if ranks.rank_count() == 1:
        return sums
    moments, held_moments = sums.moments, sums.held_moments
    drifts = [d for d in (sums.drift, sums.held_drift) if d is not None]
    parts = [m for m in (moments, held_moments, sums.gradient) if m is not None]
    ranks.add_up([t for m in parts for t in (m.second, m.first)] + [t for d in drifts for t in (d.cross, d.first)])
    apart = int(held.sum()) * length if held_moments is not None else 0
    return replace(
        sums,
        moments=replace(moments, tokens=len(held) * length - apart),
        held_moments=None if held_moments is None else replace(held_moments, tokens=apart),
        gradient=None if sums.gradient is None else replace(sums.gradient, tokens=len(held) * length),
    )


def held_out(count: int, *, one_of: int = HELD_OUT_EVERY) -> Tensor:
    """Which of the calibration windows are held out: one of so many, the last where there are fewer, none of one.

    Returns:
        (count,), bool.
    """
    every = min(one_of, count)
    return torch.arange(count) % every == every - 1 if count > 1 else torch.zeros(count, dtype=torch.bool)
