"""How many units every site keeps: the allocation's curves, the layout's limits, the budget. Cuts nothing."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

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
from snp_llm.models.depth import recipe_anatomy
from snp_llm.models.segments import Segments
from snp_llm.models.site import Site
from snp_llm.models.size import counted_weights
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.widths.alike import check_uniform, check_uniform_at_all
from snp_llm.pruning.widths.costs import Costs, budget_costs, removal_wanted, saved, sparsity_costs
from snp_llm.pruning.widths.coupled import coupled_budget, coupled_plan, weights_kept
from snp_llm.pruning.widths.depth import check_blocks_enough, depth_plan
from snp_llm.pruning.widths.paired import paired_budgets
from snp_llm.pruning.widths.permitted import rows_that_do_not_fit, saves_nothing
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)


FARTHEST_FROM_BUDGET = 0.01  # that an achieved sparsity may be without a word about it


@dataclass(frozen=True)
class Removal:
    """What has to go of sites that share a budget.

    Attributes:
        kinds: of these sites.
        amount: in the unit of the costs.
        whole: what that is a share of: the whole model; of a sparsity all linear weights of the blocks, mixers'
            included, or those of a kind of site that has a sparsity of its own.
    """

    kinds: tuple[str, ...]
    amount: float
    whole: float


@dataclass(frozen=True)
class Removals:
    """What has to go of a model.

    Attributes:
        costs: of every site at every width.
        parts: one for each budget.
    """

    costs: Costs
    parts: list[Removal]


def find_removals(anatomy: Anatomy, recipe: ResolvedRecipe) -> Removals:
    """A recipe's budget in numbers.

    Raises:
        SnpError: the model costs less already; a latency table of another model; nothing may go.
    """
    check_something_goes(anatomy.sites, recipe)
    budget, all_kinds = recipe.budget, tuple(dict.fromkeys(site.kind for site in anatomy.sites))
    if budget is not None:
        costs = budget_costs(anatomy, budget, recipe)
        return Removals(costs, [Removal(all_kinds, removal_wanted(costs, budget), costs.dense)])
    costs = sparsity_costs(anatomy.sites, sum(counted_weights(block, recipe.experts) for block in anatomy.blocks))
    if not recipe.separate:
        return Removals(costs, [Removal(all_kinds, recipe.sparsity_of(all_kinds[0]) * costs.dense, costs.dense)])
    parts = []
    for kinds, sparsity in recipe.sparsities:
        whole = float(sum(s.parameters for s in anatomy.sites if s.kind in kinds and not s.nested))
        own = recipe.head_sparsity if "attention" in kinds else recipe.ffn_sparsity
        if not whole and own:
            option, what = ("--head-sparsity", "attention") if "attention" in kinds else ("--ffn-sparsity", "FFN")
            raise SnpError(f"{option} {own:g}: expected a model with an {what} that is known; this one has none.")
        parts.append(Removal(kinds, sparsity * whole, whole))
    return Removals(costs, parts)


def check_something_goes(sites: Sequence[Site], recipe: Recipe) -> None:
    """Raises SnpError if units are to go, and none may, or whole experts that would be filled up again."""
    if recipe.experts in ("whole", "both") and recipe.layout == "padded":
        raise SnpError(
            f"--experts {recipe.experts}: expected layout compact or uniform, got padded: a router would still choose "
            "an expert of zeros."
        )
    asked = recipe.budget is not None or recipe.perplexity_increase is not None
    asked = asked or any(recipe.sparsity_of(site.kind) for site in sites)
    if asked and not any(site.prunable for site in sites):
        names = {"attention": "heads", "ffn": "FFN channels", "experts": "channels of experts"}
        why = "; ".join(dict.fromkeys(f"{names[site.kind]} stay, since {site.stay}" for site in sites))
        raise SnpError(
            f"expected a model with units that may go; this one has none: {why}. It can only be left as it is."
        )


def check_budget(model: PreTrainedModel, recipe: ResolvedRecipe) -> None:
    """Refuses a budget that cannot be met, before any weight or text is read.

    Not every one shows from shapes: what latencies are is only known here where there is a table of them, and what a
    permitted rise of perplexity allows is for a search.

    Args:
        model: dense, or its skeleton on the meta device.
        recipe: all settings.

    Raises:
        SnpError: the model costs less already, or the budget asks for more than all units that may go; a layout that
            has no widths for it.
    """
    anatomy = recipe_anatomy(model, recipe)
    check_something_goes(anatomy.sites, recipe)
    check_uniform_at_all(anatomy, recipe)
    budget, table = recipe.budget, recipe.latency_table
    unknown = budget is not None and budget.kind == "latency" and not (table is not None and Path(table).exists())
    if unknown or recipe.perplexity_increase is not None:
        return
    if isinstance(anatomy.blocks, Segments):
        coupled_budget(anatomy, recipe)
        return
    sites, removals = anatomy.sites, find_removals(anatomy, recipe)
    if recipe.depth != "never":
        check_blocks_enough(sites, removals.costs, removals.parts[0].amount, recipe)
        return
    all_budgets, _ = paired_budgets(anatomy, recipe, [None] * len(sites), removals.costs.sites)
    for removal in removals.parts:
        concerned = [i for i, site in enumerate(sites) if site.kind in removal.kinds]
        own = [sites[i] for i in concerned]
        budgets = [all_budgets[i] for i in concerned]
        if recipe.allocation in NEEDS_CURVES:
            sites_to_cut(own, budgets, removal, removals.costs, recipe)
        else:  # such a rule may refuse what others would not, and needs no more than shapes for it
            fit_budget(own, budgets, removal, removals.costs, recipe)


def widths_of(anatomy: Anatomy, curves: Sequence[SiteCurves | None], recipe: ResolvedRecipe) -> list[int]:
    """Units kept at every site under a recipe's budget, in the order of `find_sites`.

    Args:
        anatomy: of the dense model.
        curves: what the visit to the dense model gave for each; None where the allocation needs none.
        recipe: all settings.

    Raises:
        SnpError: the budget cannot be met with the units that may go.
    """
    if isinstance(anatomy.blocks, Segments):
        return coupled_plan(anatomy, curves, recipe)
    removals = find_removals(anatomy, recipe)
    of_each = zip(anatomy.sites, removals.costs.sites, strict=True)
    for unit in dict.fromkeys(site.unit for site, cost in of_each if site.prunable and saves_nothing(cost)):
        log.warning("%s stay: without some of them the model has as many %s", unit, removals.costs.unit)
    if recipe.depth == "never":
        widths = plan_widths(anatomy, curves, removals, recipe)
    else:
        (all_of_it,) = removals.parts

        def rest(left: Anatomy, curves: Sequence[SiteCurves | None], costs: Costs, amount: float) -> list[int]:
            return plan_widths(left, curves, Removals(costs, [replace(all_of_it, amount=amount)]), recipe)

        widths = depth_plan(anatomy, curves, removals.costs, all_of_it.amount, recipe, rest)
        if recipe.layout == "uniform":
            check_uniform(anatomy, widths)
    for removal in removals.parts:
        whose = f"{' and '.join(removal.kinds)}: " if len(removals.parts) > 1 else ""
        say_what_goes(anatomy.sites, widths, removal, removals.costs, whose)
    if recipe.for_ is not None and (others := rows_that_do_not_fit(anatomy, widths, recipe)):
        named = ", ".join(f"{length:,} of {path}" for path, length in others.items())
        log.warning("--for %s: rows stay that are no multiples of %d: %s", recipe.for_, recipe.row, named)
    return widths


def say_what_goes(sites: Sequence[Site], widths: Sequence[int], removal: Removal, costs: Costs, whose: str) -> None:
    """Says where whole units, or whole blocks, come to something else than what has to go."""
    of_each = zip(sites, saved(sites, costs.sites, widths), strict=True)
    removed = sum(cost for site, cost in of_each if site.kind in removal.kinds)
    if abs(removed - removal.amount) > FARTHEST_FROM_BUDGET * removal.whole:
        log.warning(
            "%s%.3g %% of the %s were to go, whole units give %.3g %%",
            whose,
            100 * removal.amount / removal.whole,
            costs.unit,
            100 * removed / removal.whole,
        )


def removed_weights(dense: PreTrainedModel, block_linear: int, plan: Sequence[tuple[Site, int]]) -> int:
    """Weights of the blocks' linear layers, of which there are so many, that go where sites keep what is planned."""
    anatomy = find_anatomy(dense)
    if isinstance(anatomy.blocks, Segments):
        return block_linear - round(weights_kept(anatomy, [width for _, width in plan]))
    sites, widths = zip(*plan, strict=True)
    return round(sum(saved(sites, sparsity_costs(sites, block_linear).sites, widths)))


