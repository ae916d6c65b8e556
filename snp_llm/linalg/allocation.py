"""How many units each site keeps under one budget. Knows curves and costs, not layers.

To add an allocation: write one function from sites and a budget to widths, add one line to `ALLOCATIONS`, one test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from snp_llm.errors import SnpError


@dataclass(frozen=True)
class SiteBudget:
    """What an allocation may know of one site.

    Attributes:
        kind: "attention" or "ffn".
        units: units now.
        cost: linear-weight parameters of one unit.
        multiple: the width is a multiple of this, or all units.
        minimum: the width is never below this.
        energy: `energy_curve` of the site over its units, (units + 1,), or None where the rule does not need it.
        permitted: the only widths it may have besides all units; None: every multiple.
    """

    kind: str
    units: int
    cost: int
    multiple: int
    minimum: int
    energy: Tensor | None = None
    permitted: tuple[int, ...] | None = None

    def widths(self) -> list[int]:
        """Every width that this site may have, ascending; the last is all units."""
        first = -(-self.minimum // self.multiple) * self.multiple
        grid = range(min(first, self.units), self.units, self.multiple)
        return [*(w for w in grid if self.permitted is None or w in self.permitted), self.units]


def uniform(sites: Sequence[SiteBudget], keep: float) -> list[int]:
    """The same fraction at every site of a kind, the fractions together hitting the budget.

    Sites with few, large units (heads) round to the nearest width; those with many small ones (FFN) then take up the
    difference, so that the total is what was asked for although heads come in whole numbers.

    Args:
        sites: to be cut.
        keep: fraction of their parameters to keep.

    Returns:
        A width for each site.

    Raises:
        SnpError: some site would fall below its minimum.
    """
    budget = keep * sum(s.units * s.cost for s in sites)
    widths = [0] * len(sites)
    remaining = sum(s.units * s.cost for s in sites)
    # The fraction of each kind follows from what the coarser kinds before it left of the budget.
    for kind in sorted({s.kind for s in sites}, key=lambda k: min(s.units for s in sites if s.kind == k)):
        members = [i for i, s in enumerate(sites) if s.kind == kind]
        fraction = min(1.0, max(0.0, budget / remaining))
        for i in members:
            widths[i] = _nearest_width(sites[i], fraction)
        remaining -= sum(sites[i].units * sites[i].cost for i in members)
        budget -= sum(widths[i] * sites[i].cost for i in members)
    return widths


def variance(sites: Sequence[SiteBudget], keep: float) -> list[int]:
    """One global threshold alpha: each site keeps the fewest units with `sum_{i<=k} D_i / sum D_i >= alpha`.

    (arXiv 2405.17506.) Alpha is found exactly: a site grows from one of its widths to the next as soon as alpha passes
    the energy share of the smaller one, so all such steps, sorted by share, are taken until the budget is met.

    Args:
        sites: to be cut, with `energy`.
        keep: fraction of their parameters to keep.

    Returns:
        A width for each site.

    Raises:
        SnpError: even the minimum at every site is more than the budget.
    """
    budget = keep * sum(s.units * s.cost for s in sites)
    grids = [s.widths() for s in sites]
    widths = [grid[0] for grid in grids]
    spent = sum(w * s.cost for w, s in zip(widths, sites, strict=True))
    steps = sorted(
        (float(_energy(sites[i])[small]), i, large) for i, grid in enumerate(grids) for small, large in pairwise(grid)
    )
    if spent > budget + _coarsest(sites) / 2:
        raise SnpError(
            f"the target keeps {budget:,.0f} block-linear parameters, fewer than the {spent:,} of every site at its "
            f"minimum. Ask for a sparsity below {1 - spent / sum(s.units * s.cost for s in sites):.3f}."
        )
    for _, i, large in steps:
        step = (large - widths[i]) * sites[i].cost
        if spent + step / 2 > budget:  # stopping is now closer to the budget than going on
            break
        widths[i], spent = large, spent + step
    return widths


Allocation = Callable[[Sequence[SiteBudget], float], list[int]]
ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "variance": variance}
NEEDS_CURVES = {"variance"}  # those that read `energy`, for which the dense model is visited first


def pooled_widths(rule: Allocation, sites: Sequence[SiteBudget], keep: float) -> list[int]:
    """One width for each kind of site: the rule applied to pools, each of which stands for all sites of a kind.

    Costs in a pool add up and energy shares are averaged. Heads are coarse, so the kind with the finest grid (the FFN)
    then takes up what is left of the budget.

    Args:
        rule: one of `ALLOCATIONS`.
        sites: to be cut. Where sites of a kind differ in units, none may keep more than the smallest has.
        keep: fraction of their parameters to keep.

    Returns:
        A width for each site, the same for all of a kind.

    Raises:
        SnpError: from the rule.
    """
    kinds = list(dict.fromkeys(s.kind for s in sites))
    pools = [_pool([s for s in sites if s.kind == kind]) for kind in kinds]
    budget = keep * sum(s.units * s.cost for s in sites)
    widths = rule(pools, min(1.0, budget / sum(p.units * p.cost for p in pools)))
    finest = max(range(len(pools)), key=lambda i: len(pools[i].widths()))
    rest = budget - sum(w * p.cost for i, (w, p) in enumerate(zip(widths, pools, strict=True)) if i != finest)
    widths[finest] = min(pools[finest].widths(), key=lambda w: abs(w * pools[finest].cost - rest))
    by_kind = dict(zip(kinds, widths, strict=True))
    return [by_kind[s.kind] for s in sites]


def _pool(sites: Sequence[SiteBudget]) -> SiteBudget:
    units = min(s.units for s in sites)
    curves = [s.energy[: units + 1] for s in sites if s.energy is not None]
    return replace(
        sites[0],
        units=units,
        cost=sum(s.cost for s in sites),
        energy=torch.stack(curves).mean(0) if len(curves) == len(sites) else None,
    )


def _energy(site: SiteBudget) -> Tensor:
    if site.energy is None:
        raise SnpError("this allocation needs the energy curves of all sites; none were given.")
    return site.energy


def _coarsest(sites: Sequence[SiteBudget]) -> int:
    """Parameters of the largest single step that some site can take: no budget is met more closely than half of it."""
    return max((s.cost * min(s.multiple, s.units) for s in sites), default=0)


def _nearest_width(site: SiteBudget, fraction: float) -> int:
    """The permitted width closest to `fraction` of the units."""
    wanted = fraction * site.units
    if round(wanted) < site.minimum:
        raise SnpError(
            f"the target leaves {wanted:.1f} of {site.units} units at every {site.kind} site; the minimum is "
            f"{site.minimum}. Ask for a lower sparsity."
        )
    return min(site.widths(), key=lambda width: abs(width - wanted))
