"""`snp-llm families`: the types of models that tests are run on, from their tables and their configs' keys alone."""

from typing import Any

from transformers import AutoConfig

from snp_llm.models.families.decoders import FAMILIES, WRAPPERS, find_family
from snp_llm.models.families.family import Family
from snp_llm.recipe.commands import FamiliesRecipe, Talk
from snp_llm.runtime.terminal import print_json, print_table, table_of

COLUMNS = ("model_type", "family", "kind", "heads", "uniform FFN", "uniform heads", "stays", "loads in")
NOTE = """\
Heads and FFN channels go; so do those of experts that all tokens share, and what else blocks have stays as it is.
--layout compact writes any widths, for transformers; --layout uniform writes a plain config where it says so, for what
the last column names. Another decoder whose blocks look like these is pruned as well, after a trial."""


def run_families(_recipe: FamiliesRecipe, talk: Talk) -> None:
    """Print the table of families."""
    facts = families()
    if talk.json:
        print_json({"families": facts})
        return
    print_table(table_of(COLUMNS, [family_row(fact) for fact in facts]))
    print(NOTE)


def families() -> list[dict[str, Any]]:
    """What the tables say of every type, ready for JSON."""
    return [_facts(find_family(AutoConfig.for_model(e.model_type)) if e.alike else e) for e in (*FAMILIES, *WRAPPERS)]


def _facts(family: Family) -> dict[str, Any]:
    units, heads, ffn = ["KV groups", "query heads"] if family.kv_heads_key is not None else ["heads"], "", ""
    if family.alike:
        heads, ffn = _plain_heads(family), "yes" if family.ffn_key else ""
    else:
        heads = "yes" if "heads" in family.uniform else ""
        ffn = "yes" if "FFN" in family.uniform else "dense ones" if "dense FFN" in family.uniform else ""
    return {
        "model_type": family.model_type,
        "name": family.name,
        "kind": family.kind,
        "head_units": [] if family.heads_stay else units,
        "heads_stay": family.heads_stay,
        "layouts": {"compact": True, "uniform_ffn": ffn, "uniform_heads": heads},
        "stays": family.stays,
        "engines": list(family.engines if ffn or heads else ()),
        "head_engines": list(family.head_engines if heads else ()),
    }


def _plain_heads(family: Family) -> str:
    """Which head counts the plain config can hold, in words; empty where it can hold none but the dense model's."""
    if family.heads_stay or family.head_dim_key is None:
        return ""
    if not family.divides_hidden:
        return "any"
    return f"any, some as {family.substitute.capitalize()}" if family.substitute else "divisors of the hidden size"


def family_row(fact: dict[str, Any]) -> tuple[str, ...]:
    """A family in words, in the order of `COLUMNS`."""
    engines, more = fact["engines"], fact["head_engines"]
    loads = ", ".join(engines)
    if more and more != engines:
        loads += f"; with fewer heads {', '.join(more)}"
    return (
        fact["model_type"],
        fact["name"],
        fact["kind"],
        " or ".join(fact["head_units"]) or f"stay: {fact['heads_stay']}",
        fact["layouts"]["uniform_ffn"] or "no",
        fact["layouts"]["uniform_heads"] or "no",
        fact["stays"] or "-",
        loads or "-",
    )
