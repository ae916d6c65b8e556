"""Where the blocks, sites and units of a model are, read off its modules. Knows no numbers in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.models.experts import Mixture, find_experts
from snp_llm.models.families.decoders import find_family
from snp_llm.models.families.family import Family
from snp_llm.models.modeling_snp import NoHeads
from snp_llm.models.projections import Projection, projection, weight_of
from snp_llm.models.segments import Segments, find_segments, segment_sites
from snp_llm.models.site import Heads, Producer, Rows, Site, tensor_or_module
from snp_llm.models.structure import Attention, Ffn, HeadRows, find_attention, find_ffn, nearly_attentions
from snp_llm.models.text_part import text_model
from snp_llm.recipe.recipe import Experts, HeadUnit
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


def find_anatomy(model: PreTrainedModel, head_unit: HeadUnit = "kv_group", experts: Experts = "never") -> Anatomy:
    """What of a model can be cut, read off its modules.

    Args:
        model: a decoder, its weights anywhere.
        head_unit, experts: as of `find_sites`.

    Raises:
        SnpError: its blocks have no attention and no FFN that is known, or shapes that do not fit together.
    """
    family, blocks = find_family(model.config), find_blocks(model)
    return Anatomy(model, family, blocks, tuple(find_sites(blocks, family, head_unit, experts)))


def blocks_path(model: PreTrainedModel) -> str:
    """Where the decoder blocks are: the list of modules of the text model that has most of the parameters.

    Raises:
        SnpError: the model has no such list.
    """
    decoder = text_model(model)
    inside = next((path for path, module in model.named_modules() if module is decoder), "")
    lists = {
        f"{inside}.{path}".removeprefix("."): module
        for path, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = {path: m for path, m in lists.items() if not any(path.startswith(f"{p}.") for p in lists)}
    if not outer:
        raise SnpError(f"{type(model).__name__} does not have a list of blocks; expected a decoder-only model.")
    return max(outer, key=lambda path: sum(p.numel() for p in outer[path].parameters()))


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks, or the segments of a convolutional network."""
    segments = find_segments(model)
    if segments is not None:
        return segments
    blocks = model.get_submodule(blocks_path(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def block_prefixes(model: PreTrainedModel) -> list[str]:
    """What stands before the names of each block's tensors in the model's."""
    blocks = find_blocks(model)
    if isinstance(blocks, Segments):
        return [f"{prefix}." if prefix else "" for prefix in blocks.prefixes]
    path = blocks_path(model)
    return [f"{path}.{index}." for index in range(len(blocks))]


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that the model has an embedding for."""
    return int(next(model.get_input_embeddings().parameters()).shape[0])


def find_sites(
    blocks: nn.ModuleList, family: Family, head_unit: HeadUnit = "kv_group", experts: Experts = "never"
) -> list[Site]:
    """The sites of every block, in the order in which they are pruned.

    Everything is read off the modules, so a model that was pruned before is an input like any other.

    Args:
        blocks: decoder blocks.
        family: theirs.
        head_unit: "kv_group": a key-value head and all its query heads. "query": query heads, evenly from every group.
            A block with one key-value head can only lose query heads; without groups (MHA) both are the same.
        experts: whether experts that only some tokens come by stay as they are, lose channels, or go as a whole; with
            "both" some go and the others lose channels.

    Raises:
        SnpError: no block has a site; shapes that do not fit together; two projections that are one tensor.
    """
    if isinstance(blocks, Segments):
        return segment_sites(blocks)
    sites: list[Site] = []
    for index, block in enumerate(blocks):
        try:
            attention, ffn = find_attention(block), find_ffn(block)
            for part, what in ((attention, "attention"), (ffn, "FFN")):
                if part is None and family.alike and not any(isinstance(m, NoHeads) for m in block.modules()):
                    raise SnpError(f"has no {what} as {family.name} has it; its projections are {_projections(block)}.")
            if attention is not None:
                sites.append(_attention_site(index, block, attention, family, head_unit))
            if ffn is not None and ffn.channels:
                sites.append(_ffn_site(index, block, ffn))
            if experts != "never" and (mixture := find_experts(block)) is not None:
                both = experts == "both"
                if both or experts == "whole":
                    sites.append(experts_site(index, block, mixture, whole=True))
                if both or experts == "channels":
                    sites.append(experts_site(index, block, mixture, nested=both))
        except SnpError as error:
            raise SnpError(f"block {index} {error}") from error
    if not sites:
        near = "".join(
            f" {path} has the projections of an attention, and {', '.join(others)} whose part in it is not known."
            for path, others in nearly_attentions(blocks[0]).items()
        )
        raise SnpError(
            f"model_type {family.model_type!r} is not supported: its {len(blocks)} blocks have no attention and no FFN "
            "that is known; expected projections with names that docs/adding_a_family.md lists. The first block has "
            f"{_projections(blocks[0]) or 'no projections'}.{near}"
        )
    _check_apart(blocks, sites)
    return sites


def _projections(block: nn.Module) -> str:
    return ", ".join(name for name, module in block.named_modules() if isinstance(module, Projection))


def _check_apart(blocks: nn.ModuleList, sites: Sequence[Site]) -> None:
    """Raises SnpError if two projections, or the experts of two blocks, are one tensor: cutting one would cut the
    other."""
    owners: dict[int, str] = {}
    for site in sites:
        stacked = () if site.mixture is None else (p for p in site.mixture.stacked if not p.endswith("_bias"))
        for path in (*(producer.path for producer in site.producers), *site.consumers, *stacked):
            found = tensor_or_module(blocks[site.block], path)
            weight = found.weight if isinstance(found, Projection) else found
            if not isinstance(weight, Tensor) or weight.dim() < 2:
                continue
            name = f"block {site.block} {path}"
            if (owner := owners.setdefault(id(weight), name)) != name:
                raise SnpError(
                    f"{name}: shares its weights with {owner}; expected a tensor of its own. Cutting one would cut "
                    "the other. Untie them (copy the weights) and save the model first; a type whose blocks share them "
                    "by design, as Zamba's do, is not supported."
                )


def _attention_site(index: int, block: nn.Module, found: Attention, family: Family, head_unit: HeadUnit) -> Site:
    heads = found.heads
    by_query = heads.query > heads.key_value and (head_unit == "query" or heads.key_value == 1)
    # What takes the stream along puts out the sum; only its out-projection puts out what it adds.
    adds_itself = "residual" in signature(block.get_submodule(found.module).forward).parameters
    return make_site(
        block,
        index,
        kind="attention",
        stage=0,
        producers=tuple(
            Producer(rows.path, _unit_rows(rows, heads, found.shards, by_query=by_query)) for rows in found.rows
        ),
        consumers=(found.out,),
        module=found.out if adds_itself else found.module,
        units=heads.query if by_query else heads.key_value,
        groups=heads.key_value if by_query else found.shards,
        heads=heads,
        stay=found.stay or family.heads_stay,
    )


def _unit_rows(rows: HeadRows, heads: Heads, shards: int, *, by_query: bool) -> tuple[Rows, ...]:
    """Whose the rows of an in-projection are: keys and values stay where query heads are units."""
    group = heads.query // heads.key_value
    query, key_value = rows.query, rows.key_value
    if rows.order == "shards":
        each = max(1, heads.query // shards)
        return tuple(Rows(each * query, query, shard * each) for shard in range(shards) for _ in range(3))
    if rows.order == "groups" and not by_query:
        each = group * query + key_value
        return (Rows(heads.key_value * each, each),)
    if rows.order == "groups":
        parts = [(Rows(group * query, query, i * group), Rows(key_value, 0)) for i in range(heads.key_value)]
        return tuple(part for pair in parts for part in pair)
    parts_of = [Rows(heads.query * query, query if by_query else group * query)] if query else []
    if key_value:
        # Keys before values, where both are in one projection with the queries.
        halves = (key_value // 2,) * 2 if query else (key_value,)
        parts_of += [Rows(heads.key_value * half, 0 if by_query else half) for half in halves]
    return tuple(parts_of)


def _ffn_site(index: int, block: nn.Module, found: Ffn) -> Site:
    return make_site(
        block,
        index,
        kind="ffn",
        stage=1,
        producers=tuple(Producer(path, (Rows(found.channels, 1),) * times) for path, times in found.rows),
        consumers=(found.out,),
        module=found.out,
        units=found.channels,
        stay=found.stay,
    )


def experts_site(index: int, block: nn.Module, mixture: Mixture, *, whole: bool = False, nested: bool = False) -> Site:
    """The channels of a block's experts, of which each keeps as many, its own; or these experts themselves.

    Nested ones are cut after those experts that go have gone.
    """
    weights = [block.get_parameter(path).numel() for path in mixture.stacked if not path.endswith("_bias")]
    return Site(
        block=index,
        kind="experts",
        stage=2 if nested else 1,
        producers=(),
        consumers=(),
        module=None,
        units=mixture.count if whole else mixture.channels,
        unit_size=1,
        cost=sum(weights) // (mixture.count if whole else mixture.channels),
        parameters=sum(weights),
        groups=mixture.groups if whole and mixture.groups > 1 else 0,
        mixture=mixture,
        whole=whole,
        nested=nested,
    )


def by_now(block: nn.Module, site: Site) -> Site:
    """A site of experts with those that its block has now, some of which may have gone."""
    mixture = find_experts(block)
    assert mixture is not None
    return experts_site(site.block, block, mixture, whole=site.whole, nested=site.nested)


def expert_site(site: Site) -> Site:
    """The channels of one of these experts, as a site of the `Expert` that it is taken apart into."""
    mixture = site.mixture
    assert mixture is not None
    channels, times = mixture.channels, 2 if mixture.gated else 1
    rows = (Rows(times * channels, times),) if mixture.interleaved else (Rows(channels, 1),) * times
    return replace(
        site,
        producers=(Producer("inward", rows),),
        consumers=("outward",),
        units=channels,
        groups=0,
        whole=False,
        nested=False,
        cost=site.parameters // (mixture.count * channels),
        parameters=site.parameters // mixture.count,
        routed=True,
        mixture=None,
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
        module = tensor_or_module(block, producer.path)
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
