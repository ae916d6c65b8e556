"""Experts and their channels under one budget: to an allocation they are one site, whose widths are pairs of numbers.

A channel costs as much as there are experts left, so that costs of both do not add up; those of pairs do.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from snp_llm.linalg.allocation import SiteBudget
from snp_llm.models.anatomy import Anatomy
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.widths.costs import share_left
from snp_llm.pruning.widths.permitted import site_budgets
from snp_llm.recipe.recipe import ResolvedRecipe

Pairs = list[tuple[int, int]]  # experts, and channels of each


def paired_budgets(
    anatomy: Anatomy, recipe: ResolvedRecipe, curves: Sequence[SiteCurves | None], costs: Sequence[Tensor]
) -> tuple[list[SiteBudget], dict[int, Pairs]]:
    """What the allocation may know of every site; of experts that may go and lose channels, what their pairs cost.

    The width of such a site is the number of a pair; that of the site of channels after it is not chosen apart. Where a
    block loses less with another pair that costs no more, a pair is left out; in layout uniform, where all blocks do
    together.

    Args:
        anatomy, recipe, curves, costs: as of `site_budgets`.

    Returns:
        A budget for each site, and by the number of a site of whole experts its pairs, from the least cost to the most.
    """
    budgets, together = site_budgets(anatomy, recipe, curves, costs), dict[object, list[int]]()
    for i, site in enumerate(anatomy.sites):
        if site.nested:
            together.setdefault(budgets[i - 1].kind if recipe.layout == "uniform" else i, []).append(i - 1)
    pairs: dict[int, Pairs] = {}
    for numbers in together.values():
        experts, channels = (sorted(_common([budgets[i + of] for i in numbers])) for of in (0, 1))
        grid = [*product(experts, channels)]
        at = torch.tensor(grid).unbind(1)
        cost = [pair_costs(costs[i], costs[i + 1])[at] for i in numbers]
        loss = [found[at] for i in numbers if (found := pair_losses(curves[i], curves[i + 1])) is not None]
        best = _best(torch.stack(cost).sum(0), torch.stack(loss).sum(0) if loss else None)
        for place, i in enumerate(numbers):
            pairs[i] = [grid[k] for k in best]
            rest = float(costs[i][-1] - cost[place][best[-1]]) if budgets[i + 1].gone else 0.0
            budgets[i] = replace(
                budgets[i],
                units=len(best) - 1,
                costs=cost[place][best],
                multiple=1,
                minimum=0,
                energy=None,
                loss=loss[place][best] if loss else None,
                permitted=None,
                gone=rest,
            )
            nothing = replace(budgets[i + 1], kind=f"channels of {budgets[i].kind}", units=0, minimum=0, gone=0.0)
            budgets[i + 1] = replace(nothing, costs=torch.zeros(1, dtype=torch.float64), permitted=())
    return budgets, pairs


def pair_costs(experts: Tensor, channels: Tensor) -> Tensor:
    """What every pair costs, (experts + 1, channels + 1), from what numbers of each do alone."""
    return experts[:, None] - share_left(experts)[:, None] * (channels[-1] - channels)


def pair_losses(experts: SiteCurves | None, channels: SiteCurves | None) -> Tensor | None:
    """Predicted rise of the loss at every pair, (experts + 1, channels + 1): of those that go, and of what is left."""
    if experts is None or channels is None or experts.loss is None or channels.left is None:
        return None
    return experts.loss[:, None] + channels.left


def _common(budgets: Sequence[SiteBudget]) -> set[int]:
    """Widths that all of these sites may have; of sites that have none in common the fewest units."""
    fewest = min(budget.units for budget in budgets)
    return set.intersection(*(set(budget.widths()) for budget in budgets)) or {fewest}


def _best(cost: Tensor, loss: Tensor | None) -> list[int]:
    """Which pairs cost less than all that lose as little, from the least cost to the most; all units are the last."""
    everything = len(cost) - 1
    if loss is None:
        return sorted({int(cost.argmin()), everything})
    order = np.lexsort((-np.arange(len(cost)), loss.numpy(), cost.numpy()))
    falling = np.minimum.accumulate(np.append(np.inf, loss.numpy()[order]))
    best = order[falling[1:] < falling[:-1]]
    return [*(int(k) for k in best if k != everything), everything]
