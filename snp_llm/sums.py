"""Sums of a site over calibration tokens, apart for the windows that are held out. Knows tensors, not blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snp_llm.linalg.gram import Drift, Moments, add_drift, add_moments, empty_drift
from snp_llm.models.families import Projection, weight_of
from snp_llm.stream import moments_for

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
    """

    moments: Moments
    drift: Drift | None
    held_moments: Moments | None
    held_drift: Drift | None

    def statistics(self, gradient: Tensor | None) -> Statistics:
        """With the held-out windows as part of the whole. Sums in place: these sums are used up."""
        moments, held, drift, held_drift = self.moments, self.held_moments, self.drift, self.held_drift
        if held is None or held.tokens == 0:
            return Statistics(moments, drift, gradient=gradient)
        total = Moments(moments.second.add_(held.second), moments.first.add_(held.first), moments.tokens + held.tokens)
        if drift is not None and held_drift is not None:
            drift = Drift(drift.cross.add_(held_drift.cross), drift.first.add_(held_drift.first))
        return Statistics(total, drift, held, held_drift, gradient)


def empty_sums(out: Projection, device: torch.device, *, drifting: bool, holding_out: bool) -> Sums:
    """Sums of no tokens."""
    (d_out, n), dtype = weight_of(out).shape, out.weight.dtype
    return Sums(
        moments=moments_for(out, device),
        drift=empty_drift(d_out, n, dtype, device) if drifting else None,
        held_moments=moments_for(out, device) if holding_out else None,
        held_drift=empty_drift(d_out, n, dtype, device) if drifting and holding_out else None,
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


def held_out(hidden: Sequence[Tensor], at: int, *, one_of: int = HELD_OUT_EVERY) -> Tensor:
    """Which windows of a batch are held out: one of so many, the last where there are fewer, none of one."""
    before = sum(len(batch) for batch in hidden[:at])
    count = sum(len(batch) for batch in hidden)
    positions = torch.arange(before, before + len(hidden[at]))
    every = min(one_of, count)
    return (positions % every == every - 1) if count > 1 else torch.zeros(len(hidden[at]), dtype=torch.bool)
