"""Which blocks go, and how many units the others keep, under one budget. Cuts nothing.

Blocks go in the order of what their absence is predicted to cost the loss for what it saves, and what the budget then
still asks for is taken from the widths of the others, which may be none of an attention or an FFN; so many go that both
together are predicted to cost least. Where nothing else may go, blocks, attentions and FFNs go in that order.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from snp_llm.linalg.allocation import ROUNDING, lower_hull
from snp_llm.models.anatomy import Anatomy, find_blocks
from snp_llm.models.depth import shortened
from snp_llm.models.site import Site
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.widths.costs import Costs, saved
from snp_llm.recipe.recipe import ResolvedRecipe
from snp_llm.runtime.errors import SnpError

PATIENCE = 2  # blocks that may go after the best number of them without its being beaten

Curves = Sequence[SiteCurves | None]
Rest = Callable[[Anatomy, Curves, Costs, float], list[int]]


def block_costs(sites: Sequence[Site], costs: Costs) -> list[float]:
    """What each block costs with all of its units, in the order of blocks."""
    found: dict[int, float] = {}
    for site, cost in zip(sites, saved(sites, costs.sites, [0] * len(sites)), strict=True):
        found[site.block] = found.get(site.block, 0.0) + cost
    return [found[block] for block in sorted(found)]


def check_blocks_enough(sites: Sequence[Site], costs: Costs, amount: float, recipe: ResolvedRecipe) -> None:
    """Raises SnpError if more has to go than all blocks but the cheapest."""
    each = block_costs(sites, costs)
    most = sum(each) - min(each)
    if amount > most * (1 + ROUNDING):
        wanted, there = costs.shown(amount, most)
        raise SnpError(
            f"--depth {recipe.depth}: expected a budget that leaves one block; {wanted} were to go, and all blocks but "
            f"one are {there}. Ask for less."
        )


def lost_with(sites: Sequence[Site], curves: Curves, widths: Sequence[int]) -> list[float | None]:
    """Predicted rise of the loss at every site; of a block that goes it is all at the block, and none inside."""
    gone = {site.block for site, width in zip(sites, widths, strict=True) if site.whole_block and not width}
    return [
        None
        if curve is None
        else 0.0
        if not site.whole_block and site.block in gone
        else curve.lost(width, before if site.nested else None)
        for site, curve, width, before in zip(sites, curves, widths, [0, *widths][: len(sites)], strict=True)
    ]


def blocks_that_go(sites: Sequence[Site], curves: Curves, costs: Costs) -> list[list[int]]:
    """Numbers of the blocks that go where none does, one, two, and so on up to all but one.

    Those that cost the loss least for what they save; where distances were read, those that move the stream least, or
    the neighbours that do together.
    """
    blocks = [curve for site, curve in zip(sites, curves, strict=True) if site.whole_block]
    far = [None if curve is None else curve.distances for curve in blocks]
    if (known := [f for f in far if f is not None]) and len(known[0]) > 1:
        runs = range(len(known))
        first = [min(runs[: len(runs) - n + 1], key=lambda start: float(known[start][n - 1])) for n in runs[1:]]
        return [[], *([*range(start, start + n)] for n, start in enumerate(first, 1))]
    order = (
        sorted(range(len(known)), key=lambda block: float(known[block])) if known else _by_loss(sites, curves, costs)
    )
    return [order[:n] for n in range(len(order))]


def _by_loss(sites: Sequence[Site], curves: Curves, costs: Costs) -> list[int]:
    alone, each = [0] * len(sites), block_costs(sites, costs)
    lost = [loss for site, loss in zip(sites, lost_with(sites, curves, alone), strict=True) if site.whole_block]
    return sorted(range(len(each)), key=lambda block: (lost[block] or 0.0) / max(each[block], 1e-30))


def all_or_nothing(sites: Sequence[Site], curves: Curves, costs: Costs) -> list[list[int]]:
    """Widths where nothing goes, and then ever more, each time what costs the loss least for what it saves.

    Of a block that is nothing, its attention or its FFN, or all of it; what is not on the lower hull of losses over
    savings is passed by, and one block stays. Where distances were read, whole blocks go.
    """
    everything = [site.units for site in sites]
    if any(curve is not None and curve.distances is not None for curve in curves):
        going = blocks_that_go(sites, curves, costs)
        return [[0 if s.block in gone else s.units for s in sites] for gone in going]
    steps = []
    for whole in (i for i, site in enumerate(sites) if site.whole_block):
        inside = [i for i, site in enumerate(sites) if site.block == sites[whole].block and i != whole]
        ways = [[], *([i] for i in inside if sites[i].droppable), [whole, *inside]]
        points = []
        for number, gone in enumerate(ways):
            widths = [0 if i in gone else width for i, width in enumerate(everything)]
            lost = sum(loss or 0.0 for loss in lost_with(sites, curves, widths))
            points.append((_saved(sites, costs, widths), lost, number))
        for (cost, low, _), (more, high, number) in pairwise(lower_hull(sorted(points))):
            steps.append(((high - low) / max(more - cost, 1e-30), ways[number]))
    steps.sort(key=lambda step: step[0])
    plans, blocks = [everything], sum(site.whole_block for site in sites)
    for _, gone in steps:
        widths = [0 if i in gone else width for i, width in enumerate(plans[-1])]
        if sum(not width for site, width in zip(sites, widths, strict=True) if site.whole_block) < blocks:
            plans.append(widths)
    return plans


def _nearest(
    plans: Sequence[list[int]], sites: Sequence[Site], costs: Costs, amount: float, *, exceeds: bool
) -> list[int]:
    """The plan that saves nearest to an amount, which it may fall short of where it may be exceeded.

    Where none saves enough, since the block that they leave to the last is not the cheapest, that one stays.
    """
    enough = [plan for plan in plans if exceeds or _saved(sites, costs, plan) >= amount * (1 - ROUNDING)]
    each = block_costs(sites, costs)
    cheapest = each.index(min(each))
    return min(
        enough or [[site.units if site.block == cheapest else 0 for site in sites]],
        key=lambda plan: abs(_saved(sites, costs, plan) - amount),
    )


def _saved(sites: Sequence[Site], costs: Costs, widths: Sequence[int]) -> float:
    return sum(saved(sites, costs.sites, widths))


def depth_plan(
    anatomy: Anatomy,
    curves: Curves,
    costs: Costs,
    amount: float,
    recipe: ResolvedRecipe,
    rest: Rest,
) -> list[int]:
    """Units kept at every site where blocks may go: 0 at all sites of those that do.

    Args:
        anatomy: of the dense model, with sites of blocks.
        curves: of every site.
        costs: of every site at every width.
        amount: what has to go, in the unit of the costs.
        recipe: all settings.
        rest: widths of a shorter model's sites that together lose so much.

    Raises:
        SnpError: the budget cannot be met.
    """
    sites = anatomy.sites
    check_blocks_enough(sites, costs, amount, recipe)
    if recipe.depth == "only":
        return _nearest(all_or_nothing(sites, curves, costs), sites, costs, amount, exceeds=recipe.budget is None)
    going, each = blocks_that_go(sites, curves, costs), block_costs(sites, costs)
    saved = [sum(each[block] for block in gone) for gone in going]
    best: tuple[float, list[int]] | None = None
    failed: SnpError | None = None
    behind = 0
    for k, already in enumerate(saved):
        if already > amount * (1 + ROUNDING) or behind > PATIENCE:
            break
        try:
            widths = _with_widths(anatomy, curves, costs, going[k], amount - already, rest)
        except SnpError as error:  # widths alone do not give as much: more blocks have to go
            failed = error
            continue
        lost = sum(loss for loss in lost_with(sites, curves, widths) if loss is not None)
        behind = 0 if best is None or lost < best[0] else behind + 1
        best = (lost, widths) if not behind else best
    if best is None:
        assert failed is not None
        raise failed
    return best[1]


def _with_widths(
    anatomy: Anatomy, curves: Curves, costs: Costs, gone: Sequence[int], amount: float, rest: Rest
) -> list[int]:
    """Widths of all sites where some blocks go and so much from the others."""
    sites = anatomy.sites
    kept = [index for index in range(len(anatomy.blocks)) if index not in gone]
    inside = [i for i, site in enumerate(sites) if not site.whole_block and site.block not in gone]
    short = shortened(anatomy.model, kept) if gone else anatomy.model
    moved = tuple(replace(sites[i], block=kept.index(sites[i].block)) for i in inside)
    left = replace(anatomy, model=short, blocks=find_blocks(short), sites=moved)
    found = rest(left, [curves[i] for i in inside], replace(costs, sites=[costs.sites[i] for i in inside]), amount)
    widths = [0 if site.block in gone else site.units for site in sites]
    for i, width in zip(inside, found, strict=True):
        widths[i] = width
    return widths
