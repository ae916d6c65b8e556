"""Stock configs: which widths they can say, by which keys, and the config that says them. Knows no files."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import EXPERT_KEYS, FFN_AS_SAID, FFN_KEYS
from snp_llm.models.families.family import Family
from snp_llm.models.offload import disk_index, read_tensor
from snp_llm.models.outline import Widths, ffn_kinds, part_widths, structure_of, width_keys
from snp_llm.models.registry import dense_type
from snp_llm.models.site import Heads, Site, consumers_of, projecting
from snp_llm.models.text_part import parts_of, text_config, text_values
from snp_llm.models.trial_config import as_text, says

# Of a pruned or loaded model alone; they say nothing about the shapes.
PRIVATE_KEYS = ("pruned_layers", "pruned_structure", "auto_map", "model_type", "architectures", "transformers_version")

KNOWN_WHEREVER = ("layer_types",)  # what transformers reads of any config, whether its class declares it or not


def plain_config(dense: PreTrainedModel, family: Family, widths: Sequence[Widths]) -> PretrainedConfig | None:
    """The stock config for these widths, by block, or None where there is none.

    Blocks that were alike have to be alike still, and for what has changed there has to be a key.
    """
    structure = structure_of(dense)
    parts = structure["parts"]
    whole, model_type = known_values(dense), family.model_type
    whole.pop("tie_word_embeddings", None)
    values = text_values(dense.config, whole)
    heads = {(old, widths[i][0]) for part in parts if (old := part_widths(part)[0]) is not None for i in part["of"]}
    if any(old != new for old, new in heads):
        (_, new), *others = heads
        found = None if others or new is None else plain_type(dense, family, new)
        if found is None or new is None:
            return None
        model_type = found
        if _loses_heads(dense, family, new):
            values.update(_head_values(dense, family, new) or {})
        values.update({key: count for key, count in width_keys(family, new, None).items() if key in values})
    for kind in ffn_kinds(structure):
        channels = {width for index in kind.blocks if (width := widths[index][1]) is not None}
        key = ffn_key(dense, family, kind.facts) if channels != {kind.facts["width"]} or family.alike else None
        if len(channels) > 1 or 0 in channels or (key is None and channels != {kind.facts["width"]}):
            return None
        if key in values:
            values.update(_ffn_values(values, key, kind.facts["width"], channels.pop()))
    for kind in ffn_kinds(structure, "experts"):
        for number, key in enumerate(expert_keys(dense, kind.facts)):
            both = ((widths[index].channels, widths[index].experts)[number] for index in kind.blocks)
            counts = {width for width in both if width is not None}
            if counts <= {kind.facts["widths"][number]}:
                continue
            if len(counts) > 1 or key is None:
                return None
            values[key] = counts.pop()
    if model_type != family.model_type:
        known = AutoConfig.for_model(model_type).to_dict()
        for key in values.keys() - known.keys():
            del values[key]
        values["sliding_window"] = None
    if values is not whole:
        values["model_type"], model_type = model_type, dense_type(dense.config)
    return AutoConfig.for_model(model_type, **whole, tie_word_embeddings=stays_tied(dense))


def ffn_key(dense: PreTrainedModel, family: Family, facts: dict[str, Any]) -> str | None:
    """The config key of the FFNs of a kind, and of nothing else; None: there is none, and they cannot change alike."""
    if family.alike:
        return family.ffn_key
    width, values = facts["width"], text_values(dense.config, known_values(dense))
    half = width // 2 or 1
    part = {"of": "ffn", "was": facts, "new": {facts["key"]: half}}
    for key in FFN_KEYS:
        changed = _ffn_values(values, key, width, half)
        likely = values.get(key) in (width, 2 * width) or len(changed) > 1
        if key in values and likely and _says(dense, changed, part):
            return key
    return None


def expert_keys(dense: PreTrainedModel, facts: dict[str, Any]) -> tuple[str | None, ...]:
    """The config keys of the channels of experts of a kind, and of how many experts there are, and of nothing else.

    None: there is none, and these cannot change alike.
    """
    values, found = text_values(dense.config, known_values(dense)), []
    for name, width, keys in zip(facts["keys"], facts["widths"], EXPERT_KEYS, strict=True):
        half = width - width // 2
        part = {"of": "experts", "was": facts, "new": {name: half}}
        likely = (key for key in keys if values.get(key) == width and half < width)
        found.append(next((key for key in likely if _says(dense, {key: half}, part)), None))
    return tuple(found)


def _ffn_values(values: dict[str, Any], key: str, was: int, width: int) -> dict[str, int]:
    """What a config says of FFNs of a width, by the key of their width.

    Some count the rows of gate and up together, and some say what the width is computed from.
    """
    as_said = {name: value for name, value in FFN_AS_SAID.items() if values.get(name, value) != value}
    return {key: 2 * width if values.get(key) == 2 * was and not as_said else width, **as_said}


def _head_values(
    dense: PreTrainedModel, family: Family, heads: Heads, *, by_query: bool | None = None
) -> dict[str, int] | None:
    """What a plain config needs beside head counts, so that heads stay as large as they are; None: nothing helps.

    Of a type without an entry half as many heads are tried.

    Args:
        dense: the dense model.
        family: its family.
        heads: that the config is to say.
        by_query: whether query heads alone go; None: as these heads have.
    """
    if family.alike:
        return None if family.head_dim_key is None else {family.head_dim_key: heads.size}
    of_parts = {old for part in structure_of(dense)["parts"] if (old := part_widths(part)[0]) is not None}
    if len(of_parts) != 1:
        return None
    (old,) = of_parts
    size, group = old.size, old.query // old.key_value
    if by_query is None:
        by_query = old.key_value == heads.key_value < old.query
    kept = max(1, (group if by_query else old.key_value) // 2)
    fewer = Heads(kept * old.key_value, old.key_value, size) if by_query else Heads(kept * group, kept, size)
    new, text = width_keys(family, fewer, None), text_config(dense.config)
    part = {"of": "attention", "was": {"heads": [old.query, old.key_value]}, "new": new}
    counts = {key: count for key, count in new.items() if hasattr(text, key)}
    return next((more for more in ({}, {"head_dim": size}) if _says(dense, {**counts, **more}, part)), None)


def _says(dense: PreTrainedModel, changed: dict[str, int], part: dict[str, Any]) -> bool:
    facts = (as_text(known_values(dense)), as_text(_changed(dense, changed)), as_text(structure_of(dense)))
    return says(dense_type(dense.config), *facts, as_text(part))


def _changed(dense: PreTrainedModel, numbers: dict[str, int]) -> dict[str, Any]:
    """What a stock config knows of the dense model's, with other numbers for its text model."""
    whole = known_values(dense)
    text_values(dense.config, whole).update(numbers)
    return whole


