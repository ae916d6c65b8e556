"""Which units matter most: one score per unit, larger = more important. Knows a site's matrices, not its layer.

To add an ordering: write one function from `OrderingProblem` to scores, add one line to `ORDERINGS`, one test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from snp_llm.linalg.gram import column_blocks, random_signs
from snp_llm.linalg.ldl import DefiniteGram, cholesky_in_place
from snp_llm.linalg.units import diagonal_blocks, per_unit, unit_channels
from snp_llm.runtime.errors import SnpError

GREEDY_ROUNDS = 128  # in which all units would go: r at once, r = units / GREEDY_ROUNDS

CANDIDATES = 2  # times r, the cheapest units, from which those are taken that can go together

EXCHANGES = 4  # of a dear unit for the next one, before fewer go than could

RISE = 1.05  # times what the next in line costs: what a unit may come to cost through others that go at once

ZCA_EXACT_UP_TO = 512  # channels

LEAST_SIGNS = 128  # random projections of a column, whose norm comes out to 12 %

SMALLEST_SPREAD = 1e-8  # relative variance of a measure, below which it is one atom up to rounding

PANEL = 96  # channels whose removal the inverse takes up at once: one by one only memory would be busy


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
    """The same by an eigendecomposition, at every size."""
    values, vectors = torch.linalg.eigh(problem.definite.gram)
    whitening = (vectors / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()) @ vectors.T
    blocks = torch.linalg.inv(diagonal_blocks(whitening, problem.unit_size))
    return (blocks @ blocks).diagonal(dim1=1, dim2=2).sum(1)


def zca_quadrature(definite: DefiniteGram, unit_size: int) -> Tensor:
    """The score of `zca` to a few per cent (made-up sites: 12 %), for little more than an LDL costs.

    In the basis of the eigenvectors of `[G^-1]_uu`, `[G^-1/2]_uu` is all but diagonal: a unit's score is the sum over
    its channels there. For one of those, e, `e^T f(G) e` is the integral of f over the spectrum of G in the measure
    that e sees of it, and `e^T G^p e`, p = -2 to 2, are five of its moments, the outer ones squared norms of `G^-1 e`
    and `G e`. Two of Gauss's rules with two nodes, one on the moments -1 to 2 and one on -2 to 1, err to opposite
    sides; their geometric mean is taken (Golub and Meurant, Matrices, Moments and Quadrature, 2010). No inverse is
    formed: all is read off the columns of the inverse Cholesky factor, a block at a time, but for what `G^-1 e` has
    outside its unit, whose norm is estimated from random signs (Achlioptas, 2003).

    Args:
        definite: of n channels.
        unit_size: channels a unit has.

    Returns:
        (n / unit_size,), float64.
    """
    gram, cholesky = definite.gram, definite.factor()
    n = len(gram)
    signs = random_signs(n, max(LEAST_SIGNS, n // 32), gram)
    solved = torch.linalg.solve_triangular(cholesky, signs, upper=False)
    scores = []
    for start, stop in column_blocks(n, unit_size):
        columns = torch.eye(n - start, stop - start, dtype=gram.dtype, device=gram.device)
        columns = torch.linalg.solve_triangular(cholesky[start:, start:], columns, upper=False)
        low, basis = _unit_spectra(columns, unit_size)
        outside = _in_basis(solved[start:].mT @ columns, basis) - low * _in_basis(signs[start:stop].mT, basis)
        turned = _in_basis(gram[:, start:stop], basis)
        high = (diagonal_blocks(turned[start:stop], unit_size) * basis).sum(1).reshape(-1)
        outside, highest = (torch.linalg.vector_norm(x, dim=0).double().square() for x in (outside, turned))
        low, high, one = low.double(), high.double(), torch.ones_like(highest)
        lowest = low.square() + outside / signs.shape[1]
        # With the measures x^-1 dmu and x^-2 dmu the moments start at 0, and the functions are x^1/2 and x^3/2.
        scores.append(1 / (_two_nodes(low, one, high, highest, 0.5) * _two_nodes(lowest, low, one, high, 1.5)))
    return per_unit(torch.cat(scores), unit_size)


def _unit_spectra(columns: Tensor, unit_size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, (b,), and eigenvectors, (units, unit_size, unit_size), of `C_u^T C_u` for every unit's columns."""
    if unit_size == 1:
        return columns.square().sum(0), columns.new_ones(columns.shape[1], 1, 1)
    by_unit = columns.reshape(len(columns), -1, unit_size).transpose(0, 1)
    values, vectors = torch.linalg.eigh(by_unit.mT @ by_unit)
    return values.reshape(-1), vectors