def plan_widths(
    anatomy: Anatomy, curves: Sequence[SiteCurves | None], removals: Removals, recipe: ResolvedRecipe
) -> list[int]:
    """Units kept at every site, in the order of `find_sites`, where what sites cost adds up.

    Args:
        anatomy: of the dense model.
        curves: what the visit to the dense model gave for each; None where the allocation needs none.
        removals: what has to go.
        recipe: all settings.

    Raises:
        SnpError: the budget cannot be met with the units that may go.
    """
    sites = anatomy.sites
    budgets, pairs = paired_budgets(anatomy, recipe, curves, removals.costs.sites)
    widths = [site.units for site in sites]
    for removal in removals.parts:
        concerned = [i for i, s in enumerate(sites) if s.kind in removal.kinds]
        chosen = [budgets[i] for i in concerned]
        found = fit_budget([sites[i] for i in concerned], chosen, removal, removals.costs, recipe)
        for i, width in zip(concerned, found, strict=True):
            widths[i] = width
    for i, known in pairs.items():
        widths[i], widths[i + 1] = known[widths[i]]
    if recipe.layout == "uniform":
        check_uniform(anatomy, widths)
    return widths


def fit_budget(
    sites: Sequence[Site], budgets: Sequence[SiteBudget], removal: Removal, costs: Costs, recipe: Recipe
) -> list[int]:
    """Widths of the sites that share one budget.

    Args:
        sites: that share it.
        budgets: what the allocation may know of them.
        removal: what has to go.
        costs: of the whole model.
        recipe: all settings.

    Raises:
        SnpError: the budget asks for more than all units that may go.
    """
    uniform = recipe.layout == "uniform"
    widths = [min(b.units for b in budgets if b.kind == one.kind) if uniform else one.units for one in budgets]
    if removal.amount == 0 or not (members := sites_to_cut(sites, budgets, removal, costs, recipe)):
        return widths
    chosen = [budgets[i] for i in members]
    rule = ALLOCATIONS[recipe.allocation]
    total = total_cost(chosen)
    allowed = total - max(removal.amount - sum(budget.gone for budget in budgets), 0.0)
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
    sites: Sequence[Site], budgets: Sequence[SiteBudget], removal: Removal, costs: Costs, recipe: Recipe
) -> list[int]:
    """Which of the sites that share one budget are of a kind that has other widths than its own.

    Args:
        sites, budgets, removal, costs, recipe: as of `fit_budget`.

    Raises:
        SnpError: the budget asks for more than what is between all units and the fewest that may stay.
    """
    movable = {budget.kind for budget in budgets if len(budget.widths()) > 1}
    members = [i for i, budget in enumerate(budgets) if budget.kind in movable]
    prunable = total_cost([budgets[i] for i in members]) - sum(budgets[i].cost(budgets[i].widths()[0]) for i in members)
    prunable += sum(budget.gone for budget in budgets)
    if removal.amount > prunable * (1 + ROUNDING):
        kinds = list(dict.fromkeys(site.kind for site in sites))
        raise SnpError(_too_much(kinds, removal, prunable, costs, recipe))
    return members


