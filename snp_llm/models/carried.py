"""What blocks are given and give beside hidden states that depends on tokens, carried along in the stream as channels.

Most blocks take hidden states alone. Those of Gemma 3n and Gemma 4 also get an embedding of their own for every token,
and keys and values that an earlier block has computed; Gemma 3n has several hidden states for a token. All of that is
laid side by side in one tensor, (windows, T, channels), so that a stream stays one. Cuts nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snp_llm.models.structure import fills_keys

OWN = "per_layer_input"  # argument of blocks: their own embedding of every token, (windows, T, channels)
KEPT = "shared_kv_states"  # argument of blocks: keys and values of earlier blocks, each (windows, heads, T, size)


@dataclass(frozen=True)
class Room:
    """Where the stream has the keys and values of a block for later ones.

    Attributes:
        names: under which these find them, the kind of block or its number.
        channels: of the stream.
        heads, size: key-value heads, and channels of each.
    """

    names: tuple[str, int]
    channels: slice
    heads: int
    size: int

    def read(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values out of the stream."""
        keys, values = state[..., self.channels].unflatten(-1, (2, self.heads, self.size)).permute(2, 0, 3, 1, 4)
        return keys, values


@dataclass(frozen=True)
class Carried:
    """What a block takes out of the stream, and lays into it.

    Attributes:
        copies: hidden states that a token has, in a first dimension of what the block takes; 0 without that dimension.
        hidden: channels of all of them.
        own: channels of the block's own embedding, where it has one.
        rooms: for keys and values.
        fills: which of them the block fills, if it does.
    """

    copies: int
    hidden: int
    own: slice | None
    rooms: tuple[Room, ...]
    fills: Room | None

    def arguments(self, state: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the block is called with: hidden states in the shape that it takes, other arguments by name."""
        given: dict[str, Any] = {} if self.own is None else {OWN: state[..., self.own]}
        if self.rooms:
            given[KEPT] = {name: room.read(state) for room in self.rooms if room != self.fills for name in room.names}
        return hidden_of(state, self.copies, self.hidden), given

    def after(self, state: Tensor, output: Tensor, given: dict[str, Any]) -> Tensor:
        """The stream after the block, from that before it and what the block put out, also into `given`."""
        parts, at = [as_channels(output)], self.hidden
        if self.fills is not None:
            kept = given[KEPT]
            pair = next(kept[name] for name in self.fills.names if name in kept)
            parts += [state[..., at : self.fills.channels.start], torch.stack(pair).permute(1, 3, 0, 2, 4).flatten(2)]
            at = self.fills.channels.stop
        return torch.cat([*parts, state[..., at:]], dim=-1)


def lay_out(
    blocks: nn.ModuleList, hidden: Tensor, arguments: Sequence[dict[str, Any]]
) -> tuple[Tensor, list[Carried | None]]:
    """The stream before the first block, and what each block takes out of it; None for blocks that take it as it is.

    Args:
        blocks: all of a model.
        hidden: what the first takes, (windows, T, d), or (copies, windows, T, d).
        arguments: of every block, by name; what is laid into the stream is taken out of them.
    """
    copies = hidden.shape[0] if hidden.dim() == 4 else 0
    parts = [as_channels(hidden)]
    width = first = parts[0].shape[-1]
    own: list[slice | None] = []
    for given in arguments:
        embedding = given.get(OWN)
        own.append(None if embedding is None else slice(width, width + embedding.shape[-1]))
        if embedding is not None:
            parts.append(given.pop(OWN))
            width += embedding.shape[-1]
    rooms: dict[int, Room] = {}
    for index, block in enumerate(blocks):
        if (attention := fills_keys(block)) is not None:
            rows, size = len(attention.k_proj.weight), attention.head_dim
            rooms[index] = Room((attention.layer_type, index), slice(width, width + 2 * rows), rows // size, size)
            width += 2 * rows
            arguments[index].pop(KEPT)
    if not copies and width == first:
        return hidden, [None] * len(blocks)
    parts.append(parts[0].new_zeros(*parts[0].shape[:-1], width - sum(part.shape[-1] for part in parts)))
    given_to = tuple(rooms.values())
    return torch.cat(parts, -1), [Carried(copies, first, at, given_to, rooms.get(i)) for i, at in enumerate(own)]


def stream_channels(blocks: nn.ModuleList, hidden: int) -> int:
    """Channels of the stream of a model with these blocks and so many of hidden states, without running any."""
    copies = max(getattr(getattr(block, "config", None), "altup_num_inputs", 1) for block in blocks)
    own = sum(getattr(block, "hidden_size_per_layer_input", None) or 0 for block in blocks)
    kept = sum(2 * len(attention.k_proj.weight) for attention in map(fills_keys, blocks) if attention is not None)
    return copies * hidden + own + kept


def as_channels(hidden: Tensor) -> Tensor:
    """Hidden states with those that a token has several of side by side, (windows, T, channels)."""
    return hidden.permute(1, 2, 0, 3).flatten(2) if hidden.dim() == 4 else hidden


def hidden_of(state: Tensor, copies: int, channels: int) -> Tensor:
    """Hidden states of a stream in the shape that blocks take, (windows, T, d) or (copies, windows, T, d)."""
    hidden = state[..., :channels]
    return hidden.unflatten(-1, (copies, -1)).permute(2, 0, 1, 3) if copies else hidden


def like(state: Tensor, hidden: Tensor) -> Tensor:
    """Hidden states of a stream in the shape of others."""
    copies = len(hidden) if hidden.dim() == 4 else 0
    return hidden_of(state, copies, max(1, copies) * hidden.shape[-1])
