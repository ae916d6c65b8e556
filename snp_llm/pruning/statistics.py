"""Sums of a site over calibration tokens, apart for the windows that are held out. Knows tensors, not blocks."""

import logging
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from snp_llm.linalg.gram import (
    Drift,
    Moments,
    ReferenceSums,
    add_moments,
    add_reference,
    completed,
    drift_from,
    empty_moments,
    empty_reference_sums,
)
from snp_llm.models.site import Site
from snp_llm.runtime import ranks
from snp_llm.runtime.device import has_room, trim_host_memory
from snp_llm.runtime.storage import Files, Storage

log = logging.getLogger(__name__)


ALGEBRA_MATRICES = 5  # as large as a Gram matrix are held at most where it is factorised, in float64 if need be

# From so many channels on a site is ordered and factored in float32: half the memory and half the time on a CPU, a
# fraction of it on GPUs that have little float64. Smaller ones cost next to nothing anyway.
SINGLE_PRECISION_FROM = 1024

FILES_FROM = 4096  # channels, from which on sums are worth a file

HELD_OUT_EVERY = 8  # one window of so many is held out

TOKENS_A_CHANNEL = 16  # of the widest site: what is read from these is hardly better read from more

MOMENTS = ("moments", "held_moments", "unreferred")  # of `Sums`


@dataclass(frozen=True)
class Statistics:
    """What calibration says of a site.

    Attributes:
        moments: of its inputs, all tokens.
        drift: what its output lacks of its reference; None where the reference is its own dense output.
        referred: of its inputs over the tokens that drift is known for; None where that is all.
        held_moments, held_drift: over the windows that were held out, which have references if any have; None without.
        gradient: F, second moment of the loss gradient at its output, a token, (d_out, d_out); None where not needed.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    moments: Moments
    drift: Drift | None = None
    held_moments: Moments | None = None
    held_drift: Drift | None = None
    gradient: Tensor | None = None
    referred: Moments | None = None
    files: Files = ()


@dataclass(frozen=True)
class Sums:
    """Sums of a site over calibration tokens, apart for the windows that are held out.

    Attributes:
        moments, references: of its inputs, and of what it should put out (None without references), over all windows
            that are in none of the following.
        held_moments, held_references: over those held out, or None where nothing is chosen by them.
        unreferred: of its inputs over windows without a reference, or None where all have one, or none has.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    moments: Moments
    references: ReferenceSums | None
    held_moments: Moments | None
    held_references: ReferenceSums | None
    unreferred: Moments | None = None
    files: Files = ()

    @torch.no_grad()
    def statistics(self, W: Tensor, bias: Tensor | None, gradient: Tensor | None) -> Statistics:
        """With the held-out windows as part of the whole. Sums in place: these sums are used up.

        Args:
            W, bias: of the site's consumers, as they were while the sums were made.
            gradient: F, or None where not needed.
        """

        def lacking(references: ReferenceSums | None, over: Moments) -> Drift | None:
            return None if references is None else drift_from(references, over, W, bias)

        moments, held, references, held_references = (
            self.moments,
            self.held_moments,
            self.references,
            self.held_references,
        )
        if held is not None and held.tokens == 0:
            held = held_references = None
        if held is not None:
            moments, held = added_to(moments, held), completed(held)
        if references is not None and held_references is not None:
            references = ReferenceSums(
                references.cross.add_(held_references.cross), references.first.add_(held_references.first)
            )
        moments = completed(moments)
        drift = lacking(references, moments)
        held_drift = None if held is None else lacking(held_references, held)
        if self.unreferred is None:
            return Statistics(moments, drift, held, held_drift, gradient, files=self.files)
        everything = added_to(completed(self.unreferred), moments)
        return Statistics(everything, drift, held, held_drift, gradient, moments, self.files)


