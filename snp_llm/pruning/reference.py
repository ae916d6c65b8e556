"""What a block's out-projections should put out, from the dense model's own stream. Knows blocks, not how they are cut.

A site's output is added to the stream. Under `dense` it should be what the dense model's site puts out; under
`residual` whatever makes the stream after the site that of the dense model, so that what earlier cuts spoilt is made
good as far as this site can.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from snp_llm.models.anatomy import linear
from snp_llm.models.blocks import run_block, watch_outputs
from snp_llm.models.families.family import Family
from snp_llm.pruning.stream import Stream, check_finite, in_batches
from snp_llm.runtime import ranks

log = logging.getLogger(__name__)


# Relative distance between what a block adds to its stream and its sites' outputs, up to which they are the same: in
# bfloat16 an update of a stream a hundred times its size is only known to a few percent.
SAME_STREAM = 0.25


@dataclass(frozen=True)
class Targets:
    """Targets of one block's sites, where the hidden states wait, for the first of the calibration windows or for all.

    Attributes:
        attention, ffn: (windows, T, d) each. With `stream_scale` they include the stream before the site. None of
            attention where its inputs are those of the dense model: then it gives what it should until it is cut.
        windows: on all ranks together.
        stream_scale: what the stream is divided by to be in the measure of a site's output; None under `dense`.
    """

    attention: Tensor | None
    ffn: Tensor
    windows: int
    stream_scale: float | None

    def of_attention(self, at: slice, hidden: Tensor, device: torch.device) -> Tensor | None:
        """What the attention out-projection should put out, for those of the windows `at` that have targets.

        Args:
            at: some of this rank's windows.
            hidden: the stream before the block, (all of this rank's windows, T, d).
            device: of the result.
        """
        return None if self.attention is None else self._less_stream(self.attention[at], at, hidden, device)

    def of_ffn(self, at: slice, hidden: Tensor, attended: Tensor) -> Tensor:
        """The same for the FFN, given the attention's output in this block as well, (batch, T, d)."""
        target = self._less_stream(self.ffn[at], at, hidden, attended.device)
        return target - attended[: len(target)] if self.stream_scale else target

    def _less_stream(self, target: Tensor, at: slice, hidden: Tensor, device: torch.device) -> Tensor:
        target = target.to(device)
        return target - hidden[at][: len(target)].to(device) / self.stream_scale if self.stream_scale else target


def block_targets(
    block: nn.Module, family: Family, index: int, dense: Stream, *, residual: bool, device: torch.device
) -> Targets:
    """Runs a dense block over the dense model's stream, which moves on to what the block puts out.

    Args:
        block: dense, on `device`.
        family: its family.
        index: its number.
        dense: the dense model's hidden states before it; overwritten by those after it.
        residual: whether the stream is part of the target.
        device: to compute on.
    """
    attention, ffn = dense.like_hidden(), dense.like_hidden()
    scale = _stream_scale(block) if residual else None
    for at, (output, attended, fed) in _outputs(block, family, index, dense, len(dense.hidden)):
        check_finite(output, index)
        if scale is not None:
            fed = output / scale
            attended = dense.hidden[at].to(device) / scale + attended
        attention[at], ffn[at], dense.hidden[at] = attended, fed, output
    return Targets(attention, ffn, dense.total, scale)


def adds_to_stream(block: nn.Module, family: Family, index: int, dense: Stream) -> bool:
    """Whether a dense block puts out the sum of its stream and of what its sites put out, as the first window has it.

    A block that normalises what its sites put out, or the sum, has no stream that they could repair. A log line
    says that dense outputs take its place.
    """

    def same() -> bool:
        [(at, (output, attended, fed))] = _outputs(block, family, index, dense, 1)
        added = output - dense.hidden[at].to(output.device)
        sites = (attended + fed) * _stream_scale(block)
        return bool((sites.double() - added.double()).norm() <= SAME_STREAM * added.double().norm())

    adds = ranks.from_rank(0, same)
    if not adds:
        log.warning("target residual: blocks of this model normalise what is added; target dense instead")
    return adds


def _stream_scale(block: nn.Module) -> float:
    return float(getattr(block, "residual_multiplier", 1.0))


def _outputs(
    block: nn.Module, family: Family, index: int, dense: Stream, windows: int
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, Tensor]]]:
    """What a block, its attention and its FFN put out for the first windows of the stream, batch after batch."""
    seen: dict[str, Tensor] = {}
    watchers: dict[nn.Module, Callable[[Tensor], None]] = {
        linear(block, path): partial(seen.__setitem__, path) for path in (family.attention_out, family.ffn_out)
    }

    def run(at: slice) -> tuple[Tensor, Tensor, Tensor]:
        output = run_block(block, dense.hidden[at], dense.calls[index])
        return output, seen[family.attention_out], seen[family.ffn_out].reshape(output.shape)  # OPT flattens it

    with watch_outputs(watchers):
        yield from in_batches(windows, dense.batch, run)
