"""The hidden states of all calibration tokens on their way through the blocks. Knows nothing of what is pruned."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.device import Clock
from snp_llm.errors import SnpError
from snp_llm.linalg.gram import Moments, empty_moments
from snp_llm.models.blocks import BlockCall, capture_calls, output_of, run_block, watch_inputs
from snp_llm.models.families import Family, Projection, linear, weight_of
from snp_llm.recipe import Recipe


@dataclass(frozen=True)
class Stream:
    """What enters the blocks, batch by batch.

    Attributes:
        hidden: hidden states before the first block, one (batch, T, d) a batch.
        calls: for each batch, every block's other arguments.
    """

    hidden: list[Tensor]
    calls: list[list[BlockCall]]


def capture(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor, recipe: Recipe, clock: Clock) -> Stream:
    """Embeds all calibration tokens and records how the model calls its blocks."""
    home = clock.device if recipe.hidden_device == "compute" else torch.device("cpu")
    hidden: list[Tensor] = []
    calls: list[list[BlockCall]] = []
    with clock.phase("calibration"):
        for batch in tokens.split(recipe.batch_size):
            first, call = capture_calls(model, blocks, batch)
            hidden.append(first.to(home))
            # Windows are equally long, so masks and positions are mostly the same in every batch: keep one copy.
            calls.append(_share(call, calls[-1]) if calls else call)
    return Stream(hidden, calls)


def _share(new: Any, old: Any) -> Any:
    """`new`, with every tensor that equals its counterpart in `old` replaced by that one."""
    if isinstance(new, Tensor):
        return old if isinstance(old, Tensor) and new.shape == old.shape and torch.equal(new, old) else new
    if isinstance(new, BlockCall) and isinstance(old, BlockCall):
        return BlockCall(_share(new.args, old.args), _share(new.kwargs, old.kwargs))
    if isinstance(new, dict) and isinstance(old, dict):
        return {k: _share(v, old.get(k)) for k, v in new.items()}
    if type(new) in (list, tuple) and type(old) is type(new) and len(new) == len(old):
        return type(new)(_share(a, b) for a, b in zip(new, old, strict=True))
    return new


def moments_for(out_projection: Projection, device: torch.device) -> Moments:
    """Empty moments for the inputs of an out-projection."""
    return empty_moments(weight_of(out_projection).shape[1], out_projection.weight.dtype, device)


def advance(block: nn.Module, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
    """A block's output hidden states, (batch, T, d), where its input waits.

    Raises:
        SnpError: they are not finite.
    """
    output = run_block(block, hidden, call).to(hidden.device)
    if not torch.isfinite(output).all():
        raise SnpError(f"block {index}: activations hold NaN or Inf. Try --dtype float32.")
    return output


def attention_passes(
    block: nn.Module, family: Family, hidden: Sequence[Tensor], calls: Sequence[BlockCall]
) -> Iterator[tuple[Tensor, Any]]:
    """Batch by batch, the inputs of the attention out-projection and what the attention module returned, on device."""
    attention, out = block.get_submodule(family.attention), linear(block, family.attention_out)
    contexts: list[Tensor] = []
    with watch_inputs({out: contexts.append}):
        for batch, call in zip(hidden, calls, strict=True):
            returned = output_of(attention, block, batch, call)
            yield contexts.pop(), returned