def _takes(dense: PreTrainedModel, changed: dict[str, int]) -> bool:
    """Whether the class of a plain config accepts numbers that differ from the dense model's."""
    try:
        AutoConfig.for_model(dense_type(dense.config), **_changed(dense, changed))
    except Exception:  # whatever its checks raise
        return False
    return True


def plain_type(dense: PreTrainedModel, family: Family, heads: Heads) -> str | None:
    """The model_type of the stock config that can say these heads, or None.

    A config that ties the head dimension to the number of heads cannot lose heads. One that wants head counts to divide
    the hidden size (Llama) is replaced by one that computes the same and does not (Mistral, without a sliding window),
    unless there are biases, for which that has no place.
    """
    if _loses_heads(dense, family, heads):
        more = _head_values(dense, family, heads)
        if more is None or not (family.alike or _takes(dense, {**width_keys(family, heads, None), **more})):
            return None
    if not family.divides_hidden or text_config(dense.config).hidden_size % heads.query == 0:
        return family.model_type
    return None if _has_biases(dense, family) else family.substitute


def uniform_types(dense: PreTrainedModel, family: Family, site: Site) -> dict[int, str]:
    """The widths of an attention site that a plain config can hold in every block, ascending, without "all units", each
    with the model_type of that config."""
    assert site.heads is not None
    if _head_values(dense, family, site.heads, by_query=site.groups > 0) is None:
        return {}
    found = {}
    for width in range(site.step, site.units, site.step):
        heads = site.heads_after(width)
        if family.alike:
            kind = plain_type(dense, family, heads)
        else:
            kind = family.model_type if _takes(dense, width_keys(family, heads, None)) else None
        if kind is not None:
            found[width] = kind
    return found


def uniform_widths(dense: PreTrainedModel, family: Family, site: Site) -> tuple[int, ...]:
    """The widths that `uniform_types` knows a type for."""
    return tuple(uniform_types(dense, family, site))


def known_values(dense: PreTrainedModel) -> dict[str, Any]:
    """What a stock config knows of the dense model's, but whether embeddings are tied.

    Keys that no stock class declares may name code that a reader would fetch and run, which takes text: numbers among
    them are kept, since transformers reads some (a head dimension), all else is dropped.
    """
    return _known_values(dense.config, AutoConfig.for_model(dense_type(dense.config)))


def _known_values(config: PretrainedConfig, stock: PretrainedConfig) -> dict[str, Any]:
    known = {*stock.to_dict(), *KNOWN_WHEREVER}
    values = {
        key: value
        for key, value in config.to_dict().items()
        if key not in PRIVATE_KEYS and (key in known or value is None or isinstance(value, int | float))
    }
    for key, part in parts_of(config).items():
        values[key] = {**_known_values(part, type(part)()), "model_type": part.model_type}
    return values


def stays_tied(dense: PreTrainedModel) -> bool:
    """Whether the head is the embeddings, as the config says."""
    return says_tied(dense) and _is_tied(dense)


def says_tied(model: PreTrainedModel) -> bool:
    """Whether a config says that the head is the embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embeddings: one tensor, or two that hold the same."""
    head, embeddings = (next(find().parameters()) for find in (model.get_output_embeddings, model.get_input_embeddings))
    if head is embeddings:
        return True
    index, names = disk_index(model), {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    values = [read_tensor(index[names[id(p)]], p) if p.is_meta else p.detach() for p in (head, embeddings)]
    return torch.equal(*values)


def _loses_heads(dense: PreTrainedModel, family: Family, heads: Heads) -> bool:
    text = text_config(dense.config)
    return any(getattr(text, key, None) != count for key, count in width_keys(family, heads, None).items())


def _has_biases(dense: PreTrainedModel, family: Family) -> bool:
    block = find_blocks(dense)[0]
    sites = find_sites(nn.ModuleList([block]), family)
    made = [module for site in sites for _, module in projecting(block, site)]
    read = [module for site in sites for module in consumers_of(block, site)]
    return any(module.bias is not None for module in (*made, *read))
