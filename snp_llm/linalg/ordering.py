"""Which units matter most: one score per unit, larger = more important. Knows a site's matrices, not its layer.

To add an ordering: write one function from `OrderingProblem` to scores, add one line to `ORDERINGS`, one test.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from snp_llm.errors import SnpError
from snp_llm.linalg.ldl import DefiniteGram
from snp_llm.linalg.units import diagonal_blocks, per_unit, unit_channels

GREEDY_ROUNDS = 128  # removals happen in at most so many rounds: the block size r is units / GREEDY_ROUNDS


@dataclass(frozen=True)
class OrderingProblem:
    """What an ordering may look at.

    Attributes:
        definite: the dampened Gram matrix G of n channels and its Cholesky factor, float64.
        W: out-projection weight, (d_out, n), float64.
        in_weight: sum of absolute in-projection weights of each unit, (units,), float64.
        unit_size: channels a unit has.
        seed: for `random`.
    """

    definite: DefiniteGram
    W: Tensor
    in_weight: Tensor
    unit_size: int
    seed: int


def zca(problem: OrderingProblem) -> Tensor:
    """Energy of a unit under unnormalised ZCA: `trace(([G^-1/2]_uu)^-2)`, for one channel `([G^-1/2]_ii)^-2`.

    The symmetric whitening `G^-1/2` rescaled to unit diagonal, as the rows of `L^-1` are, gives latents with these
    energies. This definition is a reconstruction (arXiv 2405.17506 describes it in words).
    """
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
    inverse = torch.cholesky_inverse(problem.definite.cholesky)
    blocks = torch.linalg.inv(diagonal_blocks(inverse, problem.unit_size))
    return blocks.diagonal(dim1=1, dim2=2).sum(1)


def obs(problem: OrderingProblem) -> Tensor:
    """Exact squared error of removing the unit alone, after reconstruction: `trace(W_u ([G^-1]_uu)^-1 W_u^T)`.

    Optimal Brain Surgeon (Hassibi and Stork, 1993) on the layer's quadratic.
    """
    inverse = torch.cholesky_inverse(problem.definite.cholesky)
    return _removal_costs(problem.W, inverse, problem.unit_size)


def greedy(problem: OrderingProblem) -> Tensor:
    """Backward elimination by `obs`: remove the cheapest, repair W, downdate `G^-1`, repeat to the last unit.

    A unit's score is the place at which it went. r units go at once, cheapest first, r = 1 up to 128 units; removing
    P leaves `W_K - W_P [G^-1]_PP^-1 [G^-1]_PK` and `[G^-1]_KK - [G^-1]_KP [G^-1]_PP^-1 [G^-1]_PK` on the rest K. At
    every halving the inverse is computed afresh, so that updates do not drift.
    """
    size, W, gram = problem.unit_size, problem.W.clone(), problem.definite.gram
    units = len(gram) // size
    block = max(1, units // GREEDY_ROUNDS)
    scores = torch.empty(units, dtype=W.dtype, device=W.device)
    inverse = torch.cholesky_inverse(problem.definite.cholesky)
    alive = torch.arange(units, device=W.device)  # units that the matrices still hold
    gone = torch.zeros(units, dtype=torch.bool, device=W.device)  # of those, the removed ones: updated, but never read
    removed = 0
    while removed < units:
        costs = _removal_costs(W, inverse, size).masked_fill(gone, torch.inf)
        going = torch.argsort(costs, stable=True)[: min(block, units - removed)]
        scores[alive[going]] = torch.arange(removed, removed + len(going), dtype=W.dtype, device=W.device)
        gone[going] = True
        removed += len(going)
        P = unit_channels(going, size)
        rows = inverse[P]
        share = torch.linalg.solve(rows[:, P], rows)
        W.addmm_(W[:, P], share, alpha=-1)
        inverse.addmm_(
            rows.T, share, alpha=-1
        )  # in place on all channels: gathering the rest would cost ten times this
        inverse.diagonal()[P] += 1.0  # was zero up to rounding; keeps the blocks of removed units invertible
        if 2 * int((~gone).sum()) <= len(gone):
            channels = unit_channels((~gone).nonzero().squeeze(1), size)
            W, gram, alive = W[:, channels], gram[channels][:, channels], alive[~gone]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
            gone = torch.zeros(len(alive), dtype=torch.bool, device=W.device)
    return scores


def random(problem: OrderingProblem) -> Tensor:
    """A seeded draw, the floor that every other ordering has to beat."""
    generator = torch.Generator().manual_seed(problem.seed)
    return torch.rand(len(problem.in_weight), generator=generator, dtype=torch.float64).to(problem.W.device)


ORDERINGS: dict[str, Callable[[OrderingProblem], Tensor]] = {
    "zca": zca,
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


def _removal_costs(W: Tensor, inverse: Tensor, unit_size: int) -> Tensor:
    """`trace(W_u ([G^-1]_uu)^-1 W_u^T)` of every unit, (units,)."""
    if unit_size == 1:
        return W.square().sum(0) / inverse.diagonal()
    blocks = diagonal_blocks(inverse, unit_size)
    columns = W.reshape(W.shape[0], -1, unit_size).permute(1, 2, 0)  # (units, unit_size, d_out)
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))