def _too_much(kinds: Sequence[str], removal: Removal, prunable: float, costs: Costs, recipe: Recipe) -> str:
    """Why a removal is refused, in the words of the option that asked for it."""
    goal = recipe.budget
    place = f"in this model and layout {recipe.layout}"
    if goal is not None:
        least, got = costs.shown(costs.dense - prunable, costs.dense - removal.amount)
        share = math.ceil(1000 * (1 - prunable / costs.dense)) / 1000
        remedy = (
            f"Ask for {share:g}x or more." if share < 1 else "Removing units saves none of it here; use another budget."
        )
        return (
            f"--target-{goal.kind}: expected at least {least}, what is left {place} when every unit that may go is "
            f"gone; got {got}. {remedy}"
        )
    own = "--head-sparsity" if kinds == ["attention"] else "--ffn-sparsity"
    option = own if recipe.separate else "--sparsity"
    remedy = "Use --layout compact." if recipe.layout == "uniform" else "Use a smaller --round-to."
    remedy = "Use --head-sparsity 0." if option == "--head-sparsity" else remedy
    most = math.floor(1000 * prunable / removal.whole) / 1000
    return (
        f"{option}: expected at most {most:g}, with which every unit is gone that may go {place}; got "
        f"{removal.amount / removal.whole:.4g}. {f'Ask for {most:g} or less.' if most else remedy}"
    )
