"""How many units every site keeps: the allocation's curves, the layout's limits, the budget. Cuts nothing."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.linalg.allocation import (
    ALLOCATIONS,
    NEEDS_CURVES,
    ROUNDING,
    SiteBudget,
    finest_step,
    pooled_widths,
    total_cost,
)
from snp_llm.models.anatomy import Anatomy, find_anatomy
from snp_llm.models.layouts import plain_config, uniform_widths
from snp_llm.models.site import Site
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.widths.costs import Costs, budget_costs, removal_wanted, sparsity_costs
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)


FARTHEST_FROM_BUDGET = 0.01  # that an achieved sparsity may be without a word about it


@dataclass(frozen=True)
class Removals:
    """What has to go of a model.

    Attributes:
        costs: of every site at every width.
        parts: kinds of site that share a budget, what of the costs' unit has to go from them, and what that is a
            share of when people are told.
    """

    costs: Costs
    parts: list[tuple[tuple[str, ...], float, float]]


def find_removals(anatomy: Anatomy, recipe: ResolvedRecipe) -> Removals:
    """A recipe's budget in numbers.

    Raises:
        SnpError: the model costs less already; a latency table of another model.
    """
    budget, all_kinds = recipe.budget, tuple(dict.fromkeys(site.kind for site in anatomy.sites))
    if budget is not None:
        costs = budget_costs(anatomy, budget, recipe)
        return Removals(costs, [(all_kinds, removal_wanted(costs, budget), costs.dense)])
    parts = []
    for kinds, sparsity in recipe.sparsities if recipe.separate else [(all_kinds, recipe.sparsity_of(all_kinds[0]))]:
        whole = float(sum(site.parameters for site in anatomy.sites if site.kind in kinds))
        parts.append((kinds, sparsity * whole, whole))
    return Removals(sparsity_costs(anatomy.sites), parts)


def check_budget(model: PreTrainedModel, recipe: ResolvedRecipe) -> None:
    """Refuses a budget that cannot be met, before any weight or text is read.

    Not every one shows from shapes: what latencies are is only known here where there is a table of them, and what a
    permitted rise of perplexity allows is for a search.

    Args:
        model: dense, or its skeleton on the meta device.
        recipe: all settings.

    Raises:
        SnpError: the model costs less already, or the budget asks for more than all units that may go.
    """
    budget, table = recipe.budget, recipe.latency_table
    unknown = budget is not None and budget.kind == "latency" and not (table is not None and Path(table).exists())
    if unknown or recipe.perplexity_increase is not None:
        return
    anatomy = find_anatomy(model, recipe.head_unit)
    sites, removals = anatomy.sites, find_removals(anatomy, recipe)
    for kinds, removal, _ in removals.parts:
        concerned = [i for i, site in enumerate(sites) if site.kind in kinds]
        own = [sites[i] for i in concerned]
        budgets = [site_budget(anatomy, sites[i], recipe, None, removals.costs.sites[i]) for i in concerned]
        if recipe.allocation in NEEDS_CURVES:
            sites_to_cut(own, budgets, removal, removals.costs, recipe)
        else:  # such a rule may refuse what others would not, and needs no more than shapes for it
            fit_budget(own, budgets, removal, removals.costs, recipe)


def plan_widths(
    anatomy: Anatomy, curves: Sequence[SiteCurves | None], removals: Removals, recipe: ResolvedRecipe
) -> list[int]:
    """Units kept at every site, in the order of `find_sites`.

    Args:
        anatomy: of the dense model.
        curves: what the visit to the dense model gave for each; None where the allocation needs none.
        removals: what has to go.
        recipe: all settings.

    Raises:
        SnpError: the budget cannot be met with the units that may go.
    """
    sites = anatomy.sites
    budgets = [
        site_budget(anatomy, site, recipe, curve, cost)
        for site, curve, cost in zip(sites, curves, removals.costs.sites, strict=True)
    ]
    widths = [site.units for site in sites]
    for kinds, removal, whole in removals.parts:
        concerned = [i for i, s in enumerate(sites) if s.kind in kinds]
        chosen = [budgets[i] for i in concerned]
        found = fit_budget([sites[i] for i in concerned], chosen, removal, removals.costs, recipe)
        for i, width in zip(concerned, found, strict=True):
            widths[i] = width
        removed = total_cost(chosen) - total_cost(chosen, found)
        if abs(removed - removal) > FARTHEST_FROM_BUDGET * whole:
            log.warning(
                "%s: %.3g %% of the %s were to go, whole units give %.3g %%",
                " and ".join(kinds),
                100 * removal / whole,
                removals.costs.unit,
                100 * removed / whole,
            )
    if recipe.layout == "uniform":
        check_uniform(anatomy, widths)
    return widths


def fit_budget(
    sites: Sequence[Site], budgets: Sequence[SiteBudget], removal: float, costs: Costs, recipe: Recipe
) -> list[int]:
    """Widths of the sites that share one budget.

    Args:
        sites: that share it.
        budgets: what the allocation may know of them.
        removal: what has to go, in the unit of their costs.
        costs: of the whole model.
        recipe: all settings.

    Raises:
        SnpError: the budget asks for more than all units that may go.
    """
    uniform = recipe.layout == "uniform"
    fewest = {site.kind: min(s.units for s in sites if s.kind == site.kind) for site in sites}
    widths = [
        fewest[site.kind] if uniform and budget.permitted != () else site.units
        for site, budget in zip(sites, budgets, strict=True)
    ]
    if removal == 0:
        return widths
    members = sites_to_cut(sites, budgets, removal, costs, recipe)
    chosen = [budgets[i] for i in members]
    rule = ALLOCATIONS[recipe.allocation]
    total, allowed = total_cost(chosen), total_cost(chosen) - removal
    keep, step = allowed / total, finest_step(chosen) / 2 / total
    found = pooled_widths(rule, chosen, keep) if uniform else rule(chosen, keep)
    # Rules meet a budget as closely as they can, from either side; one that was given as a limit is not exceeded.
    while recipe.budget is not None and step and total_cost(chosen, found) > allowed * (1 + ROUNDING):
        keep -= step
        found = pooled_widths(rule, chosen, keep) if uniform else rule(chosen, keep)
    for i, width in zip(members, found, strict=True):
        widths[i] = width
    return widths


def sites_to_cut(
    sites: Sequence[Site], budgets: Sequence[SiteBudget], removal: float, costs: Costs, recipe: Recipe
) -> list[int]:
    """Which of the sites that share one budget are of a kind that has other widths than its own.

    Args:
        sites, budgets, removal, costs, recipe: as of `fit_budget`.

    Raises:
        SnpError: the budget asks for more than what is between all units and the fewest that may stay.
    """
    movable = {budget.kind for budget in budgets if len(budget.widths()) > 1}
    members = [i for i, site in enumerate(sites) if site.kind in movable]
    prunable = total_cost([budgets[i] for i in members]) - sum(budgets[i].cost(budgets[i].widths()[0]) for i in members)
    if removal > prunable * (1 + ROUNDING):
        whole = sum(site.parameters for site in sites)
        kinds = list(dict.fromkeys(site.kind for site in sites))
        raise SnpError(_too_much(kinds, removal, prunable, whole, costs, recipe))
    return members


def _too_much(kinds: Sequence[str], removal: float, prunable: float, whole: int, costs: Costs, recipe: Recipe) -> str:
    """Why a removal is refused, in the words of the option that asked for it."""
    goal = recipe.budget
    place = f"in this model and layout {recipe.layout}"
    if goal is not None:
        least, got = costs.shown(costs.dense - prunable, costs.dense - removal)
        share = math.ceil(1000 * (1 - prunable / costs.dense)) / 1000
        remedy = (
            f"Ask for {share:g}x or more." if share < 1 else "Removing units saves none of it here; use another budget."
        )
        return (
            f"--target-{goal.kind}: expected at least {least}, what is left {place} when every unit that may go is "
            f"gone; got {got}. {remedy}"
        )
    options = {"attention": "--head-sparsity", "ffn": "--ffn-sparsity"}
    option = options.get(kinds[0], "--sparsity") if len(kinds) == 1 else "--sparsity"
    remedy = "Use --layout compact." if recipe.layout == "uniform" else "Use a smaller --round-to."
    remedy = "Use --head-sparsity 0." if option == "--head-sparsity" else remedy
    most = math.floor(1000 * prunable / whole) / 1000
    return (
        f"{option}: expected at most {most:g}, with which every unit is gone that may go {place}; got "
        f"{removal / whole:.4g}. {f'Ask for {most:g} or less.' if most else remedy}"
    )


def check_uniform(anatomy: Anatomy, widths: Sequence[int]) -> None:
    """Raises SnpError if the widths are not one plain config's: in models whose blocks differed before."""
    family = anatomy.family
    heads = {s.block: s.heads_after(w) for s, w in zip(anatomy.sites, widths, strict=True) if s.heads}
    ffn = {s.block: w for s, w in zip(anatomy.sites, widths, strict=True) if s.kind == "ffn"}
    blocks = [(heads.get(index), ffn.get(index)) for index in range(len(anatomy.blocks))]
    if plain_config(anatomy.model, family, blocks) is None:
        counts = ", ".join(sorted(f"{h.query} query and {h.key_value} key-value" for h in {*heads.values()}))
        raise SnpError(
            f"layout uniform: expected head counts that one plain {family.name} config can hold in every block, got "
            f"{counts} heads. The model was pruned before, block by block. Use --layout compact."
        )


def site_budget(
    anatomy: Anatomy, site: Site, recipe: ResolvedRecipe, curves: SiteCurves | None, costs: Tensor
) -> SiteBudget:
    """What the allocation may know of a site, and the widths that the layout lets it have."""
    multiple = recipe.round_to if site.heads is None else site.step
    permitted: tuple[int, ...] | None = None
    if not site.prunable:
        permitted = ()
    elif site.droppable and site.units == 1:
        permitted = (0,)
    elif recipe.layout == "uniform" and site.heads is not None:
        permitted = uniform_widths(anatomy.model, anatomy.family, site)
    elif recipe.layout == "uniform" and anatomy.family.ffn_key is None:
        permitted = ()
    return SiteBudget(
        kind=site.kind,
        units=site.units,
        costs=costs,
        multiple=multiple,
        minimum=min(permitted, default=site.units) if permitted is not None else multiple,
        energy=None if curves is None else curves.energy,
        loss=None if curves is None else curves.loss,
        permitted=permitted,
    )
