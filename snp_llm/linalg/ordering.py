"""Which units matter most: one score per unit, larger = more important. Knows a site's matrices, not its layer.

To add an ordering: one function from `OrderingProblem` to scores, a line in `ORDERINGS` and in `FLOPS`, one test.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from snp_llm.linalg.ldl import DefiniteGram, cholesky_in_place, inverse_from
from snp_llm.linalg.quadrature import quadrature_flops, zca_quadrature
from snp_llm.linalg.units import diagonal_blocks, per_unit, unit_channels
from snp_llm.runtime.errors import SnpError, near

GREEDY_ROUNDS = 128  # in which all units would go: r at once, r = units / GREEDY_ROUNDS

CANDIDATES = 2  # times r, the cheapest units, from which those are taken that can go together

EXCHANGES = 4  # of a dear unit for the next one, before fewer go than could

RISE = 1.05  # times what the next in line costs: what a unit may come to cost through others that go at once

ZCA_EXACT_UP_TO = 512  # channels

PANEL = 96  # channels whose removal the inverse takes up at once: one by one only memory would be busy

GPU_PANEL = 384  # the same on a GPU, which is done with fewer before it has been asked for the next


@dataclass(frozen=True)
class OrderingProblem:
    """What an ordering may look at.

    Attributes:
        definite: the dampened Gram matrix G of n channels, float64 or float32.
        W: out-projection weight, (d_out, n), same dtype.
        in_weight: sum of absolute in-projection weights of each unit, (units,), float64.
        unit_size: channels a unit has.
        seed: for `random`.
        keep: units that will be kept for certain: their order among themselves need not cost anything.
    """

    definite: DefiniteGram
    W: Tensor
    in_weight: Tensor
    unit_size: int
    seed: int
    keep: int = 0


def zca(problem: OrderingProblem) -> Tensor:
    """Energy of a unit under unnormalised ZCA: `trace(([G^-1/2]_uu)^-2)`, for one channel `([G^-1/2]_ii)^-2`.

    The symmetric whitening `G^-1/2` rescaled to unit diagonal, as the rows of `L^-1` are, gives latents with these
    energies. This definition is a reconstruction (arXiv 2405.17506 describes it in words). Sites of more than
    `ZCA_EXACT_UP_TO` channels are ranked by `zca_quadrature`, for the exact score takes longer than everything else.
    """
    if len(problem.definite.gram) <= ZCA_EXACT_UP_TO:
        return zca_exact(problem)
    return zca_quadrature(problem.definite, problem.unit_size)


def zca_exact(problem: OrderingProblem) -> Tensor:
    """Energy of a unit under unnormalised ZCA, as for `zca`, by an eigendecomposition at every size."""
    values, vectors = torch.linalg.eigh(problem.definite.gram)
    whitening = (vectors / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()) @ vectors.T
    blocks = torch.linalg.inv(diagonal_blocks(whitening, problem.unit_size))
    return (blocks @ blocks).diagonal(dim1=1, dim2=2).sum(1)


def saw(problem: OrderingProblem) -> Tensor:
    """Sum of absolute in-projection weights of the unit (the baseline of arXiv 2405.17506)."""
    return problem.in_weight


def variance(problem: OrderingProblem) -> Tensor:
    """Energy of the unit's inputs: the trace of its block of G."""
    return per_unit(problem.definite.gram.diagonal(), problem.unit_size)


def residual(problem: OrderingProblem) -> Tensor:
    """Energy that all other units cannot explain: `trace(([G^-1]_uu)^-1)`."""
    inverse = problem.definite.inverse()
    blocks = torch.linalg.inv(diagonal_blocks(inverse, problem.unit_size))
    return blocks.diagonal(dim1=1, dim2=2).sum(1)


def obs(problem: OrderingProblem) -> Tensor:
    """Exact squared error of removing the unit alone, after reconstruction: `trace(W_u ([G^-1]_uu)^-1 W_u^T)`.

    Optimal Brain Surgeon (Hassibi and Stork, 1993) on the layer's quadratic.
    """
    inverse = problem.definite.inverse()
    return _removal_costs(problem.W.mT, diagonal_blocks(inverse, problem.unit_size))


@dataclass
class _Pending:
    """What has yet to come off an inverse for the units removed since it was last written: `H^T H`.

    Attributes:
        halves: H, (room, n); as many of its rows are filled as channels went. With `[G^-1]_PP = C C^T` those of units P
            are `C^-1 [G^-1]_P`.
        filled: how many.
    """

    halves: Tensor
    filled: int = 0

    def taken_off(self, part: Tensor, at: Tensor | slice, columns: Tensor | slice) -> Tensor:
        """A part of the inverse as it is after the removals, in place of what it was."""
        rows = self.halves[: self.filled, at]
        return part.addmm_(rows.mT, rows if columns is at else self.halves[: self.filled, columns], alpha=-1)

    def add(self, inverse: Tensor, P: Tensor, factor: Tensor) -> Tensor:
        """Rows of H for channels P that go now, (p, n); the factor is C."""
        half = self.halves[self.filled : self.filled + len(P)]
        torch.index_select(inverse, 0, P, out=half)
        self.taken_off(half, P, slice(None))
        self.filled += len(P)
        return torch.linalg.solve_triangular(factor, half, upper=False, out=half)