def _in_basis(columns: Tensor, basis: Tensor) -> Tensor:
    """Each unit's columns, (rows, b), turned into its own basis, (units, unit_size, unit_size)."""
    if basis.shape[1] == 1:
        return columns
    return torch.einsum("ruc,uce->rue", columns.reshape(len(columns), len(basis), -1), basis).reshape(columns.shape)


def _two_nodes(m0: Tensor, m1: Tensor, m2: Tensor, m3: Tensor, power: float) -> Tensor:
    """Integral of `x^power` by Gauss's rule with two nodes, from four moments of a measure on x > 0, each (n,)."""
    mean = m1 / m0
    spread = m2 / (m0 * mean**2) - 1  # variance and skewness relative to the mean
    atom = ~(spread > SMALLEST_SPREAD)  # a channel on its own: all of its measure in one place
    spread = torch.where(atom, torch.ones_like(spread), spread)
    skew = (m3 / (m0 * mean**3) - 3 * spread - 1) / spread**1.5
    half = torch.where(atom, torch.zeros_like(skew), skew / 2)
    far = half.abs() + (half.square() + 1).sqrt()
    upper = torch.where(half >= 0, far, 1 / far)
    lower = -1 / upper
    share = upper / (upper - lower)  # of the measure, at the lower node
    nodes = [(mean * (1 + spread.sqrt() * z)).clamp_min(torch.finfo(mean.dtype).tiny) for z in (lower, upper)]
    rule = m0 * (share * nodes[0] ** power + (1 - share) * nodes[1] ** power)
    return torch.where(atom, m0 * mean**power, rule)


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
    scores = torch.empty(units, dtype=torch.float64, device=device)
    inverse = problem.definite.inverse().mT  # row order
    W = problem.W.mT.clone(memory_format=torch.contiguous_format)  # what is read and written of it are whole channels
    alive = torch.arange(units, device=device)  # units that the matrices still hold
    fresh, removed = units, 0
    while True:
        n = len(inverse)
        pivots = diagonal_blocks(inverse, size).clone()
        gone = torch.zeros(len(alive), dtype=torch.bool, device=device)
        # What has to come off the inverse for the units removed since it was last written: rows^T shares.
        rows = inverse.new_empty(PANEL + block * size, n)
        shares, filled = torch.empty_like(rows), 0
        while removed < last and filled < PANEL:
            costs = _removal_costs(W, pivots).masked_fill(gone, torch.inf)
            count = min(block, last - removed)
            going = torch.argsort(costs, stable=True)[: min(CANDIDATES * block, units - removed)]
            if block == 1:
                going = going[:1]
            else:
                C = unit_channels(going, size)
                among = inverse[C[:, None], C].addmm_(rows[:filled, C].mT, shares[:filled, C], alpha=-1)
                going = going[_cheap_together(among, W[C], costs[going], count, size)]
            scores[alive[going]] = torch.arange(removed, removed + len(going), dtype=torch.float64, device=device)
            gone[going] = True
            removed += len(going)
            P = unit_channels(going, size)
            now = inverse[P].addmm_(rows[:filled, P].mT, shares[:filled], alpha=-1)
            share = torch.linalg.solve(now[:, P], now)
            W.addmm_(share.mT, W[P], alpha=-1)
            by_unit = (len(P), len(alive), size)
            pivots -= torch.einsum("pua,pub->uab", now.reshape(by_unit), share.reshape(by_unit))
            pivots[going] = torch.eye(size, dtype=W.dtype, device=device)  # was zero up to rounding
            rows[filled : filled + len(P)], shares[filled : filled + len(P)] = now, share
            filled += len(P)
        if removed == last:
            places = torch.argsort(_removal_costs(W, pivots)[~gone], stable=True)
            scores[alive[~gone][places]] = torch.arange(last, units, dtype=torch.float64, device=device)
            return scores
        left = len(alive) - int(gone.sum())
        if 2 * left <= fresh:
            W, alive = W[unit_channels((~gone).nonzero().squeeze(1), size)], alive[~gone]
            channels = unit_channels(alive, size)
            del inverse
            cholesky = cholesky_in_place(gram[channels[:, None], channels])
            inverse, fresh = torch.cholesky_inverse(cholesky, out=cholesky).mT, left
            continue
        # Units from beyond what is left take the places of those that went.
        target = gone[:left].nonzero().squeeze(1)
        source = left + (~gone[left:]).nonzero().squeeze(1)
        alive[target] = alive[source]
        target, source = unit_channels(target, size), unit_channels(source, size)
        for matrix in (W, inverse):
            matrix[target] = matrix[source]
        for matrix in (inverse, rows, shares):
            matrix[:, target] = matrix[:, source]
        W, alive, inverse = W[: left * size], alive[:left], inverse[: left * size, : left * size]
        inverse.addmm_(rows[:filled, : len(W)].mT, shares[:filled, : len(W)], alpha=-1)


