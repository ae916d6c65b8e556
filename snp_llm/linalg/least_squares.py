"""Least squares on the kept channels of a site, and the repair chosen on held-out windows. Pure torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch import Tensor

from snp_llm.linalg.gram import OutputSums, column_blocks
from snp_llm.linalg.ldl import SOLVE_TOLERANCE, cholesky_flops, probe, solve_error, try_cholesky
from snp_llm.runtime.errors import SnpError


def repair(gram: Tensor, cross: Tensor, dampening: float) -> Tensor:
    """What is added to a weight on the kept channels K so that its output gains `v`, as far as the inputs there say it.

    `C (G + dampening * diag(G))^-1`. For what the removed channels P gave, `C = W[:, P] G[P, K]`, the weight is then
    `W[:, K]` plus that, the least-squares solution; for drift it moves the output towards its reference.

    Args:
        gram: `G = sum x_K x_K^T`, (k, k), float64 or float32; used up.
        cross: `C = sum v x_K^T`, (d_out, k), same dtype.
        dampening: relative.

    Returns:
        (d_out, k), same dtype.

    Raises:
        SnpError: the matrix is not positive definite at that dampening.
    """
    factor, info = try_cholesky(_damped(gram, dampening))
    if int(info) != 0:
        raise SnpError(f"Gram matrix of {len(gram):,} channels is not positive definite (dampening {dampening:g}).")
    return _solve(factor, cross)


def repair_flops(d: int, k: int) -> float:
    """FLOPs of a repair of d outputs on k kept channels: a factor, and two solves with it."""
    return cholesky_flops(k) + 2 * d * k * k


def factored_repair(W: Tensor, L: Tensor, width: int) -> Tensor:
    """The `repair` of a cut, read off the factorisation of the whole site at the same dampening.

    `W[:, P] L[P, K] L[K, K]^-1` for the first `width` channels K of an ordered site and P, those after them: half of
    the solve is in L already. On K the weight is then `(W L)[:, K] L[K, K]^-1`. Source: Offergeld, van Gerven, Ahmad,
    Subspace Node Pruning, arXiv 2405.17506.

    Args:
        W: out-projection weight, columns ordered, (d_out, n), float64 or float32.
        L: unit lower LDL factor of the ordered Gram matrix, (n, n), same dtype.
        width: k, channels kept, 0 <= k <= n.

    Returns:
        (d_out, k), same dtype; zero where nothing is removed.

    Raises:
        SnpError: shapes disagree or k is out of range.
    """
    n = W.shape[1]
    if L.shape != (n, n) or not 0 <= width <= n:
        raise SnpError(f"expected L of ({n}, {n}) and a width of 0 to {n}, got {tuple(L.shape)} and {width}.")
    kept, gone = slice(None, width), slice(width, None)
    half = W[:, gone] @ L[gone, kept]
    return torch.linalg.solve_triangular(L[kept, kept], half, upper=False, left=False, unitriangular=True)


def factored_repair_flops(d: int, n: int, k: int) -> float:
    """FLOPs of `factored_repair` for d outputs, k of n channels kept."""
    return 2 * d * (n - k) * k + d * k * k


@dataclass(frozen=True)
class Cut:
    """An out-projection and which of its channels go, all in one type, float64 or float32.

    Attributes:
        W: dense weight, (d_out, n).
        kept: K, ascending, (k,), int64.
        gone: the other channels, P, ascending, (n - k,), int64.
        mean: of the inputs, (n,), which the bias absorbs; None where it absorbs none.
        root: of the metric in which errors count, (d_out, d_out); None for the plain norm.
        dampening: of the factorisation, relative.
        repair: what is to be added on K at that dampening, (d_out, k); None where the dampening is still to be chosen.
    """

    W: Tensor
    kept: Tensor
    gone: Tensor
    mean: Tensor | None
    root: Tensor | None
    dampening: float
    repair: Tensor | None


@dataclass(frozen=True)
class KeptSums:
    """Sums over a set of tokens, as far as a repair on the kept channels K needs them, all in one type.

    Attributes:
        gram: makes `sum x_K x_K^T`, (k, k), float64 or float32, the caller's own: it is large, and used up in a moment.
        first: `sum x_K`, (k,); zero over the tokens that the mean is of.
        tokens: how many.
        cut: of what the removed channels P gave to the output, `W[:, P] x_P`, with cross `W[:, P] G[P, K]`, (d_out, k).
        drift: of what the output lacks, (d_out, k), or None where nothing but the cut is repaired.
        mean: of all inputs, (n,), that has been taken off x and that a bias takes up; None without such a bias.
    """

    gram: Callable[[], Tensor]
    first: Tensor
    tokens: int
    cut: OutputSums
    drift: OutputSums | None = None
    mean: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "KeptSums":
        """These sums in another type."""
        sums = self._with_outputs(lambda tensor: tensor.to(dtype))
        return replace(sums, gram=lambda: self.gram().to(dtype), first=self.first.to(dtype))

    def seen_by(self, view: Tensor) -> "KeptSums":
        """Sums with outputs `V^T v`, V (d_out, m): their plain norm is that of v in the metric `V V^T`."""
        return self._with_outputs(lambda tensor: view.mT @ tensor)

    def _with_outputs(self, change: Callable[[Tensor], Tensor]) -> "KeptSums":
        def changed(sums: OutputSums) -> OutputSums:
            return OutputSums(change(sums.cross), change(sums.first))

        return replace(self, cut=changed(self.cut), drift=self.drift and changed(self.drift))


@dataclass(frozen=True)
class Choice:
    """How a site is repaired.

    Attributes:
        dampening: of the repair of the cut.
        drift_dampening: of the repair of the drift.
        alpha: share of the latter that is taken, in [0, 1].
    """

    dampening: float
    drift_dampening: float
    alpha: float


def choose_repair(fit: KeptSums, held: KeptSums, dampenings: Sequence[float]) -> Choice:
    """What serves held-out tokens best: the dampening of both repairs and the share of the second, one after the other.

    With the cut repaired, `M = W - W'`, the error of a share alpha of the drift's repair R is
    `sum ||e + M x - alpha (R x + shift)||^2`, a parabola whose minimum is known; that of the cut is `sum ||M x||^2`.
    The shift, the mean of e, is what a bias takes up where there is one.

    Args:
        fit: tokens that repairs are computed from.
        held: tokens that they are judged on, about the mean of the others.
        dampenings: to try; those at which the matrix is not positive definite are left out.

    Raises:
        SnpError: the matrix is positive definite at none of them.
    """
    cuts, drifts = _candidates(fit, dampenings)
    judged = held.to(torch.float32)
    gram = judged.gram()

    def cut_error(dampening: float) -> tuple[float, float, Tensor]:
        product = cuts[dampening] @ gram
        return _inner(cuts[dampening], product) - 2 * _inner(cuts[dampening], judged.cut.cross), dampening, product

    _, dampening, product = min(map(cut_error, cuts), key=itemgetter(0))
    if fit.drift is None or judged.drift is None:
        return Choice(dampening, dampening, 0.0)
    # e + M x against the channels that R reads, and against the constant that the shift is multiplied with.
    lack = (judged.cut.cross - product).add_(judged.drift.cross)
    constant = judged.cut.first - cuts[dampening] @ judged.first + judged.drift.first
    shift = fit.drift.first.to(lack) / fit.tokens if fit.mean is not None else torch.zeros_like(constant)

    def saved(drift_dampening: float) -> tuple[float, Choice]:
        R = drifts[drift_dampening]
        gain = _inner(R, lack) + _inner(shift, constant)
        size = _inner(R, R @ gram)
        size += _inner(shift, 2 * (R @ judged.first) + judged.tokens * shift)
        alpha = min(1.0, max(0.0, gain / size)) if size > 0 else 0.0
        return 2 * alpha * gain - alpha**2 * size, Choice(dampening, drift_dampening, alpha)

    return max(map(saved, drifts), key=itemgetter(0))[1]


def choose_repair_flops(d: int, k: int, candidates: int, repairs: int) -> float:
    """FLOPs of `choose_repair` between so many dampenings, of d outputs on k kept channels: for each a factor, and for
    each of the repairs that share it two solves and a product."""
    return candidates * (cholesky_flops(k) + repairs * 4 * d * k * k)


def _candidates(fit: KeptSums, dampenings: Sequence[float]) -> tuple[dict[float, Tensor], dict[float, Tensor]]:
    """Repairs of the cut and of the drift by dampening, (d_out, k) each, float32.

    Both at a dampening share one factorisation. It is computed in float32, unless that solves it badly: the choice is
    between steps of a factor of three, and what is chosen is computed again from all tokens.
    """
    fitted = fit.to(torch.float32)
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
        cuts[dampening] = _solve(factor, fitted.cut.cross)
        if fitted.drift is not None:
            drifts[dampening] = _solve(factor, fitted.drift.cross)
        del factor  # before the next is made
    if not cuts:
        raise SnpError(
            f"Gram matrix of {len(fit.first):,} channels is not positive definite (dampening up to "
            f"{max(dampenings):g}). Use more calibration tokens or a larger --dampening."
        )
    return cuts, drifts


def _damped(gram: Tensor, dampening: float) -> Tensor:
    """`G + dampening * diag(G)`, in place of G.

    Dead channels get a pivot of 1: what is solved for them is what they were given, which is nothing.
    """
    diagonal = gram.diagonal()
    diagonal.add_(torch.where(diagonal > 0, dampening * diagonal, torch.ones_like(diagonal)))
    return gram


def _solve(cholesky: Tensor, right: Tensor) -> Tensor:
    """`right (C C^T)^-1`, (d_out, k), in the type of `right`."""
    wide = right.to(cholesky.dtype)
    half = torch.linalg.solve_triangular(cholesky.mT, wide, upper=True, left=False)
    return torch.linalg.solve_triangular(cholesky, half, upper=False, left=False, out=half).to(right.dtype)


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))


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
    for start, stop in column_blocks(len(gram), device=gram.device.type):
        product = W[:, start:stop] @ gram[start:stop, start:stop]
        product.addmm_(W[:, stop:], gram[stop:, start:stop], alpha=2)
        energy += float(torch.linalg.vecdot(product, W[:, start:stop]).sum(dtype=torch.float64))
    return energy
