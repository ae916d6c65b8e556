"""Where the blocks, sites and units of a model are, read off its modules. Knows no numbers in them."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from snp_llm.models.families.decoders import find_family
from snp_llm.models.families.family import Family
from snp_llm.models.projections import Projection, projection, weight_of
from snp_llm.models.site import Heads, Producer, Rows, Site
from snp_llm.recipe.recipe import HeadUnit
from snp_llm.runtime.errors import SnpError


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
        stages = sorted({site.stage for site in here})
        return tuple(tuple(site for site in here if site.stage == stage) for stage in stages)

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
                weight = projection(block, path).weight
                name = f"block {index} {path}"
                if (owner := owners.setdefault(id(weight), name)) != name:
                    raise SnpError(
                        f"{name}: shares its weights with {owner}; expected a tensor of its own. Cutting one would cut "
                        "the other. Untie them (copy the weights) and save the model first."
                    )
    except AttributeError as error:
        raise SnpError(f"{type(model).__name__} does not have the layout of {family.name}: {error}.") from error
    return blocks


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
    columns = weight_of(projection(block, family.attention_out)).shape[1]
    rows = sum(weight_of(projection(block, path)).shape[0] for path in family.qkv)
    query, key_value = columns // size, (rows - columns) // (2 * size)
    if query * size != columns or key_value * 2 * size != rows - columns or key_value < 1 or query % key_value:
        raise SnpError(
            f"{family.attention}: expected query heads that split evenly into KV groups, got {columns:,} query and "
            f"{(rows - columns) / 2:,.0f} key channels in heads of {size}. The config does not fit the weights."
        )
    return Heads(query, key_value, size)


def _attention_rows(family: Family, heads: Heads, *, by_query: bool) -> list[tuple[Rows, ...]]:
    """For every in-projection of an attention, whose its rows are; keys and values stay where query heads are units."""
    shared = 1 if by_query else heads.query // heads.key_value
    query = Rows(heads.query * heads.size, shared * heads.size)
    key = Rows(heads.key_value * heads.size, 0 if by_query else heads.size)
    if family.qkv_layout == "separate":
        return [(query,), (key,), (key,)]
    if family.qkv_layout == "fused":
        return [(query, key, key)]
    return [(Rows(3 * query.count, 3 * query.per_unit),)]


def _attention_site(index: int, block: nn.Module, family: Family, head_unit: HeadUnit) -> Site:
    try:
        heads = read_heads(block, family)
    except SnpError as error:
        raise SnpError(f"block {index} {error}") from error
    by_query = heads.query > heads.key_value and (head_unit == "query" or heads.key_value == 1)
    attention = block.get_submodule(family.attention)
    joint = any(getattr(attention, path.rpartition(".")[2], None) is not None for path in family.joint_norms)
    rows = _attention_rows(family, heads, by_query=by_query)
    return make_site(
        block,
        index,
        kind="attention",
        stage=0,
        producers=tuple(map(Producer, family.qkv, rows)),
        consumers=(family.attention_out,),
        module=family.attention,
        units=heads.query if by_query else heads.key_value,
        groups=heads.key_value if by_query else 0,
        heads=heads,
        prunable=not joint,
    )


def _ffn_site(index: int, block: nn.Module, family: Family) -> Site:
    width = weight_of(projection(block, family.ffn_out)).shape[1]
    counts = (weight_of(projection(block, path)).shape[0] for path in family.ffn_in)
    # A fused in-projection has every unit's row twice, in gate and in up.
    rows = [(Rows(width, 1),) * (count // width) for count in counts]
    return make_site(
        block,
        index,
        kind="ffn",
        stage=1,
        producers=tuple(map(Producer, family.ffn_in, rows)),
        consumers=(family.ffn_out,),
        module=family.ffn_out,
        units=width,
    )


def make_site(
    block: nn.Module,
    index: int,
    *,
    producers: tuple[Producer, ...],
    consumers: tuple[str, ...],
    units: int,
    **rest: Any,
) -> Site:
    """A site, with its unit's size and cost counted in the weights of its projections.

    Args:
        block: that it is in.
        index: of the block.
        producers: whose rows the units' channels are.
        consumers: paths of the projections that read them.
        units: how many there are.
        rest: whatever else `Site` has.
    """
    readers = [weight_of(projection(block, path)) for path in consumers]
    size = readers[0].shape[1] // units
    cost, parameters = size * sum(len(weight) for weight in readers), sum(weight.numel() for weight in readers)
    for producer in producers:
        module = block.get_submodule(producer.path)
        if isinstance(module, Projection):
            weight = weight_of(module)
            cost, parameters = cost + producer.per_unit * weight.shape[1], parameters + weight.numel()
    return Site(
        block=index,
        producers=producers,
        consumers=consumers,
        units=units,
        unit_size=size,
        cost=cost,
        parameters=parameters,
        **rest,
    )
