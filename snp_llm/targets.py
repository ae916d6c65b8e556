"""What a block's out-projections should put out, from the dense model's own stream. Knows blocks, not how they are cut.

A site's output is added to the stream. Under `dense` it should be what the dense model's site puts out; under
`residual` whatever makes the stream after the site that of the dense model, so that what earlier cuts spoilt is made
good as far as this site can.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from snp_llm import ranks
from snp_llm.models.blocks import run_block, watch_outputs
from snp_llm.models.families import Family, linear
from snp_llm.stream import Stream, check_finite, in_batches

# Relative distance between what a block adds to its stream and its sites' outputs, up to which they are the same: in
# bfloat16 an update of a stream a hundred times its size is only known to a few percent.
SAME_STREAM = 0.25

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets:
    """Targets of one block's sites, where the hidden states wait.

    Attributes:
        attention, ffn: (windows, T, d) each. With `stream_scale` they include the stream before the site. None of
            attention where its inputs are those of the dense model: then it gives what it should until it is cut.
        stream_scale: what the stream is divided by to be in the measure of a site's output; None under `dense`.
    """

    attention: Tensor | None
    ffn: Tensor
    stream_scale: float | None

    def of_attention(self, at: slice, stream: Tensor) -> Tensor | None:
        """What the attention out-projection should put out, given the stream before the block."""
        if self.attention is None:
            return None
        target = self.attention[at].to(stream.device)
        return target - stream / self.stream_scale if self.stream_scale else target

    def of_ffn(self, at: slice, stream: Tensor, attended: Tensor) -> Tensor:
        """The same for the FFN, given the attention's output in this block as well."""
        target = self.ffn[at].to(stream.device)
        return target - stream / self.stream_scale - attended if self.stream_scale else target


def block_targets(
    block: nn.Module, family: Family, index: int, dense: Stream, *, residual: bool, device: torch.device
) -> Targets:
    """Runs a dense block over the dense model's stream, which moves on to what the block puts out.

    Under `residual` a block that normalises what its sites put out, or the sum, has no such target: its own dense
    outputs take its place, and a log line says so.

    Args:
        block: dense, on `device`.
        family: its family.
        index: its number.
        dense: the dense model's hidden states before it; overwritten by those after it.
        residual: whether the stream is part of the target.
        device: to compute on.
    """
    attention, ffn = dense.like_hidden(), dense.like_hidden()
    scale: float | None = float(getattr(block, "residual_multiplier", 1.0)) if residual else None
    seen: dict[str, Tensor] = {}
    watchers: dict[nn.Module, Callable[[Tensor], None]] = {
        linear(block, path): partial(seen.__setitem__, path) for path in (family.attention_out, family.ffn_out)
    }

    def run(at: slice) -> tuple[Tensor, Tensor, Tensor]:
        output = run_block(block, dense.hidden[at], dense.calls[index])
        return output, seen[family.attention_out], seen[family.ffn_out].reshape(output.shape)  # OPT flattens it

    with watch_outputs(watchers):
        for at, (output, attended, fed) in in_batches(len(dense.hidden), dense.batch, run):
            check_finite(output, index)
            if scale is not None:
                stream = dense.hidden[at].to(device) / scale
                if at.start == 0 and not ranks.from_rank(0, partial(_same, attended + fed, output / scale - stream)):
                    log.warning("target residual: blocks of this model normalise what is added; target dense instead")
                    scale = None
                else:
                    fed = output / scale
                    attended = stream + attended
            attention[at], ffn[at], dense.hidden[at] = attended, fed, output
    return Targets(attention, ffn, scale)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a.double() - b.double()).norm() <= SAME_STREAM * b.double().norm())
