"""Widths of convolutional networks, whose costs are coupled: a layer's weights are its rows times its columns.

Units are taken away step by step, from where the rule would have them go, at what they cost at the present widths of
all others, until the budget is met. Costs are exact at every step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.positions import layer_positions
from snp_llm.models.projections import Projection
from snp_llm.models.segment_configs import tied_pools
from snp_llm.models.segments import Segments
from snp_llm.models.size import stored_bytes
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.shared import shared_order
from snp_llm.recipe.recipe import ResolvedRecipe
from snp_llm.runtime.errors import SnpError

NEAR = 0.005  # of the whole model, to which a budget is met


@dataclass(frozen=True)
class Piece:
    """Something that a model costs, as much as its rows and columns: of which groups of units these are, or -1."""

    value: float
    made: int
    read: int


@dataclass(frozen=True)
class Pool:
    """Groups of units that keep the same share, at as many levels as the narrowest has units.

    Attributes:
        members: groups, with the units that each has for a level.
        levels: how many there are.
        multiple: levels go down in steps of so many.
        loss, energy: predicted rise of the loss, and share of latent energy, at every level; None where not known.
    """

    members: tuple[tuple[int, int], ...]
    levels: int
    multiple: int
    loss: Tensor | None
    energy: Tensor | None

    def below(self, level: int) -> int:
        """The next level down, or the same where there is none."""
        lower = (level - 1) // self.multiple * self.multiple
        return lower if lower > 0 else level

    def above(self, level: int) -> int:
        """The next level up, or the same where there is none."""
        return min((level // self.multiple + 1) * self.multiple, self.levels)


@dataclass(frozen=True)
class Coupled:
    """What a model costs at any widths.

    Attributes:
        units: of every group.
        pieces: that costs add up from.
        sites: numbers of the sites of each group.
    """

    units: tuple[int, ...]
    pieces: tuple[Piece, ...]
    sites: tuple[tuple[int, ...], ...]

    def cost(self, widths: Sequence[int]) -> float:
        """What the model costs where each group keeps so many units."""
        share = [w / n for w, n in zip(widths, self.units, strict=True)] + [1.0]
        return sum(piece.value * share[piece.made] * share[piece.read] for piece in self.pieces)


def coupled_costs(anatomy: Anatomy, kind: str) -> Coupled:
    """Costs of a convolutional network in parameters, bytes, FLOPs, or in weights of linear layers and convolutions.

    Args:
        anatomy: of the dense model.
        kind: "params", "size", "flops", or "weights", which sparsity is a share of.
    """
    groups: dict[object, list[int]] = {}
    for number, site in enumerate(anatomy.sites):
        groups.setdefault(site.shared or number, []).append(number)
    made: dict[tuple[int, str], int] = {}
    read: dict[tuple[int, str], int] = {}
    for group, numbers in enumerate(groups.values()):
        for number in numbers:
            site = anatomy.sites[number]
            producers = site.shared.producers if site.shared else [(site.block, p) for p in site.producers]
            made.update({(block, producer.path): group for block, producer in producers})
            read.update({(site.block, path): group for path in site.consumers})
    assert isinstance(anatomy.blocks, Segments)
    positions = layer_positions(anatomy.model) if kind == "flops" else {}
    pieces = []
    for index, block in enumerate(anatomy.blocks):
        for path, module in block.named_modules():
            where = (index, path)
            weight, beside = _values(module, kind, positions.get(anatomy.blocks.named(index, path), 1))
            pieces.append(Piece(weight, made.get(where, -1), read.get(where, -1)))
            pieces.append(Piece(beside, made.get(where, -1), -1))
    if kind == "size":  # what files have beside the numbers
        pieces.append(Piece(stored_bytes(anatomy.model) - sum(piece.value for piece in pieces), -1, -1))
    units = tuple(anatomy.sites[numbers[0]].units for numbers in groups.values())
    return Coupled(units, tuple(p for p in pieces if p.value), tuple(map(tuple, groups.values())))


def _values(module: nn.Module, kind: str, positions: int) -> tuple[float, float]:
    """What a module costs by rows and columns, and by rows alone."""
    own = [*module.parameters(recurse=False)]
    weights = sum(p.numel() for p in own if isinstance(module, Projection) and p.dim() > 1)
    if kind == "flops":
        return 2.0 * positions * weights, 0.0
    if kind == "weights":
        return float(weights), 0.0
    if kind == "size":
        stored = [*own, *module.buffers(recurse=False)]
        size = own[0].element_size() if own else 1
        return float(size * weights), float(sum(t.numel() * t.element_size() for t in stored) - size * weights)
    return float(weights), float(sum(p.numel() for p in own) - weights)


def coupled_plan(anatomy: Anatomy, curves: Sequence[SiteCurves | None], recipe: ResolvedRecipe) -> list[int]:
    """Units kept at every site of a convolutional network.

    Raises:
        SnpError: a budget that such a network does not have, or that cannot be met.
    """
    costs, allowed = coupled_budget(anatomy, recipe)
    pools = _pools(anatomy, costs, curves, recipe)
    levels = _shrunk(costs, pools, allowed, RULES[recipe.allocation])
    widths = [0] * len(anatomy.sites)
    for pool, level in zip(pools, levels, strict=True):
        for group, each in pool.members:
            for number in costs.sites[group]:
                widths[number] = level * each
    return widths


def coupled_budget(anatomy: Anatomy, recipe: ResolvedRecipe) -> tuple[Coupled, float]:
    """Costs in the unit of a recipe's budget, and what the pruned model may cost.

    Raises:
        SnpError: the model costs less already, or more with every unit gone that may go; latencies and sparsities by
            kind of site, which such a network has none of.
    """
    budget = recipe.budget
    if recipe.separate:
        raise SnpError("--head-sparsity, --ffn-sparsity: expected a model with blocks of both; use --sparsity here.")
    if budget is not None and budget.kind == "latency":
        raise SnpError("--target-latency: is not known for convolutional networks. Use --target-flops.")
    costs = coupled_costs(anatomy, "weights" if budget is None else budget.kind)
    dense = costs.cost(costs.units)
    if budget is None:
        allowed = (1 - recipe.sparsity_of("convolution")) * dense
    else:
        allowed = budget.amount * dense if budget.relative else budget.amount
    if allowed > dense:
        what = f"--target-{budget.kind}" if budget is not None else "--sparsity"
        raise SnpError(f"{what}: expected less than the model has, {dense:,.0f}; got {allowed:,.0f}.")
    pools = _pools(anatomy, costs, [None] * len(anatomy.sites), recipe)
    least = costs.cost(_widths(costs, pools, [min(p.multiple, p.levels) for p in pools]))
    if allowed < least * (1 - 1e-9):
        what = f"--target-{budget.kind}" if budget is not None else "--sparsity"
        raise SnpError(
            f"{what}: expected to keep at least {least / dense:.3f} of the model, what is left when every unit that "
            f"may go is gone; got {allowed / dense:.3f}. Ask for less, or use a smaller --round-to."
        )
    return costs, allowed


def _pools(anatomy: Anatomy, costs: Coupled, curves: Sequence[SiteCurves | None], recipe: ResolvedRecipe) -> list[Pool]:
    """Groups that go down together: each by itself, or those that one plain config ties to each other."""
    names = (
        tied_pools(anatomy.model, [anatomy.sites[n[0]] for n in costs.sites]) if recipe.layout == "uniform" else None
    )
    pools: dict[object, list[int]] = {}
    for group in range(len(costs.units)):
        pools.setdefault(group if names is None or names[group] is None else names[group], []).append(group)
    found = []
    for members in pools.values():
        levels = min(costs.units[group] for group in members)
        scaled = tuple((group, costs.units[group] // levels) for group in members)
        losses = [_curve(costs, group, curves, "loss") for group in members]
        energies = [_curve(costs, group, curves, "energy") for group in members]
        multiple = min(recipe.round_to, levels)
        found.append(Pool(scaled, levels, multiple, _summed(losses, scaled), _summed(energies, scaled, mean=True)))
    return found


def _curve(costs: Coupled, group: int, curves: Sequence[SiteCurves | None], name: str) -> Tensor | None:
    """A curve of a group of sites that share units, or of the only one."""
    found = [curve for number in costs.sites[group] if (curve := curves[number]) is not None]
    if not found or getattr(found[0], name) is None:
        return None
    if len(found) == 1:
        one: Tensor = getattr(found[0], name)
        return one
    return shared_order(found)[1] if name == "loss" else torch.stack([getattr(c, name) for c in found]).mean(0)


def _summed(
    curves: Sequence[Tensor | None], members: Sequence[tuple[int, int]], *, mean: bool = False
) -> Tensor | None:
    known = [curve[::each].double() for curve, (_, each) in zip(curves, members, strict=True) if curve is not None]
    if len(known) < len(curves):
        return None
    total = torch.stack(known).sum(0)
    return total / len(known) if mean else total


# How dear a step down from a level is, by what it saves; the cheapest is taken.
Rule = Callable[[Pool, int, float], float]


def by_loss(pool: Pool, level: int, saved: float) -> float:
    """Loss for what is saved, at the best of all levels below: a hull, step by step."""
    assert pool.loss is not None
    lower = torch.arange(pool.below(level), 0, -pool.multiple)
    rises = (pool.loss[lower] - pool.loss[level]).clamp_min(0) / (level - lower)
    return float(rises.min()) * (level - pool.below(level)) / saved


def by_variance(pool: Pool, level: int, _saved: float) -> float:
    """Share of latent energy that is lost below: one threshold for all."""
    assert pool.energy is not None
    return 1 - float(pool.energy[pool.below(level)])


def by_share(pool: Pool, level: int, _saved: float) -> float:
    """Share of the units that is gone: the same for all."""
    return 1 - level / pool.levels


RULES: dict[str, Rule] = {"loss": by_loss, "variance": by_variance, "uniform": by_share}


def _widths(costs: Coupled, pools: Sequence[Pool], levels: Sequence[int]) -> list[int]:
    widths = [*costs.units]
    for pool, level in zip(pools, levels, strict=True):
        for group, each in pool.members:
            widths[group] = level * each
    return widths


def _shrunk(costs: Coupled, pools: Sequence[Pool], allowed: float, rule: Rule) -> list[int]:
    """Levels of all pools at which a model costs what it may, and as little less as whole units allow."""
    levels = [pool.levels for pool in pools]
    allowed *= 1 + 1e-9

    def cost_with(i: int, level: int) -> float:
        return costs.cost(_widths(costs, pools, [*levels[:i], level, *levels[i + 1 :]]))

    now = costs.cost(_widths(costs, pools, levels))
    while now > allowed:
        steps = []
        for i, pool in enumerate(pools):
            if (lower := pool.below(levels[i])) < levels[i]:
                after = cost_with(i, lower)
                steps.append((rule(pool, levels[i], now - after), i, lower, after))
        if not steps:
            break
        _, i, lower, now = min(steps)
        levels[i] = lower
    while True:  # what the last step took too much goes to whom it is dearest
        steps = []
        for i, pool in enumerate(pools):
            if (higher := pool.above(levels[i])) > levels[i] and (after := cost_with(i, higher)) <= allowed:
                steps.append((rule(pool, higher, after - now), i, higher, after))
        if not steps:
            return _exchanged(costs, pools, levels, allowed)
        _, i, higher, now = max(steps)
        levels[i] = higher


def _exchanged(costs: Coupled, pools: Sequence[Pool], levels: list[int], allowed: float) -> list[int]:
    """Levels with a step up here for a step down there, as long as that comes closer to what is allowed."""
    now, wanted = costs.cost(_widths(costs, pools, levels)), NEAR * costs.cost(costs.units)
    while allowed - now > wanted:
        best, found = now, levels
        for i, j in permutations(range(len(pools)), 2):
            tried = [*levels]
            tried[i], tried[j] = pools[i].above(levels[i]), pools[j].below(levels[j])
            after = costs.cost(_widths(costs, pools, tried))
            if best < after <= allowed:
                best, found = after, tried
        if found is levels:
            break
        now, levels = best, found
    return levels


def weights_kept(anatomy: Anatomy, widths: Sequence[int]) -> float:
    """Weights of linear layers and convolutions where each site keeps so many units."""
    costs = coupled_costs(anatomy, "weights")
    return costs.cost([widths[numbers[0]] for numbers in costs.sites])
