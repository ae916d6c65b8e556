"""Least squares on the kept channels of a site, and the repair chosen on held-out windows. Pure torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snp_llm.linalg.gram import column_blocks
from snp_llm.linalg.ldl import SOLVE_TOLERANCE, probe, solve_error, try_cholesky
from snp_llm.runtime.errors import SnpError


@dataclass(frozen=True)
class KeptSums:
    """Sums over a set of tokens, as far as a repair on the kept channels K needs them.

    Of a site's inputs `x`, less the mean that a bias takes up, of what its output lacks, `e`, and of what the removed
    channels P gave to that output, `y = W[:, P] x_P`.

    Attributes:
        gram: makes `sum x_K x_K^T`, (k, k), float64 or float32, the caller's own: it is large, and used up in a moment.
        taken: `sum y x_K^T = W[:, P] G[P, K]`, (d_out, k), same dtype.
        first: `sum x_K`, (k,); zero over the tokens that the mean is of.
        lost: `sum y`, (d_out,).
        tokens: how many.
        cross: `sum e x_K^T`, (d_out, k), or None where nothing but the cut is repaired.
        lacking: `sum e`, (d_out,), or None likewise.
    """

    gram: Callable[[], Tensor]
    taken: Tensor
    first: Tensor
    lost: Tensor
    tokens: int
    cross: Tensor | None = None
    lacking: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "KeptSums":
        return replace(
            self,
            gram=lambda: self.gram().to(dtype),
            taken=self.taken.to(dtype),
            first=self.first.to(dtype),
            lost=self.lost.to(dtype),
            cross=None if self.cross is None else self.cross.to(dtype),
            lacking=None if self.lacking is None else self.lacking.to(dtype),
        )

    def seen_by(self, view: Tensor) -> "KeptSums":
        """With outputs `V^T v`, V (d_out, m): their plain norm is that of v in the metric `V V^T`."""
        return replace(
            self,
            taken=view.mT @ self.taken,
            lost=view.mT @ self.lost,
            cross=None if self.cross is None else view.mT @ self.cross,
            lacking=None if self.lacking is None else view.mT @ self.lacking,
        )


@dataclass(frozen=True)
class Repair:
    """What is added to a site's weight on the kept channels.

    Attributes:
        weight: (d_out, k).
        shift: what is added to the bias, (d_out,); zero without one.
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


def repair_cut(sums: KeptSums, dampening: float) -> Tensor:
    """What is added on the kept channels for the cut, (d_out, k).

    `W' - W[:, K] = W[:, P] G[P, K] (G[K, K] + dampening * diag)^-1`.

    Args:
        sums: that it is computed from.
        dampening: relative.

    Raises:
        SnpError: the matrix is not positive definite at that dampening.
    """
    return _solve(_factor(sums.gram(), dampening), sums.taken)


def repair_drift(sums: KeptSums, choice: Choice, *, bias: bool) -> Repair:
    """What is added on the kept channels, and to the bias, for the drift.

    A share alpha of `R = C[:, K] (G[K, K] + dampening * diag)^-1`, which moves the output towards what the dense weight
    gives on these inputs plus `e`, and of the mean of `e` for the bias where there is one.

    Args:
        sums: that it is computed from, with those of what is lacking.
        choice: dampening and share.
        bias: whether there is one that takes up means.

    Raises:
        SnpError: the matrix is not positive definite at that dampening.
    """
    assert sums.cross is not None and sums.lacking is not None
    factor = _factor(sums.gram(), choice.drift_dampening)
    shift = sums.lacking / sums.tokens if bias else torch.zeros_like(sums.lacking)
    return Repair(_solve(factor, sums.cross).mul_(choice.alpha), choice.alpha * shift)


def choose_repair(fit: KeptSums, held: KeptSums, dampenings: Sequence[float], *, bias: bool) -> Choice:
    """The dampening of both repairs and the share of the second, one after the other.

    With the cut repaired, `M = W - W'`, the error of a share alpha of the drift's repair R is
    `sum ||e + M x - alpha (R x + shift)||^2`, a parabola whose minimum is known; that of the cut is `sum ||M x||^2`.
    Both repairs at a dampening share one factorisation. It is computed in float32, unless that solves it badly: the
    choice is between steps of a factor of three, and what is chosen is computed again from all tokens.

    Args:
        fit: tokens that repairs are computed from.
        held: tokens that they are judged on, about the mean of the others.
        dampenings: to try; those at which the matrix is not positive definite are left out.
        bias: whether there is one that takes up means.

    Raises:
        SnpError: the matrix is positive definite at none of them.
    """
    fitted, judged = fit.to(torch.float32), held.to(torch.float32)
    cuts: dict[float, Tensor] = {}
    drifts: dict[float, Tensor] = {}
    for dampening in dampenings:
        gram = _damped(fitted.gram(), dampening)
        known = probe(gram)
        factor, info = try_cholesky(gram)
        del gram  # it has become the factor
        if int(info) != 0 or solve_error(factor, known) > SOLVE_TOLERANCE:
            del factor  # before the next is made
            factor, info = try_cholesky(_damped(fit.gram().double(), dampening))
            if int(info) != 0:
                del factor
                continue
        cuts[dampening] = _solve(factor, fitted.taken)
        if fitted.cross is not None:
            drifts[dampening] = _solve(factor, fitted.cross)
        del factor  # before the next is made
    if not cuts:
        raise SnpError(
            f"Gram matrix of {fit.taken.shape[1]:,} channels is not positive definite (dampening up to "
            f"{max(dampenings):g}). Use more calibration tokens or a larger --dampening."
        )
    gram = judged.gram()
    best: Choice | None = None
    least, lack = 0.0, judged.taken
    for dampening, added in cuts.items():
        product = added @ gram
        error = _inner(added, product) - 2 * _inner(added, judged.taken)
        if best is None or error < least:
            # e + M x against the channels that R reads, and against the constant that the shift is multiplied with.
            best, least, lack = Choice(dampening, dampening, 0.0), error, judged.taken - product
            constant = judged.lost - added @ judged.first
    assert best is not None
    if fitted.lacking is None or judged.cross is None or judged.lacking is None:
        return best
    lack += judged.cross
    constant = constant + judged.lacking
    shift = fitted.lacking / fitted.tokens if bias else torch.zeros_like(fitted.lacking)
    most = -torch.inf
    for dampening, R in drifts.items():
        gain = _inner(R, lack) + _inner(shift, constant)
        size = _inner(R, R @ gram)
        size += _inner(shift, 2 * (R @ judged.first) + judged.tokens * shift)
        alpha = min(1.0, max(0.0, gain / size)) if size > 0 else 0.0
        saved = 2 * alpha * gain - alpha**2 * size
        if saved > most:
            most, best = saved, replace(best, drift_dampening=dampening, alpha=alpha)
    return best


