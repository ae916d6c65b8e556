"""`snp-llm inspect`: what a config says of a model, and what a prune would take. Parses no arguments."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.cli.layout import describe_layout
from snp_llm.linalg.allocation import linear_costs
from snp_llm.models.anatomy import Anatomy, blocks_path, find_anatomy
from snp_llm.models.projections import Projection
from snp_llm.models.site import Site
from snp_llm.models.size import ModelSize, model_size
from snp_llm.pruning.estimate.estimate import Estimate, estimate
from snp_llm.pruning.estimate.work import matmul_rates
from snp_llm.pruning.run import resolve
from snp_llm.pruning.widths.plan import site_budget
from snp_llm.recipe.commands import InspectRecipe, Talk
from snp_llm.recipe.recipe import Layout, Recipe
from snp_llm.runtime.device import device_name, devices_here
from snp_llm.runtime.numbers import human_bytes, human_flops, human_time
from snp_llm.runtime.terminal import print_json, print_table, table_of


def run_inspect(recipe: InspectRecipe, talk: Talk) -> None:
    """Print what a config says."""
    model = load_skeleton(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    same = ("sparsity", "head_unit", "num_samples", "seq_len", "batch_size", "hidden_device", "device", "dtype")
    facts = inspect(model, Recipe(recipe.model, **{name: getattr(recipe, name) for name in same}))
    if talk.json:
        print_json(facts)
    else:
        print_inspection(facts)


LAYOUTS: tuple[Layout, ...] = ("compact", "uniform", "padded")

KINDS = ("embeddings", "attention", "FFN", "norms", "head", "other")


def inspect(model: PreTrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Everything that `snp-llm inspect` shows, ready for JSON.

    Args:
        model: a model or its skeleton on the meta device.
        recipe: of the prune whose resources are estimated; not resolved.
    """
    anatomy = find_anatomy(model, recipe.head_unit)
    family, blocks, sites = anatomy.family, anatomy.blocks, anatomy.sites
    resolved = resolve(recipe, model)
    size = model_size(model, resolved.seq_len)
    needed = estimate(model, resolved)
    return {
        "model": recipe.model,
        "family": family.name,
        "model_type": model.config.model_type,
        "blocks": len(blocks),
        "hidden_size": int(model.config.hidden_size),
        "positions": int(getattr(model.config, "max_position_embeddings", 0)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "units": [block_units(a, f) for a, f in zip(sites[::2], sites[1::2], strict=True)],
        "sites": {site.kind: _site_facts(site) for site in sites[:2]},
        "parameters": {"all": size.parameters, **parameters_by_kind(anatomy)},
        "bytes": size.bytes,
        "flops_a_token": size.flops,
        "sparsity": sparsity_facts(anatomy, size, recipe),
        "layouts": {
            layout: describe_layout(model, sites, layout, resolve(replace(recipe, layout=layout), model).round_to)
            for layout in LAYOUTS
        },
        "prune": _resource_facts(needed, resolved),
    }


def block_units(attention: Site, ffn: Site) -> dict[str, int]:
    """Heads, KV groups and channels of a block."""
    assert attention.heads is not None
    return {
        "heads": attention.heads.query,
        "kv_groups": attention.heads.key_value,
        "head_size": attention.heads.size,
        "channels": ffn.units,
    }


def parameters_by_kind(anatomy: Anatomy) -> dict[str, int]:
    """Parameters of each of `KINDS`, tied ones once; a head that is tied to the embeddings has none of its own."""
    counts: Counter[str] = Counter()
    model, prefix = anatomy.model, blocks_path(anatomy.model) + "."
    attentions = {site.module for site in anatomy.sites if site.heads is not None}
    head = model.get_output_embeddings()
    seen: set[int] = set()
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[_kind(name, module, head, prefix, attentions)] += parameter.numel()
    return {kind: counts[kind] for kind in KINDS}


def _kind(name: str, module: nn.Module, head: nn.Module | None, prefix: str, attentions: set[str | None]) -> str:
    if module is head:
        return "head"
    if "norm" in type(module).__name__.lower():
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if name.startswith(prefix):
        path = name.removeprefix(prefix).partition(".")[2]
        if any(path.startswith(f"{attention}.") or path == attention for attention in attentions):
            return "attention"
        return "FFN" if isinstance(module, Projection) else "other"
    return "other"


def sparsity_facts(anatomy: Anatomy, size: ModelSize, recipe: Recipe) -> dict[str, Any]:
    """What sparsity, which is a share of the block-linear parameters, means for this model.

    Returns:
        The share of all parameters that these are, what `recipe.sparsity` removes of the whole model, and for each
        layout the largest sparsity of the FFN alone, of the heads alone and of both.
    """
    sparsity = recipe.sparsity_of("ffn")
    removed = sparsity * size.block_linear
    largest = {}
    for layout in ("compact", "uniform"):
        shaped = resolve(replace(recipe, layout=layout), anatomy.model)
        gone = {"attention": 0.0, "ffn": 0.0}
        whole = {"attention": 0.0, "ffn": 0.0}
        for site, count in Counter(replace(site, block=0) for site in anatomy.sites).items():  # most blocks are alike
            costs = linear_costs(site.units, site.cost)
            least = site_budget(anatomy, site, shaped, None, costs).widths()[0]
            gone[site.kind] += count * float(costs[-1] - costs[least])
            whole[site.kind] += count * site.parameters
        largest[layout] = {
            "ffn": gone["ffn"] / whole["ffn"],
            "heads": gone["attention"] / whole["attention"],
            "both": sum(gone.values()) / sum(whole.values()),
        }
    return {
        "block_linear": size.block_linear,
        "block_linear_share": size.block_linear / size.parameters,
        "asked": sparsity,
        "whole_model_reduction": removed / size.parameters,
        "parameters_after": round(size.parameters - removed),
        "largest": largest,
    }


def _site_facts(site: Site) -> dict[str, Any]:
    return {
        "in_projections": [producer.path for producer in site.producers],
        "out_projection": site.path,
        "unit": site.unit,
        "parameters_a_unit": site.cost,
        "prunable": site.prunable,
        "stay": site.stay,
    }


def _resource_facts(needed: Estimate, recipe: Recipe) -> dict[str, Any]:
    name = device_name(recipe.device)
    return {
        "windows": recipe.num_samples,
        "seq_len": recipe.seq_len,
        "device": name,
        **estimate_facts(needed, torch.device(name) if name in devices_here() else None),
    }


def estimate_facts(needed: Estimate, device: torch.device | None) -> dict[str, Any]:
    """An estimate ready for JSON, with a rough time for this device; without one that is here, without a time."""
    return {
        "device_bytes": needed.device_bytes,
        "host_bytes": needed.host_bytes,
        "disk_bytes": needed.disk_bytes,
        "flops": needed.flops,
        "seconds_roughly": None if device is None else needed.seconds(matmul_rates(device, needed.dtypes)),
        "breakdown": {
            place: {part.what: part.bytes for part in needed.parts(place)} for place in ("device", "host", "disk")
        },
        "work": {work.what: work.flops for work in needed.work},
    }


def print_inspection(facts: dict[str, Any]) -> None:
    """Prints an inspection for people."""
    print(
        f"{facts['model']}: {facts['family']} ({facts['model_type']}), {facts['blocks']} blocks, hidden size "
        f"{facts['hidden_size']:,}, {facts['positions']:,} positions, {facts['dtype']}, "
        f"{human_bytes(facts['bytes'])} of weights"
    )
    for kind, site in facts["sites"].items():
        stays = "" if site["prunable"] else f"; they stay: {site['stay']}"
        print(
            f"{kind} site: {site['unit']} of {', '.join(site['in_projections'])} and {site['out_projection']}, "
            f"{site['parameters_a_unit']:,} parameters each{stays}"
        )
    print()
    print_table(table_of(("blocks", "heads", "KV groups", "channels a head", "FFN channels"), [*_unit_rows(facts)]))
    print()
    everything = facts["parameters"]["all"]
    kinds = [(k, n) for k, n in facts["parameters"].items() if n or k == "head"]
    rows = [(kind, f"{count:,}", f"{100 * count / everything:.1f} %") for kind, count in kinds]
    print_table(table_of(("parameters", "", "share"), rows))
    if not facts["parameters"]["head"]:
        print("the head is tied to the embeddings")
    print()
    print_sparsity(facts["sparsity"])
    print()
    for text in facts["layouts"].values():
        print(f"- {text}")
    print()
    prune = facts["prune"]
    print(f"A prune on {prune['windows']} windows of {prune['seq_len']:,} tokens, evaluation not counted:")
    print_estimate(prune, prune["device"])


def print_sparsity(facts: dict[str, Any]) -> None:
    """Prints what sparsity means for a model."""
    print(
        f"Sparsity is a share of the block-linear parameters: {facts['block_linear']:,}, "
        f"{100 * facts['block_linear_share']:.1f} % of all. Sparsity {facts['asked']:g} makes the whole model "
        f"{100 * facts['whole_model_reduction']:.1f} % smaller: {facts['parameters_after']:,} parameters."
    )
    for layout, most in facts["largest"].items():
        ffn, heads, both = (f"{math.floor(1000 * most[key]) / 1000:.3f}" for key in ("ffn", "heads", "both"))
        alone = f"of the heads alone {heads}" if most["heads"] else "heads stay"
        print(f"Largest sparsity, layout {layout}: of the FFN alone {ffn}, {alone}, of both {both}.")


def estimate_line(facts: dict[str, Any], device: str) -> str:
    """An estimate's peaks on one line."""
    on_device = f"{human_bytes(facts['device_bytes'])} on {device}, " if facts["device_bytes"] else ""
    return (
        f"about {on_device}{human_bytes(facts['host_bytes'])} of host memory, {human_bytes(facts['disk_bytes'])} of "
        f"disk and {human_flops(facts['flops'])}: {human_time(facts['seconds_roughly'])}, very roughly"
    )


def print_estimate(facts: dict[str, Any], device: str) -> None:
    """Prints an estimate's peaks and what makes them up."""
    for place, name in (("device", f"memory of {device}"), ("host", "host memory"), ("disk", "disk")):
        if count := facts[f"{place}_bytes"]:
            most = list(itertools.islice(facts["breakdown"][place].items(), 3))
            parts = ", ".join(f"{what} {human_bytes(size)}" for what, size in most)
            print(
                f"  {name:16s} {human_bytes(count):>8s}: {parts}{', ...' if len(facts['breakdown'][place]) > 3 else ''}"
            )
    seconds = facts["seconds_roughly"]
    roughly = f"no time, for there is no {device} here" if seconds is None else f"{human_time(seconds)} on {device}"
    print(f"  {'work':16s} {human_flops(facts['flops'])}: {roughly}{'' if seconds is None else ', very roughly'}")


def _unit_rows(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of blocks with their units, neighbours of the same widths in one."""
    at = 0
    for units, group in itertools.groupby(facts["units"]):
        count = len([*group])
        name = f"{at}" if count == 1 else f"{at} to {at + count - 1}"
        yield (name, *(f"{units[key]:,}" for key in ("heads", "kv_groups", "head_size", "channels")))
        at += count
