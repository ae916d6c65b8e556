"""Where a model has heads and channels, and how many, as a config can say it for readers without this package."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from snp_llm.models import modeling_snp
from snp_llm.models.anatomy import blocks_path, find_blocks
from snp_llm.models.experts import find_experts
from snp_llm.models.families.decoders import FFN_KEYS, find_family
from snp_llm.models.families.family import Family
from snp_llm.models.site import Heads
from snp_llm.models.structure import find_attention, find_ffn

EXPERTS = ("moe_intermediate_size", "num_experts")  # what channels and experts are called in `pruned_layers`


class Widths(NamedTuple):
    """Heads, FFN channels, channels of each expert, and experts of a block, where it has them."""

    heads: Heads | None
    ffn: int | None
    channels: int | None = None
    experts: int | None = None


def structure_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where a model that no block of has been pruned has heads and channels, for readers without this package.

    Returns:
        `blocks`, the path of the list of blocks, and `parts`: for blocks that are alike their numbers (`of`), and of
        attention, FFN and experts, where there are any: the config keys of their widths, these widths, the rows that
        each of these has in every tensor, and the path of the out-projection. That of a model that was pruned is the
        one which it came with.
    """
    known: dict[str, Any] | None = getattr(model.config, "pruned_structure", None)
    if known is not None:
        return known
    family = find_family(model.config)
    parts: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for index, block in enumerate(find_blocks(model)):
        part: dict[str, Any] = {}
        if (attention := find_attention(block)) is not None:
            part["attention"] = {
                "keys": [family.heads_key, family.kv_heads_key],
                "heads": [attention.heads.query, attention.heads.key_value],
                "size": attention.heads.size,
                "module": attention.module,
                "rows": {rows.path: [rows.query, rows.key_value] for rows in attention.rows},
                "out": attention.out,
            }
        if (ffn := find_ffn(block)) is not None:
            key = family.ffn_key or FFN_KEYS[0]
            part["ffn"] = {"key": key, "width": ffn.channels, "rows": dict(ffn.rows), "out": ffn.out}
        if (mixture := find_experts(block)) is not None:
            part["experts"] = {
                "keys": [*EXPERTS],
                "widths": [mixture.channels, mixture.count],
                "module": mixture.module,
                "channels": {path: [*where] for path, where in mixture.stacked.items()},
                "rows": dict(mixture.rows),
            }
        parts.setdefault(repr(part), (part, []))[1].append(index)
    return {"blocks": blocks_path(model), "parts": [{"of": of, **part} for part, of in parts.values()]}


modeling_snp.DESCRIBE["model"] = structure_of


def block_widths(block: nn.Module) -> Widths:
    """Heads, channels and experts of a block, where it has them."""
    attention, ffn, mixture = find_attention(block), find_ffn(block), find_experts(block)
    experts = (None, None) if mixture is None else (mixture.channels, mixture.count)
    return Widths(None if attention is None else attention.heads, None if ffn is None else ffn.channels, *experts)


def part_widths(part: dict[str, Any]) -> Widths:
    """Heads, channels and experts of the blocks that a part of `structure_of` describes, where they have them."""
    attention, ffn, experts = part.get("attention"), part.get("ffn"), part.get("experts")
    heads = None
    if attention is not None:
        query, key_value = attention["heads"]
        heads = Heads(query, key_value, attention["size"])
    return Widths(heads, None if ffn is None else ffn["width"], *(experts["widths"] if experts else ()))


@dataclass(frozen=True)
class FfnKind:
    """FFNs, or experts, that are alike in a model that no block of has been pruned.

    Attributes:
        facts: what `structure_of` says of them.
        blocks: that they are in.
    """

    facts: dict[str, Any]
    blocks: tuple[int, ...]


def ffn_kinds(structure: dict[str, Any], of: str = "ffn") -> list[FfnKind]:
    """The kinds of FFN that a model of this structure has: those of blocks, and experts that all tokens share; or, with
    "experts", those of experts that only some tokens come by."""
    found: dict[str, FfnKind] = {}
    for part in structure["parts"]:
        if (facts := part.get(of)) is not None:
            before = found.get(repr(facts), FfnKind(facts, ()))
            found[repr(facts)] = FfnKind(facts, (*before.blocks, *part["of"]))
    return [*found.values()]


def width_keys(
    family: Family, heads: Heads | None, ffn: int | None, channels: int | None = None, experts: int | None = None
) -> dict[str, int]:
    """Head counts and widths of a block, where it has them, by the keys of a family's config, or of `EXPERTS`."""
    keys = {} if heads is None else {family.heads_key: heads.query}
    if heads is not None and family.kv_heads_key:
        keys[family.kv_heads_key] = heads.key_value
    keys.update({key: width for key, width in zip(EXPERTS, (channels, experts), strict=True) if width is not None})
    return keys if ffn is None else {**keys, family.ffn_key or FFN_KEYS[0]: ffn}
