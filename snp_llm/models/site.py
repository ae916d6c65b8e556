"""What can be cut: units, the rows that make them and the columns that read them. Knows no family."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snp_llm.models.experts import OUTWARD, Mixture
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
class Shared:
    """Units that other blocks make than the one that reads them, and that several sites may read.

    All of these sites keep the same units. Until the last of them is cut, all channels are there, and what gone ones
    are multiplied with is zero.

    Attributes:
        name: for people, and unlike that of others.
        producers: by block, whose rows the units' channels are.
    """

    name: str
    producers: tuple[tuple[int, Producer], ...]


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
        beside: linear-weight parameters of the module that are no unit's, and only go with all of them.
        routed: whether only some tokens come by, as to an expert.
        taps: of a wide convolution, or of a linear layer on a flattened feature map, columns that a channel has. What
            remains of its channels is mixed for all taps alike, and a site is as wide as it has channels; 0 elsewhere.
        norm: path of a batch norm on the consumer's output, whose statistics take up what a bias would.
        shared: where other blocks make the units.
        order: of units, most important first, where it is known before the cut, as for sites that share them.
        mixture: experts that the units are channels of, as many and not the same of each; None elsewhere.
        whole: whether these experts themselves are the units.
        nested: whether its units are in those of the site before it: channels of experts that may go as a whole.
        drifts: whether units before it have gone, so that its norm sees something else.
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
    beside: int = 0
    routed: bool = False
    taps: int = 0
    norm: str = ""
    shared: Shared | None = None
    order: tuple[int, ...] = ()
    drifts: bool = False
    mixture: Mixture | None = None
    whole: bool = False
    nested: bool = False

    @property
    def path(self) -> str:
        """Where its channels are read, which no other site of the block shares."""
        if self.mixture is None:
            return ", ".join(self.consumers)
        return f"{self.mixture.module}.{OUTWARD}" if self.nested else self.mixture.module

    @property
    def name(self) -> str:
        return f"block {self.block} {self.path}".rstrip()

    @property
    def channels(self) -> int:
        """Columns of the consumers."""
        return self.units * self.unit_size

    @property
    def load(self) -> int:
        """Channels, times the tokens that it takes for one of them to come by."""
        return (
            self.channels if self.mixture is None else self.mixture.channels * self.mixture.count // self.mixture.each
        )

    @property
    def parts(self) -> int:
        """Gram matrices that it has: one of each expert."""
        return 1 if self.mixture is None else self.mixture.count

    @property
    def passes(self) -> int:
        """Of these, how many a token adds to."""
        return 1 if self.mixture is None else self.mixture.each

    @property
    def has_reference(self) -> bool:
        """Whether what it adds to the stream can be compared with what it adds in the dense model, token by token."""
        return len(self.consumers) == 1 and self.module is not None and not self.routed

    @property
    def spatial(self) -> bool:
        """Whether it is read at many positions of an image, whose errors add up in one loss."""
        return self.kind in ("convolution", "stream")

    @property
    def whole_block(self) -> bool:
        """Whether it is a block as a whole, whose other sites go with it."""
        return self.kind == "block"

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
            return "blocks" if self.whole_block else "modules"
        if self.mixture is not None:
            return "experts" if self.whole else "channels of every expert"
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


def outputs_of(block: nn.Module, site: Site) -> int:
    """d_out, outputs of all consumers together; of a whole block, its channels."""
    if site.mixture is not None:
        return site.mixture.outputs
    return sum(len(weight_of(consumer)) for consumer in consumers_of(block, site)) or site.channels


def block_dtype(block: nn.Module) -> torch.dtype:
    """The type of a block's parameters."""
    return next(block.parameters()).dtype


def site_weight(block: nn.Module, site: Site) -> Tensor:
    """W, (d_out, channels): the weights of all consumers, one below the other.

    The identity for a whole block, and where channels are mixed: what is repaired is then what they were.
    """
    weights = [weight_of(consumer) for consumer in consumers_of(block, site)]
    if not weights or site.taps:
        like = next(block.parameters())
        return torch.eye(site.channels, dtype=like.dtype, device=like.device)
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def site_bias(block: nn.Module, site: Site) -> Tensor | None:
    """The biases of all consumers, (d_out,), or None unless each has one.

    A batch norm after a consumer is one: less its running mean. Of mixed channels it is what a constant would add.
    """
    if site.norm or site.taps:
        return _constant(block, site)
    biases = [bias for consumer in consumers_of(block, site) if (bias := bias_of(consumer)) is not None]
    if not biases or len(biases) < len(site.consumers):
        return None
    return biases[0] if len(biases) == 1 else torch.cat(biases)


def _constant(block: nn.Module, site: Site) -> Tensor | None:
    (consumer,) = consumers_of(block, site)
    bias = bias_of(consumer)
    if site.taps:
        return None if bias is None and not site.norm else weight_of(consumer).new_zeros(site.units)
    return normed_bias(block, site)


def normed_bias(block: nn.Module, site: Site) -> Tensor:
    """What a batch norm adds to its consumer's product: the bias there, less the running mean, (d_out,)."""
    (consumer,) = consumers_of(block, site)
    mean, bias = norm_of(block, site).running_mean, bias_of(consumer)
    assert mean is not None
    return -mean if bias is None else bias - mean


def norm_of(block: nn.Module, site: Site) -> nn.BatchNorm2d:
    """The batch norm on a consumer's output."""
    norm = block.get_submodule(site.norm)
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def tap_weights(block: nn.Module, site: Site) -> Tensor:
    """The consumer's weight by tap, (taps, d_out, units)."""
    (consumer,) = consumers_of(block, site)
    return weight_of(consumer).unflatten(1, (site.units, site.taps)).permute(2, 0, 1)
