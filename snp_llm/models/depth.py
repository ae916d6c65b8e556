"""Whole blocks, attentions and FFNs that may go, and a model without some blocks. Knows no importance and no files."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm.models.anatomy import Anatomy, blocks_path, find_anatomy, find_blocks
from snp_llm.models.segments import Segments
from snp_llm.models.site import Site
from snp_llm.models.size import counted_weights, linear_weights
from snp_llm.models.structure import fills_keys
from snp_llm.models.text_part import text_config
from snp_llm.recipe.recipe import Depth, Experts, Layout, Recipe
from snp_llm.runtime.errors import SnpError

# Config keys of lists of block numbers, and of how many of the first blocks are of another kind.
NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "global_attn_every_n_layers")
LEADING = ("first_k_dense_replace", "moe_layer_start_index", "moe_num_first_k_dense", "num_dense_layers")


def recipe_anatomy(model: PreTrainedModel, recipe: Recipe) -> Anatomy:
    """What of a model may go by a recipe: units of the kinds that it names, and blocks and halves of blocks.

    Raises:
        SnpError: as of `find_anatomy` and `with_depth`.
    """
    found = find_anatomy(model, recipe.head_unit, recipe.experts)
    return with_depth(found, recipe.depth, recipe.layout, recipe.experts)


def with_depth(anatomy: Anatomy, depth: Depth, layout: Layout, experts: Experts = "never") -> Anatomy:
    """The anatomy with a site of one unit for every block where blocks may go, each before the sites inside it.

    What such a site costs is what the block has beside the units of its other sites: all of them go with the block.
    In the compact layout attentions and FFNs may go as a whole, too, and leave the rest of their block.

    Raises:
        SnpError: blocks may go, and the model is of a kind whose blocks cannot.
    """
    if depth == "never":
        return anatomy
    if isinstance(anatomy.blocks, Segments):
        raise SnpError(f"--depth {depth}: expected a model of blocks that are alike; convolutional networks have none.")
    if read := [index for index, block in enumerate(anatomy.blocks) if fills_keys(block) is not None]:
        raise SnpError(
            f"--depth {depth}: expected blocks that each compute from the stream alone; later ones read the keys and "
            f"values of block {read[0]}."
        )
    if len(anatomy.blocks) < 2:
        raise SnpError(f"--depth {depth}: expected a model of at least two blocks, one of which stays; it has one.")
    hidden = int(text_config(anatomy.model.config).hidden_size)
    sites: list[Site] = []
    for index, block in enumerate(anatomy.blocks):
        inside = [_droppable(block, s) if layout == "compact" and leaves(s) else s for s in anatomy.sites_of(index)]
        gone = sum(site.units * site.cost + site.beside for site in inside if not site.nested)
        rest = counted_weights(block, experts) - gone
        sites += [Site(index, "block", -1, (), (), None, 1, hidden, rest, rest, droppable=True), *inside]
    return replace(anatomy, sites=tuple(sites))


def leaves(site: Site) -> bool:
    """Whether all of an attention or an FFN may go and leave the rest of its block: what it adds is its module's."""
    module = site.heads is None or site.module not in (None, *site.consumers)
    return site.prunable and site.kind in ("attention", "ffn") and module


def _droppable(block: nn.Module, site: Site) -> Site:
    module = site.module if site.heads is not None else None
    weights = site.units * site.cost if module is None else linear_weights(block.get_submodule(module))
    return replace(site, droppable=True, beside=weights - site.units * site.cost)


def gone_blocks(sites: Sequence[Site], widths: Sequence[int]) -> list[int]:
    """Numbers of the blocks that widths leave nothing of, ascending."""
    return [site.block for site, width in zip(sites, widths, strict=True) if site.whole_block and not width]


def shortened(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model that has only some of the blocks, and shares its modules: a template, which is not run.

    Args:
        model: as it was loaded; left as it was.
        kept: numbers of the blocks that stay, ascending.
    """
    blocks = find_blocks(model)
    short: PreTrainedModel = _with(model, blocks_path(model), nn.ModuleList(blocks[index] for index in kept))
    short.config = shortened_config(model.config, len(blocks), kept)
    return short


def _with(module: Any, path: str, new: nn.Module) -> Any:
    """A shallow copy of a module with another one at a path."""
    name, _, rest = path.partition(".")
    found = copy.copy(module)
    found._modules = {**module._modules, name: _with(module._modules[name], rest, new) if rest else new}
    return found


def shortened_config(config: PretrainedConfig, blocks: int, kept: Sequence[int]) -> PretrainedConfig:
    """The config of a model without some of its so many blocks: their number, and what it lists block by block.

    What is not said block by block, such as every how many blocks something comes, is left as it is.
    """
    new, place = copy.deepcopy(config), {old: number for number, old in enumerate(kept)}
    text = text_config(new)
    for key, value in [*vars(text).items()]:
        if key in NUMBERS and isinstance(value, list):
            setattr(text, key, [place[number] for number in value if number in place])
        elif key in LEADING and isinstance(value, int):
            setattr(text, key, sum(index < value for index in kept))
        elif _each(key, value, blocks):
            setattr(text, key, type(value)([value[index] for index in kept]))
        elif key.endswith("_pattern") and isinstance(value, str) and len(value) == blocks:
            setattr(text, key, "".join(value[index] for index in kept))
    text.num_hidden_layers = len(kept)
    for part in [new] if text is new else [new, text]:
        if (widths := getattr(part, "pruned_layers", None)) is not None:
            part.pruned_layers = {str(place[int(i)]): found for i, found in widths.items() if int(i) in place}
        if (structure := getattr(part, "pruned_structure", None)) is not None:
            of = [{**one, "of": [place[i] for i in one["of"] if i in place]} for one in structure["parts"]]
            part.pruned_structure = {**structure, "parts": [one for one in of if one["of"]]}
    return new


def _each(key: str, value: Any, blocks: int) -> bool:
    """Whether a config's value is a list of something for each block; ids of tokens may be as many by chance."""
    return isinstance(value, list | tuple) and len(value) == blocks and "token" not in key and "arch" not in key
