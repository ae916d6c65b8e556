"""How far a repair goes: dampening and share chosen by the error on tokens that it was not computed from.

A least-squares weight fits the tokens it was computed from better than any others, the more so the fewer they were.
Knows matrices, not layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snp_llm.errors import SnpError


@dataclass(frozen=True)
class TokenSums:
    """Sums over a set of tokens of a site's inputs `x`, less the mean that a bias takes up, and of what it lacks, `e`.

    Attributes:
        gram: `sum x x^T`, (n, n), float64.
        first: `sum x`, (n,), float64; zero over the tokens that the mean is of.
        tokens: how many.
        cross: `sum e x^T`, (d_out, n), float64, or None where nothing but the cut is repaired.
        lacking: `sum e`, (d_out,), float64, or None likewise.
    """

    gram: Tensor
    first: Tensor
    tokens: int
    cross: Tensor | None = None
    lacking: Tensor | None = None


@dataclass(frozen=True)
class Repair:
    """What is added to a site's weight on the kept channels.

    Attributes:
        weight: (d_out, k), float64.
        shift: what is added to the bias, (d_out,), float64; zero without drift.
    """

    weight: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Choice:
    """What serves held-out tokens best.

    Attributes:
        dampening: of the repair of the cut.
        drift_dampening: of the repair of the drift.
        alpha: share of the latter that is taken, in [0, 1].
    """

    dampening: float
    drift_dampening: float
    alpha: float


def cut_repair(W: Tensor, sums: TokenSums, kept: Tensor, dampening: float) -> Tensor:
    """`W' - W[:, K] = W[:, P] G[P, K] (G[K, K] + dampening * diag)^-1`: what the kept channels take over, (d_out, k).

    Raises:
        SnpError: the matrix is not positive definite at that dampening.
    """
    return _solve(_removed_product(W, sums.gram, kept), sums.gram, kept, dampening)


def drift_repair(sums: TokenSums, kept: Tensor, dampening: float, *, bias: bool) -> Repair:
    """`R = C[:, K] (G[K, K] + dampening * diag)^-1`, and the mean of `e` for the bias where there is one.

    Added to the cut weight, it moves the output towards what the dense weight gives on these inputs plus `e`.

    Raises:
        SnpError: the matrix is not positive definite at that dampening.
    """
    assert sums.cross is not None and sums.lacking is not None
    shift = sums.lacking / sums.tokens
    return Repair(_solve(sums.cross[:, kept], sums.gram, kept, dampening), shift if bias else torch.zeros_like(shift))


def choose_repair(
    W: Tensor,
    fit: TokenSums,
    held: TokenSums,
    kept: Tensor,
    metric: Tensor,
    dampenings: Sequence[float],
    *,
    bias: bool,
) -> Choice:
    """The dampening of both repairs and the share of the second, one after the other.

    With the cut repaired, `M = W - W'`, the error of a share alpha of the drift's repair R is
    `sum ||e + M x - alpha (R x + shift)||^2`, a parabola whose minimum is known; that of the cut is `sum ||M x||^2`.

    Args:
        W: out-projection weight, (d_out, n), float64.
        fit: tokens that repairs are computed from.
        held: tokens that they are judged on, about the mean of the others.
        kept: K, (k,), int64.
        metric: Q of the norm `v^T Q v` in which errors count, (d_out, d_out), float64.
        dampenings: to try; those at which the matrix is not positive definite are left out.
        bias: whether there is one that takes up means.

    Raises:
        SnpError: the matrix is positive definite at none of them.
    """
    held_kept = held.gram[kept][:, kept]
    removed = _removed_product(W, held.gram, kept)
    errors: dict[float, float] = {}
    repairs: dict[float, Tensor] = {}
    for dampening in dampenings:
        try:
            repairs[dampening] = cut_repair(W, fit, kept, dampening)
        except SnpError:
            continue
        errors[dampening] = _quadratic(repairs[dampening], held_kept, metric) - 2 * _inner(
            repairs[dampening], removed, metric
        )
    if not errors:
        raise SnpError(
            f"Gram matrix of {len(kept):,} channels is not positive definite (dampening up to {max(dampenings):g}). "
            "Use more calibration tokens or a larger --dampening."
        )
    best = min(errors, key=lambda d: errors[d])
    if fit.cross is None or held.cross is None or held.lacking is None:
        return Choice(best, best, 0.0)

    added = repairs[best]
    # e + M x against the channels that R reads, and against the constant that the shift is multiplied with.
    lack = held.cross[:, kept] + removed - added @ held_kept
    gone = _others(W, kept)
    constant = held.lacking + W[:, gone] @ held.first[gone] - added @ held.first[kept]
    gains: dict[float, tuple[float, float]] = {}
    for dampening in errors:
        repair = drift_repair(fit, kept, dampening, bias=bias)
        weighted = metric @ repair.shift
        gain = _inner(repair.weight, lack, metric) + float(weighted @ constant)
        size = _quadratic(repair.weight, held_kept, metric)
        size += float(weighted @ (2 * repair.weight @ held.first[kept] + held.tokens * repair.shift))
        alpha = min(1.0, max(0.0, gain / size)) if size > 0 else 0.0
        gains[dampening] = (2 * alpha * gain - alpha**2 * size, alpha)
    drift_best = max(gains, key=lambda d: gains[d][0])
    return Choice(best, drift_best, gains[drift_best][1])


def _solve(right: Tensor, gram: Tensor, kept: Tensor, dampening: float) -> Tensor:
    """`right (G[K, K] + dampening * diag)^-1`; dead channels get nothing."""
    matrix = gram[kept][:, kept]
    diagonal = matrix.diagonal().clone()
    matrix.diagonal().add_(torch.where(diagonal > 0, dampening * diagonal, torch.ones_like(diagonal)))
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise SnpError(f"Gram matrix of {len(kept):,} channels is not positive definite (dampening {dampening:g}).")
    return torch.cholesky_solve(right.T, factor).T


def _removed_product(W: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """`W[:, P] G[P, K]`, (d_out, k)."""
    gone = _others(W, kept)
    return W[:, gone] @ gram[gone][:, kept]


def _others(W: Tensor, kept: Tensor) -> Tensor:
    """P: the channels that are not in K, (n,), bool."""
    gone = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    gone[kept] = False
    return gone


def _inner(a: Tensor, b: Tensor, metric: Tensor) -> float:
    return float(((metric @ a) * b).sum())


def _quadratic(a: Tensor, gram: Tensor, metric: Tensor) -> float:
    return _inner(a, a @ gram, metric)
