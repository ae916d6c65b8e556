"""Sums of a site over calibration tokens, apart for the windows that are held out. Knows tensors, not blocks."""

import logging
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from snp_llm import ranks
from snp_llm.device import has_room
from snp_llm.linalg.gram import (
    Drift,
    Moments,
    TargetSums,
    add_moments,
    add_target,
    completed,
    drift_from,
    empty_moments,
    empty_target_sums,
)
from snp_llm.models.families import Projection, weight_of
from snp_llm.shelf import Files, Shelf

ALGEBRA_MATRICES = 5  # as large as a Gram matrix are held at most where it is factorised, in float64 if need be
# From so many channels on a site is ordered and factored in float32: half the memory and half the time on a CPU, a
# fraction of it on GPUs that have little float64. Smaller ones cost next to nothing anyway.
SINGLE_PRECISION_FROM = 1024
FILES_FROM = 4096  # channels, from which on sums are worth a file
HELD_OUT_EVERY = 8  # one window of so many is held out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """What calibration says of a site.

    Attributes:
        moments: of its inputs, all tokens.
        drift: what its output lacks of its target, all tokens; None where the target is its own dense output.
        held_moments, held_drift: the same over the windows that were held out; None without.
        gradient: F, second moment of the loss gradient at its output, a token, (d_out, d_out); None where not needed.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    moments: Moments
    drift: Drift | None = None
    held_moments: Moments | None = None
    held_drift: Drift | None = None
    gradient: Tensor | None = None
    files: Files = ()