def _cheap_together(inverse: Tensor, W: Tensor, costs: Tensor, count: int, size: int) -> Tensor:
    """Which of a pool of units go at once: the cheapest, without those that these make dear.

    Of two equal channels each is free to remove, but not both. With `[G^-1]_PP = C C^T` the rows of `C^-1 W_P` that are
    a unit's have as their squared norm what it costs once those before it are gone. The first unit for which that is
    more than `RISE` times what the next in line costs alone waits for a later round, and the next takes its place.
    After some such exchanges only those before it go.

    Args:
        inverse: `[G^-1]` of the pool's channels, cheapest unit first, (u * size, u * size).
        W: out-projection weight, a row a channel, (u * size, d_out).
        costs: of removing each unit alone, ascending, (u,).
        count: units that go at most.
        size: channels a unit has.

    Returns:
        Places in the pool, ascending, the first among them, int64.
    """
    pool = places = torch.arange(len(costs), device=W.device)
    exchanged = 0
    while True:
        going, waiting = pool[:count], pool[count:]
        P = unit_channels(going, size)
        factor, info = torch.linalg.cholesky_ex(inverse[P[:, None], P])
        rows = torch.linalg.solve_triangular(factor, W[P], upper=False)
        limit = RISE * (costs[waiting[:1]] if len(waiting) else costs[-1:])
        cheap = per_unit(rows.square().sum(1), size) <= limit
        cheap &= (info == 0) | (places[: len(going)] < (info - 1) // size)  # beyond, the factor holds nothing
        dear = (~cheap[1:]).nonzero()
        if not len(dear):
            return going
        first = 1 + int(dear[0])
        if exchanged == EXCHANGES:
            return going[:first]
        exchanged += 1
        pool = torch.cat([pool[:first], pool[first + 1 :]])


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
        near = get_close_matches(name, ORDERINGS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SnpError(f"unknown ordering {name!r}; expected one of {', '.join(ORDERINGS)}.{hint}")
    scores = ORDERINGS[name](problem)
    dead = problem.definite.dead.reshape(-1, problem.unit_size).all(1)
    return torch.argsort(scores.masked_fill(dead, -torch.inf), descending=True, stable=True)


def _removal_costs(W: Tensor, pivots: Tensor) -> Tensor:
    """`trace(W_u ([G^-1]_uu)^-1 W_u^T)` of every unit, (units,).

    Args:
        W: out-projection weight, a row a channel, (n, d_out).
        pivots: `[G^-1]_uu`, (units, unit_size, unit_size).
    """
    if pivots.shape[1] == 1:
        return torch.linalg.vector_norm(W, dim=1).square_() / pivots[:, 0, 0]
    columns = W.reshape(len(pivots), pivots.shape[1], -1)
    return (columns * torch.linalg.solve(pivots, columns)).sum((1, 2))
