"""Sums of a site over calibration tokens, apart for the windows that are held out. Knows tensors, not blocks."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from snp_llm.linalg.gram import (
    Moments,
    OutputSums,
    add_moments,
    add_outputs,
    column_blocks,
    completed,
    drift_from,
    empty_moments,
    empty_output_sums,
    multiplied_as,
)
from snp_llm.models.site import Site
from snp_llm.runtime import ranks
from snp_llm.runtime.device import has_room, place_for, where_it_fits
from snp_llm.runtime.storage import Files, Storage

log = logging.getLogger(__name__)

FILES_FROM = 4096  # channels, from which on sums are worth a file

HELD_OUT_EVERY = 8  # one window of so many is held out

TOKENS_A_CHANNEL = 16  # of the widest site: what is read from these is hardly better read from more


@dataclass(frozen=True)
class TokenSums:
    """Sums over a set of calibration tokens.

    Attributes:
        moments: of a site's inputs.
        outputs: of what the site should put out, or lacks of that (its drift); None where it is to put out what it did.
    """

    moments: Moments
    outputs: OutputSums | None = None


@dataclass(frozen=True)
class Statistics:
    """What calibration says of a site; `for_algebra` makes it ready to be factored.

    Attributes:
        moments: of its inputs, all tokens.
        referred: over the tokens that drift is known for, with drift; None where the reference is its own dense output.
        held: over the windows that were held out, which have drift if any have; None without.
        gradient: F, second moment of the loss gradient at its output, a token, (d_out, d_out); None where not needed.
        whole: likewise of the gradients of an image summed over its positions; None elsewhere.
        means: of its inputs' means over the positions of each image; None likewise.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    moments: Moments
    referred: TokenSums | None = None
    held: TokenSums | None = None
    gradient: Tensor | None = None
    whole: Tensor | None = None
    means: Moments | None = None
    files: Files = ()


@dataclass(frozen=True)
class Sums:
    """Sums of a site over calibration tokens, apart for the windows that are held out.

    Attributes:
        fitted: with what the site should put out (None without references), over all windows in none of the following.
        held: likewise over those held out, or None where nothing is chosen by them.
        unreferred: of its inputs over windows without a reference, or None where all have one, or none has.
        means: of the inputs' means over the positions of each image that is held out (of all, where none is); None
            where nothing asks for them.
        files: that the sums of a wide site are in; none where they are in memory.
    """

    fitted: TokenSums
    held: TokenSums | None
    unreferred: Moments | None = None
    means: Moments | None = None
    files: Files = ()

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.fitted.moments.second.device

    @torch.no_grad()
    def statistics(self, W: Tensor, bias: Tensor | None, gradient: Tensor | None) -> Statistics:
        """Statistics of the site, the held-out windows part of the whole; summed in place, so that these are used up.

        Args:
            W, bias: of the site's consumers, as they were while the sums were made.
            gradient: F, or None where not needed.
        """

        def with_drift(sums: TokenSums) -> TokenSums:
            moments, outputs = completed(sums.moments), sums.outputs
            return TokenSums(moments, outputs and drift_from(outputs, moments, W, bias))

        fitted, held = self.fitted, self.held
        if held is not None and held.moments.tokens == 0:
            held = None
        if held is not None:
            fitted = joined(fitted, held)
        referred, held = with_drift(fitted), held and with_drift(held)
        moments = referred.moments
        if self.unreferred is not None:
            moments = added_to(completed(self.unreferred), moments)
        return Statistics(moments, referred if referred.outputs else None, held, gradient, files=self.files)


