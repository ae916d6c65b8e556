"""How many units every site keeps: the allocation's curves, the layout's limits, the budget. Cuts nothing."""

import logging
from collections.abc import Sequence

from transformers import PreTrainedModel

from snp_llm.errors import SnpError
from snp_llm.linalg.allocation import ALLOCATIONS, SiteBudget, linear_costs, pooled_widths
from snp_llm.models.families import Family, Site
from snp_llm.models.layouts import plain_type, uniform_widths
from snp_llm.recipe import Recipe
from snp_llm.visit import SiteCurves

FARTHEST_FROM_TARGET = 0.01  # that an achieved sparsity may be without a word about it

log = logging.getLogger(__name__)


def plan_widths(
    model: PreTrainedModel, family: Family, sites: Sequence[Site], curves: Sequence[SiteCurves | None], recipe: Recipe
) -> list[int]:
    """Units kept at every site, in the order of `find_sites`.

    Args:
        model: dense model.
        family: its family.
        sites: of all its blocks.
        curves: what the visit to the dense model gave for each; None where the allocation needs none.
        recipe: all settings, resolved.

    Raises:
        SnpError: the target cannot be met with the units that may go.
    """
    budgets = [site_budget(model, family, s, recipe, c) for s, c in zip(sites, curves, strict=True)]
    widths = [site.units for site in sites]
    for kinds, sparsity in recipe.budgets:
        concerned = [i for i, s in enumerate(sites) if s.kind in kinds]
        found = fit_budget([sites[i] for i in concerned], [budgets[i] for i in concerned], sparsity, recipe)
        for i, width in zip(concerned, found, strict=True):
            widths[i] = width
    if recipe.layout == "uniform":
        check_uniform(model, family, sites, widths)
    return widths


def fit_budget(sites: Sequence[Site], budgets: Sequence[SiteBudget], sparsity: float, recipe: Recipe) -> list[int]:
    """Widths of the sites that share one budget; says so where units are too coarse to meet it.

    Raises:
        SnpError: the target is more than all units that may go.
    """
    uniform = recipe.layout == "uniform"
    kinds = list(dict.fromkeys(site.kind for site in sites))
    widths = [min(s.units for s in sites if s.kind == site.kind) if uniform else site.units for site in sites]
    if sparsity == 0:
        return widths
    parameters = sum(site.parameters for site in sites)
    movable = {budget.kind for budget in budgets if len(budget.widths()) > 1}
    members = [i for i, site in enumerate(sites) if site.kind in movable]
    prunable = sum(sites[i].units * sites[i].cost for i in members)
    if sparsity * parameters >= prunable:
        remedy = f"Ask for a sparsity below {prunable / parameters:.3f} there."
        if prunable == 0:
            remedy = "Use --head-sparsity 0." if kinds == ["attention"] else "Use a smaller --round-to."
        raise SnpError(
            f"the target removes {sparsity * parameters:,.0f} parameters of {' and '.join(kinds)} sites; in this model "
            f"and layout at most {prunable:,} may go. {remedy}"
        )
    rule = ALLOCATIONS[recipe.allocation]
    chosen = [budgets[i] for i in members]
    keep = 1 - sparsity * parameters / prunable
    found = pooled_widths(rule, chosen, keep) if uniform else rule(chosen, keep)
    for i, width in zip(members, found, strict=True):
        widths[i] = width
    achieved = sum((s.units - w) * s.cost for s, w in zip(sites, widths, strict=True)) / parameters
    if abs(achieved - sparsity) > FARTHEST_FROM_TARGET:
        log.warning(
            "%s: sparsity %g asked for, whole units give %.3f",
            " and ".join(kinds),
            sparsity,
            achieved,
        )
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
    model: PreTrainedModel, family: Family, site: Site, recipe: Recipe, curves: SiteCurves | None
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
        costs=linear_costs(site.units, site.cost),
        multiple=multiple,
        minimum=min(permitted, default=site.units) if permitted is not None else multiple,
        energy=None if curves is None else curves.energy,
        loss=None if curves is None else curves.loss,
        permitted=permitted,
    )