@dataclass(frozen=True)
class Sums:
    """Sums of a site over calibration tokens, apart for the windows that are held out.

    Attributes:
        moments, targets: of its inputs, and of what it should put out (None without targets), over all other windows.
        held_moments, held_targets: over those held out, or None where nothing is chosen by them.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    moments: Moments
    targets: TargetSums | None
    held_moments: Moments | None
    held_targets: TargetSums | None
    files: Files = ()

    @torch.no_grad()
    def statistics(self, out: Projection, gradient: Tensor | None) -> Statistics:
        """With the held-out windows as part of the whole. Sums in place: these sums are used up.

        Args:
            out: the site's out-projection, as it was while the sums were made.
            gradient: F, or None where not needed.
        """

        def lacking(targets: TargetSums | None, over: Moments) -> Drift | None:
            return None if targets is None else drift_from(targets, over, weight_of(out), out.bias)

        moments, held, targets, held_targets = self.moments, self.held_moments, self.targets, self.held_targets
        if held is None or held.tokens == 0:
            moments = completed(moments)
            return Statistics(moments, lacking(targets, moments), gradient=gradient, files=self.files)
        total = Moments(moments.second.add_(held.second), moments.first.add_(held.first), moments.tokens + held.tokens)
        total, held = completed(total), completed(held)
        if targets is not None and held_targets is not None:
            targets = TargetSums(targets.cross.add_(held_targets.cross), targets.first.add_(held_targets.first))
        return Statistics(total, lacking(targets, total), held, lacking(held_targets, held), gradient, self.files)


def empty_sums(
    name: str,
    out: Projection,
    device: torch.device,
    shelf: Shelf,
    *,
    drifting: bool,
    holding_out: bool,
) -> Sums:
    """Sums of no tokens, on the device if there is room for them, else on the CPU.

    Where a shelf in files is asked for and the CPU is to sum, the matrices of wide sites are on it.

    Args:
        name: of the site.
        out: its out-projection.
        device: where its inputs are.
        shelf: for what does not have to be in memory all the time.
        drifting: whether there is a target that its output may lack something of.
        holding_out: whether sums over held-out windows are kept apart.
    """
    (d_out, n), dtype = weight_of(out).shape, out.weight.dtype
    entries = (1 + holding_out) * (n * (n + 1) + drifting * d_out * (n + 1))
    device = _where(name, "sums", entries * torch.promote_types(dtype, torch.float32).itemsize, device)
    sums = Sums(
        moments=empty_moments(n, dtype, device),
        targets=empty_target_sums(d_out, n, dtype, device) if drifting else None,
        held_moments=empty_moments(n, dtype, device) if holding_out else None,
        held_targets=empty_target_sums(d_out, n, dtype, device) if drifting and holding_out else None,
    )
    in_files = shelf.device is None and device.type == "cpu" and n >= FILES_FROM
    return _in_files(sums, shelf) if in_files else sums


def _in_files(sums: Sums, shelf: Shelf) -> Sums:
    """The same sums of no tokens, those over pairs of channels in files."""
    files = []

    def moved(part: Moments | TargetSums | None, name: str) -> Any:
        if part is None:
            return None
        matrix = getattr(part, name)
        tensor, pages = shelf.file(*matrix.shape, dtype=matrix.dtype)
        files.append(pages)
        filed: dict[str, Any] = {name: tensor}
        return replace(part, **filed)

    return replace(
        sums,
        moments=moved(sums.moments, "second"),
        targets=moved(sums.targets, "cross"),
        held_moments=moved(sums.held_moments, "second"),
        held_targets=moved(sums.held_targets, "cross"),
        files=files,
    )


def add_batch(sums: Sums, inputs: Tensor, target: Tensor | None, held: Tensor) -> Sums:
    """Adds a batch, in place, and returns the sums with the new counts.

    Args:
        sums: of the site.
        inputs: of its out-projection, (batch, T, n), or with its windows flattened, as OPT has them.
        target: of its output, (batch, T, d_out), or None without targets.
        held: which windows are held out, (batch,), bool.
    """
    device = sums.moments.second.device
    held, inputs = held.to(device), inputs.to(device).reshape(len(held), -1, inputs.shape[-1])
    target = None if target is None else target.to(device)
    if sums.held_moments is None or not held.any():
        if sums.targets is not None and target is not None:
            add_target(sums.targets, target, inputs)
        return replace(sums, moments=add_moments(sums.moments, inputs))
    if sums.targets is not None and sums.held_targets is not None and target is not None:
        add_target(sums.targets, target[~held], inputs[~held])
        add_target(sums.held_targets, target[held], inputs[held])
    return replace(
        sums,
        moments=add_moments(sums.moments, inputs[~held]),
        held_moments=add_moments(sums.held_moments, inputs[held]),
    )


def for_algebra(name: str, statistics: Statistics) -> Statistics:
    """Statistics on the device where they are if there is room for factorising them, else on the CPU."""
    statistics = replace(
        statistics,
        moments=completed(statistics.moments),
        held_moments=None if statistics.held_moments is None else completed(statistics.held_moments),
    )
    second = statistics.moments.second
    wide = 4 if len(second) >= SINGLE_PRECISION_FROM and second.dtype == torch.float32 else 8
    if _where(name, "algebra", ALGEBRA_MATRICES * second.numel() * wide, second.device) == second.device:
        return statistics

    def moved(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.cpu()
        if isinstance(value, Moments | Drift):
            return replace(value, **{f.name: moved(getattr(value, f.name)) for f in fields(value)})
        return value

    return replace(statistics, **{f.name: moved(getattr(statistics, f.name)) for f in fields(statistics)})


def _where(name: str, what: str, size: int, device: torch.device) -> torch.device:
    if has_room(device, size):
        return device
    log.info("%s: no room for %s of %.1f GB on %s; computed on the CPU", name, what, size / 1e9, device)
    return torch.device("cpu")


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
    targets = [t for t in (sums.targets, sums.held_targets) if t is not None]
    parts = [m for m in (moments, held_moments) if m is not None]
    ranks.add_up([t for m in parts for t in (m.second, m.first)] + [t for s in targets for t in (s.cross, s.first)])
    apart = int(held.sum()) * length if held_moments is not None else 0
    return replace(
        sums,
        moments=replace(moments, tokens=len(held) * length - apart),
        held_moments=None if held_moments is None else replace(held_moments, tokens=apart),
    )


def held_out(count: int, *, one_of: int = HELD_OUT_EVERY) -> Tensor:
    """Which of the calibration windows are held out: one of so many, the last where there are fewer, none of one.

    Returns:
        (count,), bool.
    """
    every = min(one_of, count)
    return torch.arange(count) % every == every - 1 if count > 1 else torch.zeros(count, dtype=torch.bool)
