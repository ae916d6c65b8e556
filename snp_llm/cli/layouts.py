"""What the layouts write and what loads that, known before any calibration. Parses no arguments."""

from typing import Any

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.families.family import PRUNED
from snp_llm.models.layouts import needs_code
from snp_llm.models.outline import ffn_kinds, structure_of
from snp_llm.models.plain import expert_keys, ffn_key, uniform_types
from snp_llm.models.registry import dense_type
from snp_llm.models.segments import Segments
from snp_llm.models.text_part import text_config
from snp_llm.recipe.recipe import Layout

LAYOUTS: dict[Layout, str] = {
    "compact": "their own in every block",
    "uniform": "the same in every block",
    "padded": "their own, filled up with zeros",
}

SEGMENT_LAYOUTS: dict[Layout, str] = {
    "compact": "their own in every layer",
    "uniform": "one share in every stage",
    "padded": "their own, filled up with zeros",
}


def layout_facts(anatomy: Anatomy, layout: Layout, round_to: int) -> dict[str, Any]:
    """What a layout writes and what loads it, known before any calibration.

    Args:
        anatomy: of the dense model.
        layout: one of `LAYOUTS`.
        round_to: what FFN widths are multiples of.

    Returns:
        Widths, whether heads and FFN channels may go, the model_types that the config may have, what loads that, and
        what else does where all heads stay.
    """
    dense, family = anatomy.model, anatomy.family
    if isinstance(anatomy.blocks, Segments):
        return segment_layout_facts(anatomy, layout, round_to)
    attentions = [site for site in anatomy.sites if site.heads is not None and site.prunable]
    own, alone = dense_type(dense.config), text_config(dense.config) is dense.config
    heads_go, types, engines = bool(attentions), [own], family.engines
    kinds = ffn_kinds(structure_of(dense))
    going = [kind for kind in kinds if layout != "uniform" or ffn_key(dense, family, kind.facts) is not None]
    blocks = sum(len(kind.blocks) for kind in going)
    if layout == "compact" or (layout == "padded" and needs_code(dense.config)):  # no width changes in that
        types, engines = [f"{PRUNED}{own}"], ("transformers with trust_remote_code",)
    elif layout == "uniform" and attentions:
        equal = uniform_types(dense, family, attentions[0])
        types += equal.values() if alone else []
        heads_go, engines = bool(equal), family.head_engines if equal else family.engines
    return {
        "widths": LAYOUTS[layout],
        "round_to": round_to,
        "heads": "go" if heads_go else "stay",
        "channels": _gone(len(going), len(kinds), blocks),
        **_of_experts(anatomy, layout),
        "saved_as": [*dict.fromkeys(types)],
        "loads_in": [*engines],
        "with_all_heads_also_in": [e for e in family.engines if layout == "uniform" and e not in engines],
    }


def _gone(going: int, kinds: int, blocks: int) -> str:
    """Whether channels of FFNs of so many kinds go."""
    if not kinds:
        return "none"
    return "stay" if not going else "go" if going == kinds else f"go in {blocks} blocks"


def _of_experts(anatomy: Anatomy, layout: Layout) -> dict[str, str]:
    """Whether experts go, or channels of theirs, where they are cut at all."""
    cut = {site.whole for site in anatomy.sites if site.mixture is not None}
    if not cut:
        return {}
    keys = [expert_keys(anatomy.model, kind.facts) for kind in ffn_kinds(structure_of(anatomy.model), "experts")]
    going = [whole for whole in cut if layout != "uniform" or all(found[whole] for found in keys)]
    words = " and ".join(EXPERTS[whole] for whole in sorted(going, reverse=True))
    return {"experts": f"{words} go" if words else "stay"}


EXPERTS = {True: "whole ones", False: "channels"}  # by whether an expert goes as a whole


def layout_line(layout: str, facts: dict[str, Any]) -> str:
    """What a layout writes and what loads it, on one line."""
    also = f", with --head-sparsity 0 also in {', '.join(more)}" if (more := facts["with_all_heads_also_in"]) else ""
    channels = "" if facts["channels"] in ("go", "none") else f"FFN channels {facts['channels']}; "
    channels += f"of experts {facts['experts']}; " if "experts" in facts else ""
    if "heads" not in facts:
        return (
            f"layout {layout}: widths: {facts['widths']}, in multiples of {facts['round_to']}; saved as "
            f"{' or '.join(facts['saved_as'])}; loads in {', '.join(facts['loads_in'])}"
        )
    return (
        f"layout {layout}: widths: {facts['widths']}, of the FFN in multiples of {facts['round_to']}; heads "
        f"{facts['heads']}; {channels}saved as {' or '.join(facts['saved_as'])}; loads in "
        f"{', '.join(facts['loads_in'])}{also}"
    )


def depth_line(model_type: str, facts: dict[str, Any], *, halves: bool) -> str:
    """What is written where blocks alone go, and what loads that, on one line.

    Args:
        model_type: that is written where blocks go whole.
        facts: of its layout.
        halves: whether attentions and FFNs may go as well and leave the rest of their block.
    """
    if not halves:
        return f"whole blocks go, no heads or channels; saved as {model_type}, loads in what loads MODEL"
    return (
        "whole blocks, attentions and FFNs go, no single heads or channels; saved as "
        f"{' or '.join(facts['saved_as'])}, loads in {', '.join(facts['loads_in'])}; if only whole blocks go, in what "
        "loads MODEL"
    )


def segment_layout_facts(anatomy: Anatomy, layout: Layout, round_to: int) -> dict[str, Any]:
    """What a layout writes and what loads it, known before any calibration."""
    own = dense_type(anatomy.model.config)
    pruned = f"{PRUNED}{own.removesuffix('_bn')}"
    plain = layout == "padded" or (layout == "uniform" and own == "resnet")
    return {
        "widths": SEGMENT_LAYOUTS[layout],
        "round_to": round_to,
        "channels": "go",
        "saved_as": [own if plain else pruned],
        "loads_in": ["transformers" if plain else "transformers with trust_remote_code"],
        "with_all_heads_also_in": [],
    }