def _damped(gram: Tensor, dampening: float) -> Tensor:
    """`G + dampening * diag(G)`, in place of G.

    Dead channels get a pivot of 1: what is solved for them is what they were given, which is nothing.
    """
    diagonal = gram.diagonal()
    diagonal.add_(torch.where(diagonal > 0, dampening * diagonal, torch.ones_like(diagonal)))
    return gram


def _factor(gram: Tensor, dampening: float) -> Tensor:
    factor, info = try_cholesky(_damped(gram, dampening))
    if int(info) != 0:
        raise SnpError(f"Gram matrix of {len(gram):,} channels is not positive definite (dampening {dampening:g}).")
    return factor


def _solve(cholesky: Tensor, right: Tensor) -> Tensor:
    """`right (C C^T)^-1`, (d_out, k), in the type of `right`."""
    wide = right.to(cholesky.dtype)
    half = torch.linalg.solve_triangular(cholesky.mT, wide, upper=True, left=False)
    return torch.linalg.solve_triangular(cholesky, half, upper=False, left=False, out=half).to(right.dtype)


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


def reconstruct(W: Tensor, L: Tensor, width: int) -> Tensor:
    """Out-projection weight on the first `width` channels of an ordered site.

    `W' = (W L)[:, :k] L[:k, :k]^-1 = W[:, K] + W[:, P] L[P, K] L[K, K]^-1`, the least-squares solution
    `W G[:, K] G[K, K]^-1`, by one triangular solve. Source: Offergeld, van Gerven, Ahmad, Subspace Node Pruning,
    arXiv 2405.17506.

    Args:
        W: out-projection weight, columns ordered, (d_out, n), float64.
        L: unit lower LDL factor of the ordered Gram matrix, (n, n), float64.
        width: k, channels kept, 1 <= k <= n.

    Returns:
        W', (d_out, k), float64.

    Raises:
        SnpError: shapes disagree or k is out of range.
    """
    n = W.shape[1]
    if L.shape != (n, n) or not 1 <= width <= n:
        raise SnpError(f"expected L of ({n}, {n}) and a width of 1 to {n}, got {tuple(L.shape)} and {width}.")
    kept, pruned = slice(None, width), slice(width, None)
    # Solving only for what is added leaves W untouched to the bit where nothing is pruned.
    added = W[:, pruned] @ L[pruned, kept]
    return W[:, kept] + torch.linalg.solve_triangular(L[kept, kept], added, upper=False, left=False, unitriangular=True)


def absorb_mean(bias: Tensor, W: Tensor, W_new: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """Out-projection bias that carries the mean of what was pruned: `b' = b + W mu - W' mu[K]`.

    Args:
        bias: b, (d_out,).
        W: dense weight, (d_out, n).
        W_new: W' on the kept channels, (d_out, k).
        kept: K, (k,), int64, in the column order of W'.
        mean: of the site's inputs, mu, (n,).

    Returns:
        b', (d_out,).
    """
    return bias + W @ mean - W_new @ mean[kept]


def output_energy(W: Tensor, gram: Tensor) -> float:
    """`||X W^T||_F^2 = trace(W G W^T)`, from one triangle of the symmetric G.

    Args:
        W: (d_out, n), float64 or float32.
        gram: G of the inputs, (n, n), same type.
    """
    energy = 0.0
    for start, stop in column_blocks(len(gram)):
        product = W[:, start:stop] @ gram[start:stop, start:stop]
        product.addmm_(W[:, stop:], gram[stop:, start:stop], alpha=2)
        energy += float(torch.linalg.vecdot(product, W[:, start:stop]).sum(dtype=torch.float64))
    return energy


def relative_error(W: Tensor, W_new: Tensor, kept: Tensor, gram: Tensor) -> float:
    """Reconstruction error `||X (W - W')^T||_F^2 / ||X W^T||_F^2` on the undampened Gram matrix.

    Args:
        W: dense weight, (d_out, n), float64.
        W_new: W' on the kept channels, (d_out, k), float64.
        kept: K, (k,), int64.
        gram: G of the inputs (centred where the bias absorbs the mean), (n, n), float64.
    """
    difference = W.clone()
    difference[:, kept] -= W_new
    total = ((W @ gram) * W).sum()
    return float(((difference @ gram) * difference).sum() / total) if total > 0 else 0.0
