"""Sums of a site over calibration tokens, apart for the windows that are held out. Knows tensors, not blocks."""

import logging
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

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
from snp_llm.models.anatomy import Projection, weight_of
from snp_llm.runtime import ranks
from snp_llm.runtime.device import has_room, trim_host_memory
from snp_llm.runtime.storage import Files, Shelf

log = logging.getLogger(__name__)


ALGEBRA_MATRICES = 5  # as large as a Gram matrix are held at most where it is factorised, in float64 if need be

# From so many channels on a site is ordered and factored in float32: half the memory and half the time on a CPU, a
# fraction of it on GPUs that have little float64. Smaller ones cost next to nothing anyway.
SINGLE_PRECISION_FROM = 1024

FILES_FROM = 4096  # channels, from which on sums are worth a file

HELD_OUT_EVERY = 8  # one window of so many is held out

TOKENS_A_CHANNEL = 16  # of the widest site: what is read from these is hardly better read from more

MOMENTS = ("moments", "held_moments", "untargeted")  # of `Sums`


@dataclass(frozen=True)
class Statistics:
    """What calibration says of a site.

    Attributes:
        moments: of its inputs, all tokens.
        drift: what its output lacks of its target; None where the target is its own dense output.
        targeted: of its inputs over the tokens that drift is known for; None where that is all.
        held_moments, held_drift: over the windows that were held out, which have targets if any have; None without.
        gradient: F, second moment of the loss gradient at its output, a token, (d_out, d_out); None where not needed.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    moments: Moments
    drift: Drift | None = None
    held_moments: Moments | None = None
    held_drift: Drift | None = None
    gradient: Tensor | None = None
    targeted: Moments | None = None
    files: Files = ()


@dataclass(frozen=True)
class Sums:
    """Sums of a site over calibration tokens, apart for the windows that are held out.

    Attributes:
        moments, targets: of its inputs, and of what it should put out (None without targets), over all windows that
            are in none of the following.
        held_moments, held_targets: over those held out, or None where nothing is chosen by them.
        untargeted: of its inputs over windows without a target, or None where all have one, or none has.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    moments: Moments
    targets: TargetSums | None
    held_moments: Moments | None
    held_targets: TargetSums | None
    untargeted: Moments | None = None
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
        if held is not None and held.tokens == 0:
            held = held_targets = None
        if held is not None:
            moments, held = added_to(moments, held), completed(held)
        if targets is not None and held_targets is not None:
            targets = TargetSums(targets.cross.add_(held_targets.cross), targets.first.add_(held_targets.first))
        moments = completed(moments)
        drift = lacking(targets, moments)
        held_drift = None if held is None else lacking(held_targets, held)
        if self.untargeted is None:
            return Statistics(moments, drift, held, held_drift, gradient, files=self.files)
        everything = added_to(completed(self.untargeted), moments)
        return Statistics(everything, drift, held, held_drift, gradient, moments, self.files)


def empty_sums(
    name: str,
    out: Projection,
    device: torch.device,
    shelf: Shelf,
    *,
    drifting: bool,
    holding_out: bool,
    some_untargeted: bool = False,
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
        some_untargeted: whether sums over windows without a target are.
    """
    (d_out, n), dtype = weight_of(out).shape, out.weight.dtype
    entries = (1 + holding_out) * (n * (n + 1) + drifting * d_out * (n + 1)) + some_untargeted * n * (n + 1)
    device = _where(name, "sums", entries * torch.promote_types(dtype, torch.float32).itemsize, device)
    sums = Sums(
        moments=empty_moments(n, dtype, device),
        targets=empty_target_sums(d_out, n, dtype, device) if drifting else None,
        held_moments=empty_moments(n, dtype, device) if holding_out else None,
        held_targets=empty_target_sums(d_out, n, dtype, device) if drifting and holding_out else None,
        untargeted=empty_moments(n, dtype, device) if some_untargeted else None,
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
        untargeted=moved(sums.untargeted, "second"),
        files=files,
    )


def add_batch(sums: Sums, inputs: Tensor, target: Tensor | None, held: Tensor) -> Sums:
    """Adds a batch, in place, and returns the sums with the new counts.

    Args:
        sums: of the site.
        inputs: of its out-projection, (batch, T, n), or with its windows flattened, as OPT has them.
        target: of its output, (batch, T, d_out), or None without targets. Of fewer windows where only the first of the
            batch have one.
        held: which windows are held out, (batch,), bool.
    """
    device = sums.moments.second.device
    held, inputs = held.to(device), inputs.to(device).reshape(len(held), -1, inputs.shape[-1])
    target = None if target is None else target.to(device)
    if sums.untargeted is not None:
        targeted = 0 if target is None else len(target)
        if targeted < len(inputs):
            sums = replace(sums, untargeted=add_moments(sums.untargeted, inputs[targeted:]))
        if not targeted:
            return sums
        held, inputs = held[:targeted], inputs[:targeted]
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
    """Statistics on the device where they are if there is room for factorising them, else on the CPU.

    What the batches before took of host memory is handed back first.
    """
    trim_host_memory()
    statistics = replace(
        statistics,
        moments=completed(statistics.moments),
        held_moments=None if statistics.held_moments is None else completed(statistics.held_moments),
        targeted=None if statistics.targeted is None else completed(statistics.targeted),
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


def over_all_ranks(sums: Sums) -> Sums:
    """Sums over the calibration tokens of all ranks, in place."""
    if ranks.rank_count() == 1:
        return sums
    parts = {name: part for name in MOMENTS if (part := getattr(sums, name)) is not None}
    targets = [t for t in (sums.targets, sums.held_targets) if t is not None]
    tensors = [t for part in parts.values() for t in (part.second, part.first)]
    ranks.add_up(tensors + [t for part in targets for t in (part.cross, part.first)])
    counts = ranks.from_all([part.tokens for part in parts.values()])
    counted: dict[str, Any] = {
        name: replace(part, tokens=sum(tokens))
        for (name, part), tokens in zip(parts.items(), zip(*counts, strict=True), strict=True)
    }
    return replace(sums, **counted)


def added_to(moments: Moments, other: Moments) -> Moments:
    """Moments over the tokens of both, in place of the first; of both the upper triangle is there, or of neither."""
    assert moments.whole == other.whole
    tokens = moments.tokens + other.tokens
    return Moments(moments.second.add_(other.second), moments.first.add_(other.first), tokens, moments.whole)


def enough_windows(widest: int, seq_len: int) -> int:
    """Windows of `TOKENS_A_CHANNEL` tokens for each channel of the widest site, and enough to hold one out."""
    return max(HELD_OUT_EVERY, -(-TOKENS_A_CHANNEL * widest // seq_len))


def held_out(count: int, *, one_of: int = HELD_OUT_EVERY) -> Tensor:
    """Which of the calibration windows are held out: one of so many, the last where there are fewer, none of one.

    Returns:
        (count,), bool.
    """
    every = min(one_of, count)
    return torch.arange(count) % every == every - 1 if count > 1 else torch.zeros(count, dtype=torch.bool)