def greedy(problem: OrderingProblem) -> Tensor:
    """Backward elimination by `obs`: remove the cheapest, repair W, downdate `G^-1`, repeat to the last unit.

    A unit's score is the place at which it went; units that are kept for certain come after all others, by what each
    would cost next. r units go at once, cheapest first, but for those that the others make dear (`_cheap_together`);
    r = 1 below 256 units. Removing P leaves `W_K - W_P [G^-1]_PP^-1 [G^-1]_PK` and
    `[G^-1]_KK - [G^-1]_KP [G^-1]_PP^-1 [G^-1]_PK` on the rest K. This is
    symmetric elimination with pivots chosen on the way, so it is done as LAPACK does that: the large matrix takes up
    many removals in one product, and what is left of it moves to its front. At every halving the inverse is computed
    afresh, so that updates do not drift.
    """
    size, gram, device = problem.unit_size, problem.definite.gram, problem.W.device
    units = len(gram) // size
    block, last = max(1, units // GREEDY_ROUNDS), units - problem.keep
    panel = PANEL if device.type == "cpu" else GPU_PANEL
    inverse = problem.definite.inverse().mT  # row order
    W = problem.W.mT.clone(memory_format=torch.contiguous_format)  # what is read and written of it are whole channels
    alive = torch.arange(units, device=device)  # units that the matrices still hold
    order, fresh, removed = [alive[:0]], units, 0
    while True:
        pivots = diagonal_blocks(inverse, size).clone()
        pending = _Pending(inverse.new_empty(panel + block * size, len(inverse)))
        went = [alive[:0]]
        while pending.filled < panel and removed < last:
            costs, pool = torch.sort(_removal_costs(W, pivots), stable=True)
            count = min(block, last - removed)
            pool = pool[: min(count + EXCHANGES + 1, CANDIDATES * block, units - removed) if block > 1 else 1]
            C = unit_channels(pool, size)
            among = pending.taken_off(inverse[C[:, None], C], C, C)
            going, factor, lost = _cheap_together(pool, among, W[C], costs[: len(pool)], count)
            half = pending.add(inverse, C if block == 1 else unit_channels(going, size), factor)
            W.addmm_(half.mT, lost, alpha=-1)
            by_unit = half.reshape(len(half), len(alive), size)
            pivots -= torch.einsum("pua,pub->uab", by_unit, by_unit)
            pivots.index_fill_(0, going, 0)  # from now on they can only fall
            went.append(going)
            removed += len(going)
        gone = torch.zeros(len(alive), dtype=torch.bool, device=device).index_fill_(0, torch.cat(went), True)
        order.append(alive[torch.cat(went)])
        if removed == last:
            places = torch.argsort(_removal_costs(W, pivots)[~gone], stable=True)
            return torch.argsort(torch.cat([*order, alive[~gone][places]])).double()
        left = units - removed
        if 2 * left <= fresh:
            W, alive = W[unit_channels((~gone).nonzero().squeeze(1), size)], alive[~gone]
            channels = unit_channels(alive, size)
            del inverse
            inverse, fresh = inverse_from(cholesky_in_place(gram[channels[:, None], channels])).mT, left
            continue
        # Units from beyond what is left take the places of those that went.
        target = gone[:left].nonzero().squeeze(1)
        source = left + (~gone[left:]).nonzero().squeeze(1)
        alive[target] = alive[source]
        target, source = unit_channels(target, size), unit_channels(source, size)
        for matrix in (W, inverse):
            matrix[target] = matrix[source]
        for matrix in (inverse, pending.halves):
            matrix[:, target] = matrix[:, source]
        W, alive, inverse = W[: left * size], alive[:left], inverse[: left * size, : left * size]
        pending.taken_off(inverse, slice(len(W)), slice(len(W)))


def _cheap_together(
    pool: Tensor, inverse: Tensor, W: Tensor, costs: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Which of a pool of units go at once: the cheapest, without those that these make dear.

    Of two equal channels each is free to remove, but not both. With `[G^-1]_PP = C C^T` the rows of `C^-1 W_P` that are
    a unit's have as their squared norm what it costs once those before it are gone. The first unit for which that is
    more than `RISE` times what the next in line costs alone waits for a later round, and the next takes its place.
    After some such exchanges only those before it go. A device computes those norms and is asked for them once; what
    is small is decided on the CPU.

    Args:
        pool: units, cheapest first, (u,), int64.
        inverse: `[G^-1]` of their channels, (u * size, u * size).
        W: out-projection weight, a row a channel, (u * size, d_out).
        costs: of removing each unit alone, (u,).
        count: units that go at most.

    Returns:
        Units P that go, the cheapest of the pool among them, C, and `C^-1 W_P`.
    """
    size = len(W) // len(pool)
    for exchanged in range(EXCHANGES + 1):
        going = first = min(count, len(pool))
        factor, info = torch.linalg.cholesky_ex(inverse[: going * size, : going * size])
        lost = torch.linalg.solve_triangular(factor, W[: going * size], upper=False)
        if going > 1:
            told = torch.cat([per_unit(lost.square().sum(1), size), costs, info[None]]).cpu()
            limit = RISE * told[going + min(count + exchanged, len(costs) - 1)]
            first = 1 + int((told[1:going] <= limit).cumprod(0).sum())
            if told[-1] > 0:  # from there on the factor holds nothing
                first = max(1, min(first, (int(told[-1]) - 1) // size))
        if first == going or exchanged == EXCHANGES:
            break
        places = torch.arange(len(pool), device=pool.device)
        stay = torch.cat([places[:first], places[first + 1 :]])
        C = unit_channels(stay, size)
        pool, inverse, W = pool[stay], inverse[C[:, None], C], W[C]
    end = first * size
    return pool[:first], factor[:end, :end], lost[:end]


def random(problem: OrderingProblem) -> Tensor:
    """A seeded draw, the floor that every other ordering has to beat."""
    generator = torch.Generator().manual_seed(problem.seed)
    return torch.rand(len(problem.in_weight), generator=generator, dtype=torch.float64).to(problem.W.device)


ORDERINGS: dict[str, Callable[[OrderingProblem], Tensor]] = {
    "zca": zca,
    "zca-exact": zca_exact,
    "saw": saw,
    "variance": variance,
    "residual": residual,
    "obs": obs,
    "greedy": greedy,
    "random": random,
}


# FLOPs of those that take more than a look at the factored matrix: of n channels with d outputs, k of them kept for
# certain. An inverse takes 2 n^3 / 3, an eigendecomposition 9 n^3 and a product 2 n^3.
FLOPS: dict[str, Callable[[int, int, int], float]] = {
    "zca": lambda n, d, k: 11 * n**3 if n <= ZCA_EXACT_UP_TO else quadrature_flops(n),
    "zca-exact": lambda n, d, k: 11 * n**3,
    "residual": lambda n, d, k: 2 * n**3 / 3,
    "obs": lambda n, d, k: 2 * n**3 / 3,
    "greedy": lambda n, d, k: (
        2 * n**3 / 3
        + 2 * (n**3 - k**3) / 3
        + d * (n * n - k * k)  # inverse and weights brought up to date for all that goes
        + sum((n >> halvings) ** 3 for halvings in range(1, n.bit_length()) if n >> halvings >= k)  # inverses anew
    ),
}


def order_units(name: str, problem: OrderingProblem) -> Tensor:
    """Units of a site, most important first; dead units last, whatever their score. Ties keep the unit order.

    Args:
        name: one of `ORDERINGS`.
        problem: the site.

    Returns:
        A permutation of the units, (units,), int64.

    Raises:
        SnpError: no such ordering.
    """
    if name not in ORDERINGS:
        raise SnpError(f"unknown ordering {name!r}; expected one of {', '.join(ORDERINGS)}.{near(name, ORDERINGS)}")
    scores = ORDERINGS[name](problem)
    dead = problem.definite.dead.reshape(-1, problem.unit_size).all(1)
    return torch.argsort(scores.masked_fill(dead, -torch.inf), descending=True, stable=True)


def _removal_costs(W: Tensor, pivots: Tensor) -> Tensor:
    """`trace(W_u ([G^-1]_uu)^-1 W_u^T)` of every unit, (units,).

    Infinite for one that went, or that rounding has spoilt: its pivot is not positive.

    Args:
        W: out-projection weight, a row a channel, (n, d_out).
        pivots: `[G^-1]_uu`, (units, unit_size, unit_size).
    """
    if pivots.shape[1] == 1:
        pivot = pivots[:, 0, 0]
        return (torch.linalg.vector_norm(W, dim=1).square_() / pivot).masked_fill(pivot <= 0, torch.inf)
    factors, info = torch.linalg.cholesky_ex(pivots)  # asks the device for nothing, unlike what raises
    rows = torch.linalg.solve_triangular(factors, W.reshape(len(pivots), pivots.shape[1], -1), upper=False)
    return rows.square().sum((1, 2)).masked_fill(info > 0, torch.inf)
