"""Where the blocks, sites and units of a model are, read off its modules. Knows no numbers in them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from snp_llm.models.families.decoders import find_family
from snp_llm.models.families.family import Family
from snp_llm.recipe.recipe import HeadUnit
from snp_llm.runtime.errors import SnpError

Projection = nn.Linear | Conv1D


@dataclass(frozen=True, order=True)
class Heads:
    """Attention heads of a block: how many query heads, how many key-value heads, channels of each."""

    query: int
    key_value: int
    size: int


@dataclass(frozen=True)
class Site:
    """One out-projection whose inputs are pruned.

    Attributes:
        block: index of the decoder block.
        kind: "attention" or "ffn".
        in_projections: paths of the projections whose rows are the units' channels.
        out_projection: path of the projection whose columns are.
        module: path of the largest module whose output is that projection's.
        units: how many there are now. An attention unit is a KV group or, where `groups` > 0, a query head.
        unit_size: channels a unit has.
        cost: linear-weight parameters of one unit: its rows in every in-projection and its columns.
        parameters: linear-weight parameters of all these projections, which sparsity is a fraction of.
        groups: KV groups from which equally many query heads go; 0 where units are not query heads.
        heads: of an attention site.
        prunable: whether units may go at all.
    """

    block: int
    kind: str
    in_projections: tuple[str, ...]
    out_projection: str
    module: str
    units: int
    unit_size: int
    cost: int
    parameters: int
    groups: int = 0
    heads: Heads | None = None
    prunable: bool = True

    @property
    def name(self) -> str:
        return f"block {self.block} {self.out_projection}"

    @property
    def channels(self) -> int:
        """Inputs of the out-projection."""
        return self.units * self.unit_size

    @property
    def unit(self) -> str:
        """What one unit is, in the plural."""
        if self.heads is None:
            return "channels"
        if self.groups:
            return "query heads"
        return "heads" if self.heads.query == self.heads.key_value else "KV groups"

    def heads_after(self, width: int) -> Heads:
        """Heads of an attention site that keeps `width` units."""
        assert self.heads is not None
        if self.groups:
            return Heads(width, self.heads.key_value, self.heads.size)
        return Heads(width * (self.heads.query // self.heads.key_value), width, self.heads.size)


@dataclass(frozen=True)
class Anatomy:
    """A model as pruning sees it.

    Attributes:
        model: as it was loaded.
        family: its family.
        blocks: its decoder blocks.
        sites: of all blocks, in the order in which they are cut.
    """

    model: PreTrainedModel
    family: Family
    blocks: nn.ModuleList
    sites: tuple[Site, ...]

    def stages(self, index: int) -> tuple[tuple[Site, ...], ...]:
        """The sites of a block in the order in which their inputs arise; those of one pass through the block together.

        What a stage puts out is what the inputs of the next depend on, so that stages are cut one after the other.
        """
        here = [site for site in self.sites if site.block == index]
        return tuple(tuple(site for site in here if site.kind == kind) for kind in dict.fromkeys(s.kind for s in here))

    def sites_of(self, index: int) -> list[Site]:
        """The sites of a block, in the order of its stages."""
        return [site for stage in self.stages(index) for site in stage]


def find_anatomy(model: PreTrainedModel, head_unit: HeadUnit = "kv_group") -> Anatomy:
    """What of a model can be cut, read off its modules.

    Args:
        model: of a supported family, its weights anywhere.
        head_unit: as of `find_sites`.

    Raises:
        SnpError: the model is of no supported family, or its modules are not those of its family.
    """
    family = find_family(model.config)
    blocks = find_blocks(model, family)
    return Anatomy(model, family, blocks, tuple(find_sites(blocks, family, head_unit)))


def find_blocks(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The decoder blocks, checked to have the family's layout.

    Raises:
        SnpError: a module that the family's entry names is missing, or two projections are one tensor.
    """
    owners: dict[int, str] = {}
    try:
        blocks = model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        for index, block in enumerate(blocks):
            for path in (*family.qkv, family.attention_out, *family.ffn_in, family.ffn_out):
                weight = linear(block, path).weight
                name = f"block {index} {path}"
                if (owner := owners.setdefault(id(weight), name)) != name:
                    raise SnpError(
                        f"{name}: shares its weights with {owner}; expected a tensor of its own. Cutting one would cut "
                        "the other. Untie them (copy the weights) and save the model first."
                    )
    except AttributeError as error:
        raise SnpError(f"{type(model).__name__} does not have the layout of {family.name}: {error}.") from error
    return blocks


def linear(block: nn.Module, path: str) -> Projection:
    """A projection of a block.

    Raises:
        SnpError: something else is at that path.
    """
    module = block.get_submodule(path)
    if not isinstance(module, Projection):
        raise SnpError(f"{path}: expected a plain linear layer, got {type(module).__name__}.")
    return module


