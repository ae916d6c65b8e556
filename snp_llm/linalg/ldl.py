"""Dampening, LDL factorisation and what is read off it. Knows Gram matrices, not the layers they came from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from snp_llm.errors import SnpError

ESCALATIONS = 4  # times that dampening is raised tenfold before giving up
SMALLEST_DAMPENING = 1e-8  # where escalation starts when dampening was zero


@dataclass(frozen=True)
class DefiniteGram:
    """A Gram matrix made positive definite.

    Attributes:
        gram: dampened, dead channels given a pivot of 1, (n, n), float64.
        cholesky: its lower Cholesky factor, (n, n), float64.
        dead: channels with no energy at all, (n,), bool.
        dampening: the relative dampening that it took, at least the one asked for.
    """

    gram: Tensor
    cholesky: Tensor
    dead: Tensor
    dampening: float


def make_definite(gram: Tensor, dampening: float) -> DefiniteGram:
    """`G + dampening * diag(G)`, positive definite for certain.

    Relative dampening treats channels of every scale alike, where `mean(diag G) * I` would be ruled by the few that
    carry massive activations. If the factorisation fails, dampening is raised tenfold, up to four times; the caller
    sees in the result what was needed and says so. Dead channels (`G_ii = 0`) never enter: they are decoupled from all
    others with a pivot of 1.

    Args:
        gram: (n, n), symmetric, float64.
        dampening: relative, >= 0.

    Raises:
        SnpError: NaN or Inf in the matrix, or still indefinite after the last escalation.
    """
    if not torch.isfinite(gram).all():
        raise SnpError("Gram matrix holds NaN or Inf; expected finite activations. Try --dtype float32.")
    dead = gram.diagonal() <= 0
    diagonal = gram.diagonal().clone()
    base = gram.clone()
    base.diagonal()[dead] = 1.0
    used, info = dampening, 0
    for _ in range(1 + ESCALATIONS):
        damped = base.clone()
        damped.diagonal().add_(used * diagonal)
        cholesky, status = torch.linalg.cholesky_ex(damped)
        info = int(status)
        if info == 0:
            return DefiniteGram(damped, cholesky, dead, used)
        last, used = used, max(10 * used, SMALLEST_DAMPENING)
    raise SnpError(
        f"Gram matrix of {len(gram):,} channels is not positive definite (pivot {info} is not positive; dampening was "
        f"raised from {dampening:g} to {last:g}). Use more calibration tokens or a larger --dampening."
    )


def ldl(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`G = L D L^T` with `L` unit lower triangular, for a positive definite G.

    Args:
        gram: (n, n), symmetric, float64.

    Returns:
        L, (n, n), and the diagonal of D, (n,): energies of the mutually orthogonal latents `L^-1 x`.

    Raises:
        SnpError: G is not positive definite.
    """
    cholesky, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        raise SnpError(f"Gram matrix is not positive definite (pivot {int(info)} is not positive). Raise --dampening.")
    scale = cholesky.diagonal()
    return cholesky / scale, scale.square()


@dataclass(frozen=True)
class Subspace:
    """A site in the lower-triangular orthogonal subspace of its ordered inputs.

    Attributes:
        order: channels, most important first, (n,), int64.
        L: unit lower LDL factor of the ordered, dampened Gram matrix, (n, n), float64.
        D: latent energies, dead channels 0, (n,), float64.
        dampening: relative dampening used.
    """

    order: Tensor
    L: Tensor
    D: Tensor
    dampening: float


def build_subspace(definite: DefiniteGram, order: Tensor) -> Subspace:
    """Factor the Gram matrix with its channels in the given order.

    Args:
        definite: of n channels.
        order: a permutation of the channels, (n,), int64.
    """
    L, D = ldl(definite.gram[order][:, order])
    return Subspace(order, L, D.masked_fill(definite.dead[order], 0.0), definite.dampening)


def energy_curve(D: Tensor, unit_size: int) -> Tensor:
    """Share of the latent energy that the first k units hold, for every k.

    Args:
        D: latent energies, (n,), float64.
        unit_size: channels a unit has.

    Returns:
        `sum_{i<=k} D_i / sum D_i`, (n / unit_size + 1,), from 0 to 1; all ones where a site has no energy.
    """
    energy = D.reshape(-1, unit_size).sum(1).cumsum(0)
    curve = torch.cat([energy.new_zeros(1), energy])
    return curve / curve[-1] if curve[-1] > 0 else torch.ones_like(curve)


def error_curve(W: Tensor, L: Tensor, D: Tensor) -> Tensor:
    """Squared output error of keeping the first k channels, for every k, from the one factorisation.

    `e(k) = sum_{i>k} D_i ||U[:, i]||^2` with `U = W L`, which is exactly `||X (W - W')^T||_F^2` for the least-squares
    W' on those channels (up to dampening).

    Args:
        W: out-projection weight, columns ordered, (d_out, n), float64.
        L: unit lower factor, (n, n), float64.
        D: latent energies, (n,), float64.

    Returns:
        (n + 1,), float64, falling to 0 at k = n.
    """
    removed = (D * (W @ L).square().sum(0)).flip(0).cumsum(0).flip(0)
    return torch.cat([removed, removed.new_zeros(1)])


def held_out_curve(W: Tensor, L: Tensor, gram: Tensor, metric: Tensor) -> Tensor:
    """Squared output error on other tokens of keeping the first k channels, for every k.

    What the first k latents leave out of any token's output is `U[:, k:] z[k:]` with `z = L^-1 x`, whichever tokens L
    was factored from. Latents of other tokens are no longer orthogonal: with `H = L^-1 G L^-T` over those,
    `e(k) = sum_{i,j>k} H_ij (U^T Q U)_ij`, the sums of one matrix's trailing blocks. On the tokens of L itself H is D
    and this is the error curve.

    Args:
        W: out-projection weight, columns ordered, (d_out, n), float64.
        L: unit lower factor, (n, n), float64.
        gram: of the other tokens, ordered, (n, n), float64.
        metric: Q of the norm `v^T Q v` in which errors count, (d_out, d_out), float64.

    Returns:
        (n + 1,), float64, 0 at k = n.
    """
    half = torch.linalg.solve_triangular(L, gram, upper=False, unitriangular=True)
    latent = torch.linalg.solve_triangular(L, half.T, upper=False, unitriangular=True)
    U = W @ L
    shares = latent * (U.T @ (metric @ U))
    # A trailing block is the one after it and a row and a column more.
    added = 2 * shares.triu(1).sum(1) + shares.diagonal()
    return torch.cat([added.flip(0).cumsum(0).flip(0), added.new_zeros(1)])


def metric_root(gradient: Tensor) -> Tensor:
    """A square root R of `F = R R^T`, so that `||R^T v||^2 = v^T F v`.

    Args:
        gradient: F, symmetric, positive semidefinite up to rounding, (d, d), float64.
    """
    values, vectors = torch.linalg.eigh(gradient)
    return vectors * values.clamp_min(0).sqrt()
