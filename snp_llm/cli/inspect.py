"""`snp-llm inspect`: what a config says of a model, and what a prune would take. Parses no arguments."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.cli.estimates import print_estimate, resource_facts
from snp_llm.cli.inspect_segments import inspect_segments, print_segments
from snp_llm.cli.layouts import LAYOUTS, layout_facts
from snp_llm.models.anatomy import Anatomy, blocks_path
from snp_llm.models.depth import recipe_anatomy
from snp_llm.models.experts import of_experts
from snp_llm.models.projections import Projection
from snp_llm.models.segments import Segments
from snp_llm.models.site import Site
from snp_llm.models.size import ModelSize, model_size
from snp_llm.models.staying import mixers, what_stays
from snp_llm.models.task import TEXT, task_of
from snp_llm.models.text_part import text_config, text_modules
from snp_llm.pruning.run import resolve
from snp_llm.pruning.widths.costs import sparsity_costs
from snp_llm.pruning.widths.depth import block_costs
from snp_llm.pruning.widths.paired import paired_budgets
from snp_llm.recipe.commands import InspectRecipe, Talk
from snp_llm.recipe.recipe import Layout, Recipe, ResolvedRecipe
from snp_llm.runtime.numbers import human_bytes
from snp_llm.runtime.terminal import print_json, print_table, table_of

# Columns of the table of layouts, by what they have of `layout_facts`.
OF_LAYOUTS = {
    "widths": "widths",
    "round_to": "FFN in multiples of",
    "heads": "heads",
    "channels": "FFN",
    "experts": "experts",
    "saved_as": "saved as",
    "loads_in": "loads in",
    "with_all_heads_also_in": "with all heads also in",
}


def run_inspect(recipe: InspectRecipe, talk: Talk) -> None:
    """Print what a config says."""
    model = load_skeleton(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    facts = inspect(model, Recipe(**vars(recipe)))  # all of whose settings a prune has as well
    if talk.json:
        print_json(facts)
    else:
        print_inspection(facts)


UNITS = ("blocks", "heads", "KV groups", "channels a head", "FFN channels", "channels of every expert", "experts")

SITES = ("block", "attention", "ffn", "experts", "channels of experts")

KINDS = ("embeddings", "attention", "FFN", "mixers", "experts", "norms", "head", "other")


def inspect(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Everything that `snp-llm inspect` shows, ready for JSON.

    Args:
        model: a model or its skeleton on the meta device.
        recipe: of the prune whose resources are estimated; not resolved.
    """
    anatomy = recipe_anatomy(model, recipe)
    if isinstance(anatomy.blocks, Segments):
        return {**inspect_segments(anatomy, recipe), "prune": resource_facts(model, resolve(recipe, model))}
    family, blocks = anatomy.family, anatomy.blocks
    firsts = {SITES[-1] if site.nested else site.kind: site for site in reversed(anatomy.sites)}
    shaped = {
        layout: resolve(replace(recipe, layout=layout), model)
        for layout in LAYOUTS
        if layout != "padded" or (recipe.depth == "never" and recipe.experts not in ("whole", "both"))  # none go there
    }
    resolved = shaped[recipe.layout]
    size = model_size(model, resolved.seq_len, recipe.experts)
    return {
        "model": recipe.model,
        "task": task_of(model.config).name,
        "windows": task_of(model.config).windows,
        "family": family.name,
        "model_type": model.config.model_type,
        "blocks": len(blocks),
        "hidden_size": int(text_config(model.config).hidden_size),
        "positions": int(getattr(text_config(model.config), "max_position_embeddings", 0)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "units": [block_units(anatomy.sites_of(index)) for index in range(len(blocks))],
        "sites": {kind: _site_facts(anatomy, firsts[kind]) for kind in SITES if kind in firsts},
        "stays": what_stays(anatomy),
        "parameters": {"all": size.parameters, **parameters_by_kind(anatomy)},
        "bytes": size.bytes,
        "flops_a_token": size.flops,
        "sparsity": sparsity_facts(anatomy, size, shaped),
        "layouts": {layout: layout_facts(anatomy, layout, one.round_to) for layout, one in shaped.items()},
        "prune": resource_facts(model, resolved),
    }


def block_units(sites: Sequence[Site]) -> dict[str, int | None]:
    """Heads, KV groups and channels of a block, and what of its experts may go, from its sites; None for the rest."""
    heads = next((site.heads for site in sites if site.heads is not None), None)
    experts = {site.whole: site.units for site in sites if site.mixture is not None}
    return {
        "heads": None if heads is None else heads.query,
        "kv_groups": None if heads is None else heads.key_value,
        "head_size": None if heads is None else heads.size,
        "channels": next((site.units for site in sites if site.kind == "ffn"), None),
        "expert_channels": experts.get(False),
        "experts": experts.get(True),
    }


def parameters_by_kind(anatomy: Anatomy) -> dict[str, int]:
    """Parameters of each of `KINDS`, tied ones once; a head that is tied to the embeddings has none of its own."""
    counts: Counter[str] = Counter()
    model, prefix = anatomy.model, blocks_path(anatomy.model) + "."
    inside = {f"{prefix}{site.block}.{site.module}.": "attention" for site in anatomy.sites if site.heads is not None}
    inside |= {
        f"{prefix}{index}.{name}.": "mixers"
        for index in range(len(anatomy.blocks))
        for name, _ in mixers(anatomy, index)
    }
    head = model.get_output_embeddings()
    seen, text = set[int](), text_modules(model)
    for name, module in model.named_modules():
        kind = _kind(name, module, prefix, inside) if module in text else "other"
        kind = "head" if module is head else kind
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[kind] += parameter.numel()
    return {kind: counts[kind] for kind in KINDS}


def _kind(name: str, module: nn.Module, prefix: str, inside: dict[str, str]) -> str:
    if "norm" in type(module).__name__.lower():
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if not name.startswith(prefix):
        return "other"
    if of_experts(name):
        return "experts"
    found = next((kind for path, kind in inside.items() if f"{name}.".startswith(path)), None)
    return found or ("FFN" if isinstance(module, Projection) else "other")


def sparsity_facts(anatomy: Anatomy, size: ModelSize, shaped: dict[Layout, ResolvedRecipe]) -> dict[str, Any]:
    """What sparsity, which is a share of the block-linear parameters, means for this model.

    Args:
        anatomy: of the dense model.
        size: of it.
        shaped: the recipe, resolved for every layout.

    Returns:
        The share of all parameters that these are, what the sparsity asked for removes of the whole model, and for each
        layout the largest sparsity of the FFN alone, of the heads alone and of both; of whole blocks where these may
        go.
    """
    sparsity = shaped["compact"].sparsity_of("ffn")
    removed = sparsity * size.block_linear
    largest, sites = {}, anatomy.sites
    costs = sparsity_costs(sites, size.block_linear)
    for layout in ("compact", "uniform"):
        gone, whole = (dict.fromkeys(("attention", "ffn"), 0.0) for _ in range(2))
        budgets, _ = paired_budgets(anatomy, shaped[layout], [None] * len(sites), costs.sites)
        for site, budget in zip(sites, budgets, strict=True):
            if site.whole_block:
                continue
            kind = "attention" if site.heads is not None else "ffn"  # experts are FFNs
            gone[kind] += budget.cost(budget.units) - budget.cost(budget.widths()[0])
            whole[kind] += 0 if site.nested else site.parameters
        largest[layout] = {
            "ffn": gone["ffn"] / (whole["ffn"] or 1),
            "heads": gone["attention"] / (whole["attention"] or 1),
            "both": sum(gone.values()) / size.block_linear,
        }
        if any(site.whole_block for site in sites):
            each = block_costs(sites, costs)
            largest[layout]["blocks"] = (sum(each) - min(each)) / size.block_linear
    return {
        "block_linear": size.block_linear,
        "block_linear_share": size.block_linear / size.parameters,
        "asked": sparsity,
        "whole_model_reduction": removed / size.parameters,
        "parameters_after": round(size.parameters - removed),
        "largest": largest,
    }


def _site_facts(anatomy: Anatomy, site: Site) -> dict[str, Any]:
    inside = [s for s in anatomy.sites if site.whole_block and s.block == site.block and s != site]
    return {
        "in_projections": [producer.path for producer in site.producers],
        "out_projection": site.path,
        "unit": site.unit,
        "parameters_a_unit": site.cost + sum(s.units * s.cost for s in inside),
        "prunable": site.prunable,
        "stay": site.stay,
    }


def print_inspection(facts: dict[str, Any]) -> None:
    """Prints an inspection for people."""
    if "segments" in facts:
        print_segments(facts)
        print_estimate(facts["prune"], facts["prune"]["device"])
        return
    print(
        f"{facts['model']}: {facts['family']} ({facts['model_type']}), {facts['blocks']} blocks, hidden size "
        f"{facts['hidden_size']:,}, {facts['positions']:,} positions, {facts['dtype']}, "
        f"{human_bytes(facts['bytes'])} of weights"
    )
    for kind, site in facts["sites"].items():
        projections = [*filter(None, (", ".join(site["in_projections"]), site["out_projection"]))]
        what = f"{site['unit']} of {' and '.join(projections)}" if projections else site["unit"]
        stays = "" if site["prunable"] else f"; they stay, since {site['stay']}"
        print(f"{kind} site: {what}, {site['parameters_a_unit']:,} parameters each{stays}")
    for line in facts["stays"]:
        print(line)
    print()
    units = [*_unit_rows(facts)]
    shown = [i for i in range(len(UNITS)) if i < 5 or any(row[i] != "-" for row in units)]
    print_table(table_of([UNITS[i] for i in shown], [[row[i] for i in shown] for row in units]))
    print()
    everything = facts["parameters"]["all"]
    kinds = [(k, n) for k, n in facts["parameters"].items() if n or k == "head"]
    rows = [(kind, f"{count:,}", f"{100 * count / everything:.1f} %") for kind, count in kinds]
    print_table(table_of(("parameters", "", "share"), rows))
    if not facts["parameters"]["head"] and facts["task"] == TEXT.name:
        print("the head is tied to the embeddings")
    print()
    print_sparsity(facts["sparsity"])
    print()
    columns = ("layout", *(OF_LAYOUTS[key] for key in next(iter(facts["layouts"].values()))))
    rows = [
        (layout, *(", ".join(v) if isinstance(v, list) else str(v) for v in values.values()))
        for layout, values in facts["layouts"].items()
    ]
    print_table(table_of(columns, rows))
    print()
    prune = facts["prune"]
    print(f"A prune on {prune['windows']} {facts['windows']} of {prune['seq_len']:,} tokens, evaluation not counted:")
    print_estimate(prune, prune["device"])


def print_sparsity(facts: dict[str, Any]) -> None:
    """Prints what sparsity means for a model."""
    print(
        f"Sparsity is a share of the block-linear parameters: {facts['block_linear']:,}, "
        f"{100 * facts['block_linear_share']:.1f} % of all. Sparsity {facts['asked']:g} makes the whole model "
        f"{100 * facts['whole_model_reduction']:.1f} % smaller: {facts['parameters_after']:,} parameters."
    )
    for layout, most in facts["largest"].items():
        shares = {key: f"{math.floor(1000 * share) / 1000:.3f}" for key, share in most.items()}
        ffn = f"of the FFN alone {shares['ffn']}" if most["ffn"] else "FFN channels stay"
        heads = f"of the heads alone {shares['heads']}" if most["heads"] else "heads stay"
        blocks = f", of blocks {shares['blocks']}" if "blocks" in shares else ""
        print(f"Largest sparsity, layout {layout}: {ffn}, {heads}, of both {shares['both']}{blocks}.")


def _unit_rows(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of blocks with their units, neighbours of the same widths in one."""
    at = 0
    for units, group in itertools.groupby(facts["units"]):
        length = len([*group])
        name = f"{at}" if length == 1 else f"{at} to {at + length - 1}"
        yield (name, *("-" if count is None else f"{count:,}" for count in units.values()))
        at += length
