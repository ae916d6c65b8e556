"""How many units each site keeps under one budget. Knows curves and costs, not layers.

To add an allocation: write one function from sites and a budget to widths, add one line to `ALLOCATIONS`, one test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
    """

    kind: str
    units: int
    cost: int
    multiple: int
    minimum: int
    energy: Tensor | None = None

    def widths(self) -> list[int]:
        """Every width that this site may have, ascending; the last is all units."""
        first = -(-self.minimum // self.multiple) * self.multiple
        return [*range(min(first, self.units), self.units, self.multiple), self.units]


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
