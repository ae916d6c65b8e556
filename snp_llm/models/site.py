"""What can be cut: units, the rows that make them and the columns that read them. Knows no family."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snp_llm.models.projections import Projection, bias_of, projection, weight_of


@dataclass(frozen=True, order=True)
class Heads:
    """Attention heads of a block: how many query heads, how many key-value heads, channels of each."""

    query: int
    key_value: int
    size: int


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a producer: as many for every unit, unit after unit, or rows that stay whatever goes.

    Attributes:
        count: of all of them.
        per_unit: 0 where they stay.
        first: unit that the first of them belong to.
    """

    count: int
    per_unit: int
    first: int = 0


@dataclass(frozen=True)
class Producer:
    """A projection whose output channels are those of units, or a norm on its output.

    Attributes:
        path: from the block.
        rows: of its output, from first to last.
    """

    path: str
    rows: tuple[Rows, ...]

    @property
    def per_unit(self) -> int:
        """Rows that a unit has, all parts together."""
        return int((self.units() == 0).sum())

    def units(self) -> Tensor:
        """The unit that each row belongs to, (rows,), int64; -1 marks a row that stays."""
        parts = [
            part.first + torch.arange(part.count // part.per_unit, device="cpu").repeat_interleave(part.per_unit)
            if part.per_unit
            else torch.full((part.count,), -1, device="cpu")
            for part in self.rows
        ]
        return torch.cat(parts)

    def kept_rows(self, kept: Tensor) -> Tensor:
        """The rows that stay where only the units `kept` do, ascending."""
        units = self.units()
        return (torch.isin(units, kept.cpu()) | (units < 0)).nonzero().squeeze(1)


@dataclass(frozen=True)
class Site:
    """A place where units can go: what produces their channels, and what reads them.

    Heads of an attention, channels of an FFN, of one expert, or between two convolutions, differ in these entries
    alone. A whole attention or FFN is a site of one unit, which all its channels are. A whole block is one without
    producers and consumers: what is read is what the block adds to the stream.

    Attributes:
        block: index of the block.
        kind: what units are made of, such as "attention" or "ffn": sites of a kind may share a budget.
        stage: which of the block's passes it is cut in; sites of a stage do not see each other's cuts.
        producers: whose rows the units' channels are.
        consumers: paths of the projections that read these channels; all get the same input.
        module: path of the largest module whose output is that of the only consumer; None where there is none.
        units: how many there are now. An attention unit is a KV group or, where `groups` > 0, a query head.
        unit_size: channels a unit has; of a convolution's input, entries of a patch.
        cost: linear-weight parameters of one unit: its rows in every producer and its columns.
        parameters: linear-weight parameters of all these projections, which sparsity is a fraction of.
        groups: KV groups from which equally many query heads go, or shards of rows from which heads do; 0 where units
            go one by one.
        heads: of an attention site.
        stay: why units cannot go; empty where they can.
        droppable: whether all of them may, and then the module with them.
        routed: whether only some tokens come by, as to an expert.
    """

    block: int
    kind: str
    stage: int
    producers: tuple[Producer, ...]
    consumers: tuple[str, ...]
    module: str | None
    units: int
    unit_size: int
    cost: int
    parameters: int
    groups: int = 0
    heads: Heads | None = None
    stay: str = ""
    droppable: bool = False
    routed: bool = False

    @property
    def path(self) -> str:
        """Where its channels are read, which no other site of the block shares."""
        return ", ".join(self.consumers)

    @property
    def name(self) -> str:
        return f"block {self.block} {self.path}".rstrip()

    @property
    def channels(self) -> int:
        """Columns of the consumers."""
        return self.units * self.unit_size

    @property
    def has_reference(self) -> bool:
        """Whether what it adds to the stream can be compared with what it adds in the dense model, token by token."""
        return len(self.consumers) == 1 and self.module is not None and not self.routed

    @property
    def prunable(self) -> bool:
        """Whether units may go at all."""
        return not self.stay

    @property
    def step(self) -> int:
        """Units that can only go together: one of every group."""
        return self.groups or 1

    @property
    def unit(self) -> str:
        """What one unit is, in the plural."""
        if self.units == 1 and self.droppable:
            return "blocks" if not self.consumers else "modules"
        if self.heads is None:
            return "channels"
        if self.heads.query == self.heads.key_value:
            return "heads"
        return "query heads" if self.groups else "KV groups"

    def heads_after(self, width: int) -> Heads:
        """Heads of an attention site that keeps `width` units."""
        assert self.heads is not None
        if self.groups and self.heads.key_value < self.heads.query:
            return Heads(width, self.heads.key_value, self.heads.size)
        return Heads(width * (self.heads.query // self.heads.key_value), width, self.heads.size)


def tensor_or_module(block: nn.Module, path: str) -> Tensor | nn.Module:
    """What is at a path of a block: a module, or a tensor that a module holds itself."""
    parent, _, name = path.rpartition(".")
    found: Tensor | nn.Module = getattr(block.get_submodule(parent), name)
    return found


def projecting(block: nn.Module, site: Site) -> list[tuple[Producer, Projection]]:
    """The producers of a site that are projections, not norms or other tensors that go along."""
    pairs = [(producer, tensor_or_module(block, producer.path)) for producer in site.producers]
    return [(producer, module) for producer, module in pairs if isinstance(module, Projection)]


def consumers_of(block: nn.Module, site: Site) -> list[Projection]:
    """The projections that read a site's channels."""
    return [projection(block, path) for path in site.consumers]


def site_weight(block: nn.Module, site: Site) -> Tensor:
    """W, (d_out, channels): the weights of all consumers, one below the other; the identity for a whole block."""
    weights = [weight_of(consumer) for consumer in consumers_of(block, site)]
    if not weights:
        like = next(block.parameters())
        return torch.eye(site.channels, dtype=like.dtype, device=like.device)
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def site_bias(block: nn.Module, site: Site) -> Tensor | None:
    """The biases of all consumers, (d_out,), or None unless each has one."""
    biases = [bias for consumer in consumers_of(block, site) if (bias := bias_of(consumer)) is not None]
    if not biases or len(biases) < len(site.consumers):
        return None
    return biases[0] if len(biases) == 1 else torch.cat(biases)
