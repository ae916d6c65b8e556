"""How many units every site keeps: the allocation's curves, the layout's limits, the budget. Cuts nothing."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.costs import Costs, budget_costs, removal_wanted, sparsity_costs
from snp_llm.errors import SnpError
from snp_llm.linalg.allocation import ALLOCATIONS, ROUNDING, SiteBudget, finest_step, pooled_widths, total_cost
from snp_llm.models.families import Family, Site
from snp_llm.models.layouts import plain_type, uniform_widths
from snp_llm.recipe import Recipe
from snp_llm.visit import SiteCurves

FARTHEST_FROM_TARGET = 0.01  # that an achieved sparsity may be without a word about it

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What has to go.

    Attributes:
        costs: of every site at every width.
        removals: kinds of site that share a budget, what of the costs' unit has to go from them, and what that is a
            share of when people are told.
    """

    costs: Costs
    removals: list[tuple[tuple[str, ...], float, float]]

    def rest(self, units: Sequence[int], share: float, sites: Sequence[Site]) -> "Target":
        """What has still to go to reach a share of this target, once sites are down to these units.

        Args:
            units: of every site now.
            share: of the removal, at most 1.
            sites: as they were when the target was set.
        """
        removals = []
        for kinds, removal, whole in self.removals:
            gone = sum(
                float(costs[-1] - costs[now])
                for costs, now, site in zip(self.costs.sites, units, sites, strict=True)
                if site.kind in kinds
            )
            removals.append((kinds, max(0.0, share * removal - gone), whole))
        # A width costs what it did when the site had more units.
        now = [costs[: count + 1] for costs, count in zip(self.costs.sites, units, strict=True)]
        return Target(replace(self.costs, sites=now), removals)


def find_target(model: PreTrainedModel, family: Family, sites: Sequence[Site], recipe: Recipe) -> Target:
    """A recipe's budget in numbers.

    Raises:
        SnpError: the model costs less already; a latency table of another model.
    """
    budget = recipe.budget
    if budget is not None:
        costs = budget_costs(model, family, sites, budget, recipe)
        return Target(costs, [(("attention", "ffn"), removal_wanted(costs, budget), costs.dense)])
    removals = []
    for kinds, sparsity in recipe.sparsities:
        whole = float(sum(site.parameters for site in sites if site.kind in kinds))
        removals.append((kinds, sparsity * whole, whole))
    return Target(sparsity_costs(sites), removals)


def plan_widths(
    model: PreTrainedModel,
    family: Family,
    sites: Sequence[Site],
    curves: Sequence[SiteCurves | None],
    target: Target,
    recipe: Recipe,
) -> list[int]:
    """Units kept at every site, in the order of `find_sites`.

    Args:
        model: dense model.
        family: its family.
        sites: of all its blocks.
        curves: what the visit to the dense model gave for each; None where the allocation needs none.
        target: what has to go.
        recipe: all settings, resolved.

    Raises:
        SnpError: the target cannot be met with the units that may go.
    """
    budgets = [
        site_budget(model, family, site, recipe, curve, cost)
        for site, curve, cost in zip(sites, curves, target.costs.sites, strict=True)
    ]
    unit = target.costs.unit
    widths = [site.units for site in sites]
    for kinds, removal, whole in target.removals:
        concerned = [i for i, s in enumerate(sites) if s.kind in kinds]
        chosen = [budgets[i] for i in concerned]
        found = fit_budget([sites[i] for i in concerned], chosen, removal, unit, recipe)
        for i, width in zip(concerned, found, strict=True):
            widths[i] = width
        removed = total_cost(chosen) - total_cost(chosen, found)
        if abs(removed - removal) > FARTHEST_FROM_TARGET * whole:
            log.warning(
                "%s: %.3g %% of the %s were to go, whole units give %.3g %%",
                " and ".join(kinds),
                100 * removal / whole,
                unit,
                100 * removed / whole,
            )
    if recipe.layout == "uniform":
        check_uniform(model, family, sites, widths)
    return widths


def fit_budget(
    sites: Sequence[Site], budgets: Sequence[SiteBudget], removal: float, unit: str, recipe: Recipe
) -> list[int]:
    """Widths of the sites that share one budget.

    Args:
        sites: that share it.
        budgets: what the allocation may know of them.
        removal: what has to go, in the unit of their costs.
        unit: its name.
        recipe: all settings, resolved.

    Raises:
        SnpError: the target is more than all units that may go.
    """
    uniform = recipe.layout == "uniform"
    kinds = list(dict.fromkeys(site.kind for site in sites))
    widths = [min(s.units for s in sites if s.kind == site.kind) if uniform else site.units for site in sites]
    if removal == 0:
        return widths
    movable = {budget.kind for budget in budgets if len(budget.widths()) > 1}
    members = [i for i, site in enumerate(sites) if site.kind in movable]
    chosen = [budgets[i] for i in members]
    prunable = total_cost(chosen) - sum(float(b.costs[0]) for b in chosen)
    if removal >= prunable:
        remedy = "Ask for less."
        if prunable == 0:
            remedy = "Use --head-sparsity 0." if kinds == ["attention"] else "Use a smaller --round-to."
        elif recipe.budget is None:
            remedy = f"Ask for a sparsity below {prunable / sum(site.parameters for site in sites):.3f} there."
        raise SnpError(
            f"the target removes {removal:,.6g} {unit} of {' and '.join(kinds)} sites; in this model and layout at "
            f"most {prunable:,.6g} may go. {remedy}"
        )
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


def check_uniform(model: PreTrainedModel, family: Family, sites: Sequence[Site], widths: Sequence[int]) -> None:
    """Raises SnpError if the widths are not one plain config's: in models whose blocks differed before."""
    heads = {s.heads_after(w) for s, w in zip(sites, widths, strict=True) if s.heads}
    ffn = {w for s, w in zip(sites, widths, strict=True) if s.kind == "ffn"}
    if len(heads) > 1 or len(ffn) > 1 or plain_type(model, family, min(heads)) is None:
        counts = ", ".join(sorted(f"{h.query} query and {h.key_value} key-value" for h in heads))
        raise SnpError(
            f"layout uniform: expected head counts that one plain {family.name} config can hold in every block, got "
            f"{counts} heads. The model was pruned before, block by block. Use --layout compact."
        )


def site_budget(
    model: PreTrainedModel, family: Family, site: Site, recipe: Recipe, curves: SiteCurves | None, costs: Tensor
) -> SiteBudget:
    """What the allocation may know of a site, and the widths that the layout lets it have."""
    assert recipe.round_to is not None
    multiple = recipe.round_to if site.kind == "ffn" else site.groups or 1
    permitted: tuple[int, ...] | None = None
    if not site.prunable:
        permitted = ()
    elif recipe.layout == "uniform" and site.kind == "attention":
        permitted = uniform_widths(model, family, site)
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