def empty_sums(
    name: str,
    W: Tensor,
    device: torch.device,
    storage: Storage,
    *,
    drifting: bool,
    holding_out: bool,
    some_unreferred: bool = False,
) -> Sums:
    """Sums of no tokens, on the device if there is room for them, else on the CPU.

    Where a storage in files is asked for and the CPU is to sum, the matrices of wide sites are on it.

    Args:
        name: of the site.
        W: of its consumers, (d_out, n).
        device: where its inputs are.
        storage: for what does not have to be in memory all the time.
        drifting: whether there is a reference that its output may lack something of.
        holding_out: whether sums over held-out windows are kept apart.
        some_unreferred: whether sums over windows without a reference are.
    """
    (d_out, n), dtype = W.shape, W.dtype
    entries = (1 + holding_out) * (n * (n + 1) + drifting * d_out * (n + 1)) + some_unreferred * n * (n + 1)
    device = _where(name, "sums", entries * torch.promote_types(dtype, torch.float32).itemsize, device)
    sums = Sums(
        moments=empty_moments(n, dtype, device),
        references=empty_reference_sums(d_out, n, dtype, device) if drifting else None,
        held_moments=empty_moments(n, dtype, device) if holding_out else None,
        held_references=empty_reference_sums(d_out, n, dtype, device) if drifting and holding_out else None,
        unreferred=empty_moments(n, dtype, device) if some_unreferred else None,
    )
    in_files = storage.device is None and device.type == "cpu" and n >= FILES_FROM
    return _in_files(sums, storage) if in_files else sums


def _in_files(sums: Sums, storage: Storage) -> Sums:
    """The same sums of no tokens, those over pairs of channels in files."""
    files = []

    def moved(part: Moments | ReferenceSums | None, name: str) -> Any:
        if part is None:
            return None
        matrix = getattr(part, name)
        tensor, pages = storage.file(*matrix.shape, dtype=matrix.dtype)
        files.append(pages)
        filed: dict[str, Any] = {name: tensor}
        return replace(part, **filed)

    return replace(
        sums,
        moments=moved(sums.moments, "second"),
        references=moved(sums.references, "cross"),
        held_moments=moved(sums.held_moments, "second"),
        held_references=moved(sums.held_references, "cross"),
        unreferred=moved(sums.unreferred, "second"),
        files=files,
    )


def add_inputs(sums: Sums, site: Site, inputs: Tensor | None, reference: Tensor | None, held: Tensor) -> Sums:
    """Adds what arrived at a site, as `add_batch` does; of a routed site, whose tokens are no windows, as tokens.

    Args:
        sums: of the site.
        site: that it is.
        inputs: of its consumers, or None where no token came by.
        reference: of their output, or None.
        held: which windows are held out; of a routed site one token of so many is.
    """
    if inputs is None:
        return sums
    if site.routed:
        inputs = inputs.reshape(-1, 1, inputs.shape[-1])
        held = held_out(len(inputs)) & (sums.held_moments is not None)
    return add_batch(sums, inputs, reference, held)


def add_batch(sums: Sums, inputs: Tensor, reference: Tensor | None, held: Tensor) -> Sums:
    """Adds a batch, in place, and returns the sums with the new counts.

    Args:
        sums: of the site.
        inputs: of its consumers, (batch, T, n), or with its windows flattened, as OPT has them.
        reference: of its output, (batch, T, d_out), or None without references. Of fewer windows where only the first
            of the batch have one.
        held: which windows are held out, (batch,), bool.
    """
    device = sums.moments.second.device
    held, inputs = held.to(device), inputs.to(device).reshape(len(held), -1, inputs.shape[-1])
    reference = None if reference is None else reference.to(device)
    if sums.unreferred is not None:
        referred = 0 if reference is None else len(reference)
        if referred < len(inputs):
            sums = replace(sums, unreferred=add_moments(sums.unreferred, inputs[referred:]))
        if not referred:
            return sums
        held, inputs = held[:referred], inputs[:referred]
    if sums.held_moments is None or not held.any():
        if sums.references is not None and reference is not None:
            add_reference(sums.references, reference, inputs)
        return replace(sums, moments=add_moments(sums.moments, inputs))
    if sums.references is not None and sums.held_references is not None and reference is not None:
        add_reference(sums.references, reference[~held], inputs[~held])
        add_reference(sums.held_references, reference[held], inputs[held])
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
        referred=None if statistics.referred is None else completed(statistics.referred),
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
    references = [t for t in (sums.references, sums.held_references) if t is not None]
    tensors = [t for part in parts.values() for t in (part.second, part.first)]
    ranks.add_up(tensors + [t for part in references for t in (part.cross, part.first)])
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