def weight_of(projection: Projection) -> Tensor:
    """Its weight as (out, in), whichever way round it is stored."""
    weight = projection.weight.detach()
    return weight.T if isinstance(projection, Conv1D) else weight


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that the model has an embedding for."""
    return int(next(model.get_input_embeddings().parameters()).shape[0])


def find_sites(blocks: nn.ModuleList, family: Family, head_unit: HeadUnit = "kv_group") -> list[Site]:
    """Attention and FFN site of every block, in the order in which they are pruned.

    Everything is read off the modules, so a model that was pruned before is an input like any other.

    Args:
        blocks: decoder blocks.
        family: theirs.
        head_unit: "kv_group": a key-value head and all its query heads. "query": query heads, evenly from every group.
            A block with one key-value head can only lose query heads; without groups (MHA) both are the same.

    Raises:
        SnpError: head counts that do not fit the projections.
    """
    sites = []
    for index, block in enumerate(blocks):
        sites += [_attention_site(index, block, family, head_unit), _ffn_site(index, block, family)]
    return sites


def read_heads(block: nn.Module, family: Family) -> Heads:
    """Head counts of a block, from the shapes of its projections.

    Raises:
        SnpError: the shapes are no whole number of heads, or query heads do not split evenly into KV groups.
    """
    size = int(getattr(block.get_submodule(family.attention), family.head_dim))
    columns = weight_of(linear(block, family.attention_out)).shape[1]
    rows = sum(weight_of(linear(block, path)).shape[0] for path in family.qkv)
    query, key_value = columns // size, (rows - columns) // (2 * size)
    if query * size != columns or key_value * 2 * size != rows - columns or key_value < 1 or query % key_value:
        raise SnpError(
            f"{family.attention}: expected query heads that split evenly into KV groups, got {columns:,} query and "
            f"{(rows - columns) / 2:,.0f} key channels in heads of {size}. The config does not fit the weights."
        )
    return Heads(query, key_value, size)


def row_units(block: nn.Module, family: Family, site: Site) -> tuple[Tensor, ...]:
    """For every in-projection of a site, the unit that each of its rows belongs to.

    Returns:
        One (rows,) int64 each; -1 marks a row that stays whatever goes (keys and values where units are query heads).
    """
    units = torch.arange(site.units)
    if site.heads is None:  # a fused in-projection has every unit's row twice, in gate and in up
        rows = (weight_of(linear(block, path)).shape[0] for path in site.in_projections)
        return tuple(units.repeat(count // site.units) for count in rows)
    heads = site.heads
    query = units if site.groups else units.repeat_interleave(heads.query // heads.key_value)
    key = torch.full((heads.key_value,), -1) if site.groups else units
    if family.qkv_layout == "separate":
        parts: tuple[Tensor, ...] = (query, key, key)
    elif family.qkv_layout == "fused":
        parts = (torch.cat([query, key, key]),)
    else:
        parts = (query.repeat_interleave(3),)
    return tuple(part.repeat_interleave(heads.size) for part in parts)


def _attention_site(index: int, block: nn.Module, family: Family, head_unit: HeadUnit) -> Site:
    try:
        heads = read_heads(block, family)
    except SnpError as error:
        raise SnpError(f"block {index} {error}") from error
    group = heads.query // heads.key_value
    by_query = group > 1 and (head_unit == "query" or heads.key_value == 1)
    units = heads.query if by_query else heads.key_value
    size = heads.size if by_query else heads.size * group
    hidden_in = weight_of(linear(block, family.qkv[0])).shape[1]
    hidden_out = weight_of(linear(block, family.attention_out)).shape[0]
    rows = size if by_query else size + 2 * heads.size
    attention = block.get_submodule(family.attention)
    joint = any(getattr(attention, path.rpartition(".")[2], None) is not None for path in family.joint_norms)
    return Site(
        block=index,
        kind="attention",
        in_projections=family.qkv,
        out_projection=family.attention_out,
        module=family.attention,
        units=units,
        unit_size=size,
        cost=rows * hidden_in + size * hidden_out,
        parameters=_parameters(block, family.qkv, family.attention_out),
        groups=heads.key_value if by_query else 0,
        heads=heads,
        prunable=not joint,
    )


def _ffn_site(index: int, block: nn.Module, family: Family) -> Site:
    width = weight_of(linear(block, family.ffn_out)).shape[1]
    parameters = _parameters(block, family.ffn_in, family.ffn_out)
    return Site(
        block=index,
        kind="ffn",
        in_projections=family.ffn_in,
        out_projection=family.ffn_out,
        module=family.ffn_out,
        units=width,
        unit_size=1,
        cost=parameters // width,
        parameters=parameters,
    )


def _parameters(block: nn.Module, in_projections: tuple[str, ...], out_projection: str) -> int:
    return sum(math.prod(linear(block, path).weight.shape) for path in (*in_projections, out_projection))
