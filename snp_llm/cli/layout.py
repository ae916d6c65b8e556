"""What a layout will write and what loads it, in words, before any calibration."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from snp_llm.models.families.decoders import find_family
from snp_llm.models.layouts import FEWEST_STEPS, KERNEL_MULTIPLE, uniform_widths
from snp_llm.models.site import Site


def describe_layout(dense: PreTrainedModel, sites: Sequence[Site], layout: str, round_to: int) -> str:
    """What will be written, what loads it and why, known before any calibration.

    Args:
        dense: the model to be pruned.
        sites: its sites.
        layout: "uniform", "compact" or "padded".
        round_to: what FFN widths are multiples of.
    """
    family = find_family(dense.config)
    stuck = "" if sites[0].prunable else f" Heads stay: {sites[0].stay}."
    if layout == "padded":
        return (
            f"layout padded: zeros in the dense shape, loads wherever the dense {family.name} model does "
            f"({', '.join(family.engines)}) and saves nothing.{stuck}"
        )
    rounding = f"FFN widths are multiples of {round_to}."
    if layout == "uniform" and round_to < KERNEL_MULTIPLE and sites[1].units < KERNEL_MULTIPLE * FEWEST_STEPS:
        rounding = (
            f"FFN widths are multiples of {round_to}; {KERNEL_MULTIPLE} would be too coarse for {sites[1].units}."
        )
    if layout == "compact":
        others = " or ".join(family.engines[1:])
        elsewhere = f", not in {others} (--layout uniform for those)" if others else ""
        return (
            f"layout compact: widths of its own in every block, which no plain {family.name} config can hold; the "
            f"folder carries a modelling file and loads in transformers with trust_remote_code=True{elsewhere}. Should "
            f"all widths come out equal, a plain config is written where it can hold them. {rounding}{stuck}"
        )
    widths = uniform_widths(dense, family, sites[0]) if sites[0].prunable else ()
    engines = family.head_engines if widths else family.engines
    text = (
        f"layout uniform: the same widths in every block, a plain config without code, loads in {', '.join(engines)}."
    )
    if widths and (others := ", ".join(e for e in family.engines if e not in engines)):
        text += f" With --head-sparsity 0 also in {others}: they derive the head size from the number of heads."
    if family.ffn_key is None:
        return f"{text} A plain {family.name} config has no key for FFN widths: they stay.{stuck}"
    if stuck:
        text += stuck
    elif not widths:
        text += (
            f" Heads stay, since a plain {family.name} config ties their size to their number: the FFN takes the whole "
            "budget."
        )
    elif family.substitute and any(dense.config.hidden_size % sites[0].heads_after(w).query for w in widths):
        text += (
            f" Head counts that do not divide the hidden size {dense.config.hidden_size:,} are refused by "
            f"{family.name}'s config; the same weights are then saved as a {family.substitute.capitalize()} model with "
            "an explicit head_dim."
        )
    return f"{text} {rounding}"