def empty_sums(
    name: str,
    W: Tensor,
    device: torch.device,
    storage: Storage,
    *,
    drifting: bool,
    holding_out: bool,
    some_unreferred: bool = False,
    means: bool = False,
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
        means: whether means over the positions of an image are summed.
    """
    (d_out, n), dtype = W.shape, W.dtype
    parts = {"drifting": drifting, "holding_out": holding_out, "some_unreferred": some_unreferred}
    device = place_for(name, "sums", sums_bytes(n, d_out, dtype, **parts), device)

    def empty(place: torch.device) -> TokenSums:
        outputs = empty_output_sums(d_out, n, dtype, place) if drifting else None
        return TokenSums(empty_moments(n, dtype, place), outputs)

    def all_empty(place: torch.device) -> Sums:
        more = (empty_moments(n, dtype, place) if wanted else None for wanted in (some_unreferred, means))
        return Sums(empty(place), empty(place) if holding_out else None, *more)  # type: ignore[arg-type]

    sums = where_it_fits(f"{name}: sums", device, all_empty)  # what is free may lie in pieces
    return _in_files(sums, storage) if wants_files(n, storage.device, sums.device.type) else sums


def sums_bytes(
    n: int, d_out: int, dtype: torch.dtype, *, drifting: bool, holding_out: bool, some_unreferred: bool = False
) -> int:
    """Bytes of `empty_sums` for a site with n inputs and d_out outputs, whose weights are of a type."""
    entries = (1 + holding_out) * (n * (n + 1) + drifting * d_out * (n + 1)) + some_unreferred * n * (n + 1)
    return entries * torch.promote_types(dtype, torch.float32).itemsize


def wants_files(n: int, storage: torch.device | None, summed_on: str) -> bool:
    """Whether sums over n channels are worth a file: where a storage is in files (None), and the CPU sums."""
    return storage is None and summed_on == "cpu" and n >= FILES_FROM


def _in_files(sums: Sums, storage: Storage) -> Sums:
    """Sums of no tokens, those over pairs of channels moved into files."""
    files = []

    def in_file(part: Moments | OutputSums) -> Moments | OutputSums:
        name = "second" if isinstance(part, Moments) else "cross"
        matrix = getattr(part, name)
        tensor, pages = storage.file(*matrix.shape, dtype=matrix.dtype)
        files.append(pages)
        filed: dict[str, Any] = {name: tensor}
        return replace(part, **filed)

    return replace(with_each(sums, in_file), files=files)


def with_each(value: Any, change: Callable[[Any], Any]) -> Any:
    """What holds sums of a site, with each of its moments and sums of outputs changed, in the order of its fields."""
    if isinstance(value, Moments | OutputSums):
        return change(value)
    if isinstance(value, Sums | TokenSums | Statistics):
        return replace(value, **{f.name: with_each(getattr(value, f.name), change) for f in fields(value)})
    return value


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
        held = held_out(len(inputs)) & (sums.held is not None)
    return add_batch(sums, inputs, reference, held)


def add_batch(sums: Sums, inputs: Tensor, reference: Tensor | None, held: Tensor) -> Sums:
    """Adds a batch, in place, and returns the sums with the new counts.

    Args:
        sums: of the site.
        inputs: of its consumers, (batch, T, n), or with its windows flattened, as OPT has them.
        reference: of its output, (batch, T, d_out), or None without references. Of fewer windows where only the first
            of the batch have one.
        held: which windows are held out, (batch,), bool, on the CPU.

    Returns:
        The sums, which have gone to the CPU if the device has no room for what adding takes.
    """
    inputs = inputs.reshape(len(held), -1, inputs.shape[-1])
    sums = _with_room(sums, inputs)
    device = sums.fitted.moments.second.device
    inputs, reference = inputs.to(device), None if reference is None else reference.to(device)
    if sums.means is not None:
        seen = inputs if sums.held is None else _windows(inputs, held)
        sums = replace(sums, means=add_moments(sums.means, seen.mean(1)))
    if sums.unreferred is not None:
        referred = 0 if reference is None else len(reference)
        if referred < len(inputs):
            sums = replace(sums, unreferred=add_moments(sums.unreferred, inputs[referred:]))
        if not referred:
            return sums
        held, inputs = held[:referred], inputs[:referred]
    if sums.held is None or not held.any():
        return replace(sums, fitted=_add(sums.fitted, inputs, reference))
    apart = ((sums.fitted, ~held), (sums.held, held))
    fitted, held_out = (
        _add(part, _windows(inputs, at), None if reference is None else _windows(reference, at)) for part, at in apart
    )
    return replace(sums, fitted=fitted, held=held_out)


def _windows(values: Tensor, which: Tensor) -> Tensor:
    """Those of some windows, (windows, ...), without a copy where they are in a row; `which` is a mask on the CPU."""
    at = which.nonzero().squeeze(1)
    if len(at) and int(at[-1]) - int(at[0]) == len(at) - 1:
        return values[int(at[0]) : int(at[-1]) + 1]
    return values[at.to(values.device)]


def _with_room(sums: Sums, inputs: Tensor) -> Sums:
    """The sums where they are if there is room for what adding a batch to them takes, else on the CPU.

    Looked at once: the next batches take what the first has left behind.
    """
    second = sums.fitted.moments.second
    if second.device.type == "cpu" or sums.fitted.moments.tokens:
        return sums
    count, n = inputs.numel(), len(second)
    width = multiplied_as(inputs.dtype, second.dtype, second.device.type).itemsize
    copies = count * (inputs.element_size() + width) + 2 * 4 * n * max(s - e for e, s in column_blocks(n))
    if has_room(second.device, copies):
        return sums
    log.info("no room on %s for what sums of %d channels take; they go on on the CPU", second.device, n)
    return moved(sums)


def give_way(sums: list[Sums]) -> bool:
    """Moves sums that are on a device to the CPU, in their list, to make room there; whether there were any."""
    there = [i for i, found in enumerate(sums) if found.device.type != "cpu"]
    for i in there:
        log.info("no room on %s for a window beside sums; they go on on the CPU", sums[i].device)
        sums[i] = moved(sums[i])
    return bool(there)


def moved(value: Any) -> Any:
    """Sums or statistics on the CPU, each tensor once."""

    @cache  # all tokens and those with a reference may be the same
    def on_cpu(tensor: Tensor) -> Tensor:
        return tensor.cpu()

    def with_moved(part: Any) -> Any:
        tensors = {f.name: on_cpu(v) for f in fields(part) if isinstance(v := getattr(part, f.name), Tensor)}
        return replace(part, **tensors)

    return with_each(value, with_moved)


def _add(sums: TokenSums, inputs: Tensor, reference: Tensor | None) -> TokenSums:
    if sums.outputs is not None and reference is not None:
        add_outputs(sums.outputs, reference, inputs)
    return replace(sums, moments=add_moments(sums.moments, inputs))


def over_all_ranks(sums: Sums) -> Sums:
    """Sums over the calibration tokens of all ranks, in place."""
    if ranks.rank_count() == 1:
        return sums
    apart = [part for part in (sums.fitted, sums.held) if part is not None]
    moments = [part.moments for part in apart]
    moments += [part for part in (sums.unreferred, sums.means) if part is not None]
    outputs = [part.outputs for part in apart if part.outputs is not None]
    ranks.add_up([t for m in moments for t in (m.second, m.first)] + [t for o in outputs for t in (o.cross, o.first)])
    counts = map(sum, zip(*ranks.from_all([m.tokens for m in moments]), strict=True))
    counted: Sums = with_each(sums, lambda p: replace(p, tokens=next(counts)) if isinstance(p, Moments) else p)
    return counted


def joined(sums: TokenSums, other: TokenSums) -> TokenSums:
    """Sums over the tokens of two sets, in place of those of the first."""
    outputs, others = sums.outputs, other.outputs
    if outputs is not None and others is not None:
        outputs = OutputSums(outputs.cross.add_(others.cross), outputs.first.add_(others.first))
    return TokenSums(added_to(sums.moments, other.moments), outputs)


def added_to(moments: Moments, other: Moments) -> Moments:
    """Moments over the tokens of two sets, in place of the first; both have their upper triangle, or neither."""
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
