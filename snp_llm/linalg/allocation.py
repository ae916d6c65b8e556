"""How many units each site keeps under one budget. Knows curves and costs, not layers.

To add an allocation: write one function from sites and a budget to widths, add one line to `ALLOCATIONS`, one test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from snp_llm.runtime.errors import SnpError

ROUNDING = 1e-9  # by which a sum of costs may exceed a budget that it meets exactly

HALVINGS = 50  # of the interval [0, 1] in which a fraction is sought


@dataclass(frozen=True)
class SiteBudget:
    """What an allocation may know of one site.

    Attributes:
        kind: what sites are called that share a width where there is one for all of them, such as "attention".
        units: units now.
        costs: what the site costs at every width, (units + 1,), never falling: parameters, bytes, FLOPs or seconds.
        multiple: the width is a multiple of this, or all units.
        minimum: the width is never below this.
        energy: `energy_curve` of the site over its units, (units + 1,), or None where the rule does not need it.
        loss: predicted rise of the loss at every width, (units + 1,), falling to 0, or None likewise.
        permitted: the only widths it may have besides all units; None: every multiple.
        gone: what the site has cost beside that, of units that cannot stay.
    """

    kind: str
    units: int
    costs: Tensor
    multiple: int
    minimum: int
    energy: Tensor | None = None
    loss: Tensor | None = None
    permitted: tuple[int, ...] | None = None
    gone: float = 0.0

    def widths(self) -> list[int]:
        """Every width that this site may have, ascending; the last is all units."""
        first = -(-self.minimum // self.multiple) * self.multiple
        grid = range(min(first, self.units), self.units, self.multiple)
        return [*(w for w in grid if self.permitted is None or w in self.permitted), self.units]

    def cost(self, width: int) -> float:
        """What the site costs when it keeps `width` units."""
        return float(self.costs[width])


def linear_costs(units: int, cost: float, beside: float = 0.0) -> Tensor:
    """Costs of a site whose units cost the same each, (units + 1,), and the last that goes takes along what is beside
    them; up to a constant, so that those of a single unit are what it costs either way."""
    costs = torch.arange(units + 1, dtype=torch.float64) * cost
    costs[0] -= beside
    return costs


def total_cost(sites: Sequence[SiteBudget], widths: Sequence[int] | None = None) -> float:
    """What sites cost together, at some widths or as they are."""
    widths = [s.units for s in sites] if widths is None else widths
    return sum(s.cost(w) for s, w in zip(sites, widths, strict=True))


def finest_step(sites: Sequence[SiteBudget]) -> float:
    """What the smallest step costs that some site can take: no budget is met more closely than half of it."""
    steps = [_extra(s, s.widths()[-2], s.units) for s in sites if len(s.widths()) > 1]
    return min(steps, default=0.0)


def uniform(sites: Sequence[SiteBudget], keep: float) -> list[int]:
    """Widths of one fraction at every site of a kind, the fractions together hitting the budget.

    Sites with few, large units (heads) round to the nearest width; those with many small ones (FFN) then take up the
    difference, so that the total is what was asked for although heads come in whole numbers.

    Args:
        sites: to be cut.
        keep: fraction of their cost to keep.

    Returns:
        A width for each site.

    Raises:
        SnpError: some site would fall below its minimum.
    """
    budget = keep * total_cost(sites)
    widths = [0] * len(sites)
    remaining = [*sites]
    # The fraction of each kind follows from what the coarser kinds before it left of the budget.
    for kind in sorted({s.kind for s in sites}, key=lambda k: min(s.units for s in sites if s.kind == k)):
        fraction = _fraction_within(remaining, budget)
        members = [i for i, s in enumerate(sites) if s.kind == kind]
        for i in members:
            widths[i] = _nearest_width(sites[i], fraction)
        remaining = [s for s in remaining if s.kind != kind]
        budget -= total_cost([sites[i] for i in members], [widths[i] for i in members])
    return widths


def variance(sites: Sequence[SiteBudget], keep: float) -> list[int]:
    """Widths by one global threshold alpha: a site keeps the fewest units with `sum_{i<=k} D_i / sum D_i >= alpha`.

    (arXiv 2405.17506.) Alpha is found exactly: a site grows from one of its widths to the next as soon as alpha passes
    the energy share of the smaller one, so all such steps, sorted by share, are taken until the budget is met.

    Args:
        sites: to be cut, with `energy`.
        keep: fraction of their cost to keep.

    Returns:
        A width for each site.

    Raises:
        SnpError: even the minimum at every site is more than the budget.
    """
    budget = keep * total_cost(sites)
    grids = [s.widths() for s in sites]
    widths = _smallest_widths(sites, budget)
    spent = total_cost(sites, widths)
    steps = sorted(
        (float(_curve(sites[i].energy)[small]), i, large)
        for i, grid in enumerate(grids)
        for small, large in pairwise(grid)
    )
    for _, i, large in steps:
        step = _extra(sites[i], widths[i], large)
        if spent + step / 2 > budget:  # stopping is now closer to the budget than going on
            break
        widths[i], spent = large, spent + step
    return widths


def loss(sites: Sequence[SiteBudget], keep: float) -> list[int]:
    """Widths that minimise the predicted rise of the loss, `sum_sites loss_site(k_site)`, within the budget.

    Every site's curve is replaced by its lower convex hull over cost, whose pieces, taken in order of loss saved for
    what they cost, are the Lagrangian's solutions. The piece that no longer fits is taken as far as the site's widths
    allow, and cheaper ones go on. The budget is met as closely as the site of the finest steps allows, and exceeded by
    half of such a step at most.

    Args:
        sites: to be cut, with `loss`.
        keep: fraction of their cost to keep.

    Returns:
        A width for each site.

    Raises:
        SnpError: even the minimum at every site is more than the budget.
    """
    budget = keep * total_cost(sites) * (1 + ROUNDING) + finest_step(sites) / 2
    widths = _smallest_widths(sites, budget)
    spent = total_cost(sites, widths)
    pieces = []
    for i, site in enumerate(sites):
        hull = lower_hull([(site.cost(w), float(_curve(site.loss)[w]), w) for w in site.widths()])
        for (cost, high, small), (more, low, large) in pairwise(hull):
            pieces.append(((low - high) / (more - cost) if more > cost else -torch.inf, i, small, large))
    for _, i, small, large in sorted(pieces):
        if widths[i] != small:  # a piece before this one did not fit
            continue
        fitting = [w for w in sites[i].widths() if small < w <= large and spent + _extra(sites[i], small, w) <= budget]
        if fitting:
            widths[i], spent = fitting[-1], spent + _extra(sites[i], small, fitting[-1])
    return widths


Allocation = Callable[[Sequence[SiteBudget], float], list[int]]

ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "variance": variance, "loss": loss}

NEEDS_CURVES = {"variance", "loss"}  # those that read `energy` or `loss`, for which the dense model is visited first


def pooled_widths(rule: Allocation, sites: Sequence[SiteBudget], keep: float) -> list[int]:
    """One width for each kind of site: the rule applied to pools, each of which stands for all sites of a kind.

    Costs and losses in a pool add up and energy shares are averaged. Heads are coarse, so the kind with the finest
    grid (the FFN) then takes up what is left of the budget.

    Args:
        rule: one of `ALLOCATIONS`.
        sites: to be cut. Where sites of a kind differ in units, none may keep more than the smallest has.
        keep: fraction of their cost to keep.

    Returns:
        A width for each site, the same for all of a kind.

    Raises:
        SnpError: from the rule.
    """
    kinds = list(dict.fromkeys(s.kind for s in sites))
    pools = [_pool([s for s in sites if s.kind == kind]) for kind in kinds]
    budget = keep * total_cost(sites)
    widths = rule(pools, min(1.0, budget / total_cost(pools)))
    finest = max(range(len(pools)), key=lambda i: len(pools[i].widths()))
    rest = budget - sum(p.cost(w) for i, (w, p) in enumerate(zip(widths, pools, strict=True)) if i != finest)
    widths[finest] = min(pools[finest].widths(), key=lambda w: abs(pools[finest].cost(w) - rest))
    by_kind = dict(zip(kinds, widths, strict=True))
    return [by_kind[s.kind] for s in sites]


def _pool(sites: Sequence[SiteBudget]) -> SiteBudget:
    units = min(s.units for s in sites)
    energies = [s.energy[: units + 1] for s in sites if s.energy is not None]
    losses = [s.loss[: units + 1] for s in sites if s.loss is not None]
    return replace(
        sites[0],
        units=units,
        costs=torch.stack([s.costs[: units + 1] for s in sites]).sum(0),
        energy=torch.stack(energies).mean(0) if len(energies) == len(sites) else None,
        loss=torch.stack(losses).sum(0) if len(losses) == len(sites) else None,
    )


def _curve(curve: Tensor | None) -> Tensor:
    if curve is None:
        raise SnpError("this allocation needs the energy or loss curves of all sites; none were given.")
    return curve


def _smallest_widths(sites: Sequence[SiteBudget], budget: float) -> list[int]:
    """The least that every site may keep.

    Raises:
        SnpError: that is more than the budget, by more than half of the largest single step that some site can take:
            no budget is met more closely.
    """
    widths = [s.widths()[0] for s in sites]
    spent = total_cost(sites, widths)
    coarsest = max((s.cost(min(s.multiple, s.units)) for s in sites), default=0.0)
    if spent > budget + coarsest / 2:
        raise SnpError(
            f"the target keeps {budget:,.0f}, less than the {spent:,.0f} of every site at its minimum. Ask for a "
            f"sparsity below {1 - spent / total_cost(sites):.3f}."
        )
    return widths


def _extra(site: SiteBudget, small: int, large: int) -> float:
    return site.cost(large) - site.cost(small)


def lower_hull(points: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Lower convex hull of (cost, loss, width), from the least cost to the most."""
    hull: list[tuple[float, float, int]] = []
    for x, y, width in points:
        while len(hull) > 1:
            (x0, y0, _), (x1, y1, _) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):  # the point between lies below the line past it
                break
            hull.pop()
        hull.append((x, y, width))
    return hull


def _fraction_within(sites: Sequence[SiteBudget], budget: float) -> float:
    """The fraction of units that costs the budget when every site keeps it, with costs interpolated between units."""

    def excess(fraction: float) -> float:
        total = 0.0
        for site in sites:
            wanted = fraction * site.units
            below = min(int(wanted), site.units - 1)
            total += site.cost(below) + (wanted - below) * _extra(site, below, below + 1)
        return total - budget

    low, high = 0.0, 1.0
    if excess(high) <= 0:
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return (low + high) / 2


def _nearest_width(site: SiteBudget, fraction: float) -> int:
    """The permitted width closest to `fraction` of the units."""
    wanted = fraction * site.units
    if round(wanted) < site.minimum:
        raise SnpError(
            f"the target leaves {wanted:.1f} of {site.units} units at every {site.kind} site; the minimum is "
            f"{site.minimum}. Ask for a lower sparsity."
        )
    return min(site.widths(), key=lambda width: abs(width - wanted))
