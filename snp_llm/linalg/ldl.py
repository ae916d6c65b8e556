"""Dampening, LDL factorisation and what is read off it. Knows Gram matrices, not the layers they came from."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from snp_llm.linalg.gram import column_blocks, triangle_flops
from snp_llm.runtime.errors import SnpError

ESCALATIONS = 4  # times that dampening is raised tenfold before giving up

PROBES = 4  # vectors that a factor is tested with

SOLVE_TOLERANCE = 1e-3  # what float32 solves less well is done in float64

SMALLEST_DAMPENING = 1e-8  # where escalation starts when dampening was zero


@dataclass(frozen=True)
class DefiniteGram:
    """A Gram matrix made positive definite.

    Attributes:
        gram: dampened, dead channels given a pivot of 1, (n, n), float64 or float32.
        diagonal: before dampening, (n,).
        dead: channels with no energy at all, (n,), bool.
        dampening: the relative dampening that it took, at least the one asked for.
        spare: its Cholesky factor, as long as nobody has taken it: a matrix of this size is worth not holding twice.
    """

    gram: Tensor
    diagonal: Tensor
    dead: Tensor
    dampening: float
    spare: list[Tensor] = field(default_factory=list)

    def factor(self) -> Tensor:
        """The lower Cholesky factor, (n, n), to be left as it is."""
        if not self.spare:
            self.spare.append(cholesky_in_place(self.gram.clone()))
        return self.spare[0]

    def inverse(self) -> Tensor:
        """`G^-1`, (n, n), the caller's own: made in place of the factor that was left over from the test of G."""
        cholesky = self.factor()
        self.spare.clear()
        return inverse_from(cholesky)


def make_definite(gram: Tensor, dampening: float) -> DefiniteGram:
    """`G + dampening * diag(G)`, positive definite for certain.

    Relative dampening treats channels of every scale alike, where `mean(diag G) * I` would be ruled by the few that
    carry massive activations. If the factorisation fails, dampening is raised tenfold, up to four times; the caller
    sees in the result what was needed and says so. Dead channels (`G_ii = 0`) never enter: they are decoupled from all
    others with a pivot of 1.

    Args:
        gram: (n, n), symmetric, float64 or float32; used up.
        dampening: relative, >= 0.

    Raises:
        SnpError: NaN or Inf in the matrix, or still indefinite after the last escalation.
    """
    if not torch.isfinite(gram).all():
        raise SnpError("Gram matrix holds NaN or Inf; expected finite activations. Try --dtype float32.")
    diagonal = gram.diagonal().clone()
    dead = diagonal <= 0
    used, info = dampening, 0
    for _ in range(1 + ESCALATIONS):
        gram.diagonal().copy_(torch.where(dead, torch.ones_like(diagonal), diagonal + used * diagonal))
        cholesky, status = try_cholesky(gram.clone())
        info = int(status)
        if info == 0:
            return DefiniteGram(gram, diagonal, dead, used, [cholesky])
        del cholesky
        last, used = used, max(10 * used, SMALLEST_DAMPENING)
    raise SnpError(
        f"Gram matrix of {len(gram):,} channels is not positive definite (pivot {info} is not positive; dampening "
        f"was raised from {dampening:g} to {last:g}). Use more calibration tokens or a larger --dampening."
    )


def cholesky_in_place(gram: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric matrix, in the memory of that matrix.

    Raises:
        SnpError: it is not positive definite.
    """
    cholesky, info = try_cholesky(gram)
    if int(info) != 0:
        raise SnpError(f"Gram matrix is not positive definite (pivot {int(info)} is not positive). Raise --dampening.")
    return cholesky


def try_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factor of a symmetric matrix, in its own memory, and 0 or the first pivot that is not positive."""
    factor = gram.mT  # LAPACK's own column order, or it would work on a copy
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, info


def inverse_from(cholesky: Tensor) -> Tensor:
    """`(C C^T)^-1` of a lower Cholesky factor C, (n, n), which is used up: LAPACK takes its memory.

    CUDA has no such routine. There a copy into that memory would be all that asking for it does.
    """
    if cholesky.device.type == "cpu":
        return torch.cholesky_inverse(cholesky, out=cholesky)
    return torch.cholesky_inverse(cholesky)


def cholesky_flops(n: int) -> float:
    """FLOPs of the Cholesky factor of an (n, n) matrix; its inverse takes twice as many from there."""
    return n**3 / 3


@dataclass(frozen=True)
class Probe:
    """Vectors that a factor of a matrix is tested with; the matrix itself need not be there any more.

    Attributes:
        vectors: drawn, (n, 4).
        scale: of every channel, (n, 1).
        right: `G (vectors / scale)`, (n, 4).
    """

    vectors: Tensor
    scale: Tensor
    right: Tensor


def probe(gram: Tensor) -> Probe:
    """Vectors to test factors of a positive definite matrix with, (n, n)."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(gram), PROBES, generator=generator, dtype=torch.float64).to(gram)
    scale = gram.diagonal().sqrt()[:, None]
    return Probe(vectors, scale, gram @ (vectors / scale))


def solve_error(cholesky: Tensor, known: Probe) -> float:
    """Relative error with which a factor solves for vectors that are known, each channel in its own scale.

    Rounding in the factor and in the right-hand side both count, so that this is nearer twice the error than half.

    Args:
        cholesky: lower factor, (n, n).
        known: of the matrix that it is a factor of.
    """
    half = torch.linalg.solve_triangular(cholesky, known.right, upper=False)
    found = torch.linalg.solve_triangular(cholesky.mT, half, upper=True) * known.scale
    return float((found - known.vectors).norm() / known.vectors.norm())


def ldl(gram: Tensor) -> tuple[Tensor, Tensor]:
    """`G = L D L^T` with `L` unit lower triangular, for a positive definite G.

    Args:
        gram: (n, n), symmetric, float64 or float32; used up.

    Returns:
        L, (n, n), and the diagonal of D, (n,): energies of the mutually orthogonal latents `L^-1 x`.

    Raises:
        SnpError: G is not positive definite.
    """
    cholesky = cholesky_in_place(gram)
    scale = cholesky.diagonal().clone()
    return cholesky.div_(scale), scale.square_()


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
    definite.spare.clear()
    L, D = ldl(definite.gram[order[:, None], order])
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
    removed = (D * times_lower(W, L).square().sum(0)).double().flip(0).cumsum(0).flip(0)
    return torch.cat([removed, removed.new_zeros(1)])


def held_out_curve(W: Tensor, L: Tensor, gram: Tensor) -> Tensor:
    """Squared output error on other tokens of keeping the first k channels, for every k.

    What the first k latents leave out of any token's output is `U[:, k:] z[k:]` with `z = L^-1 x`, whichever tokens L
    was factored from. Latents of other tokens are no longer orthogonal: with `H = L^-1 G L^-T` over those,
    `e(k) = sum_{i,j>k} H_ij (U^T U)_ij`, the sums of one matrix's trailing blocks. On the tokens of L itself H is D
    and this is the error curve. Both matrices are symmetric: only one triangle is computed, a column block at a time.

    Args:
        W: out-projection weight, columns ordered, (d_out, n), float64 or float32. For errors in a norm `v^T Q v`,
            `R^T W` with `Q = R R^T`.
        L: unit lower factor, (n, n), same dtype.
        gram: of the other tokens, ordered, (n, n), same dtype; used up.

    Returns:
        (n + 1,), float64, 0 at k = n.
    """
    n = len(L)
    half = solve_lower(L, gram)
    U = times_lower(W, L)
    added = torch.zeros(n, dtype=torch.float64, device=W.device)
    for start, stop in column_blocks(n, device=W.device.type):
        latent = solve_lower(L[:stop, :stop], half[start:stop, :stop].mT.clone())
        shares = latent.mul_(U[:, :stop].mT @ U[:, start:stop])
        # A trailing block is the one after it and a row and a column more.
        added[:start] += 2 * shares[:start].sum(1, dtype=torch.float64)
        within = shares[start:]
        added[start:stop] += (2 * within.triu(1).sum(1, dtype=torch.float64)).add_(within.diagonal())
    return torch.cat([added.flip(0).cumsum(0).flip(0), added.new_zeros(1)])


def held_out_curve_flops(d: int, n: int) -> float:
    """FLOPs of `held_out_curve` for d outputs and n inputs: a solve with the whole matrix, one with a triangle of it,
    and two products with triangles."""
    return n**3 + n**3 / 3 + 2 * d * triangle_flops(n)


def solve_lower(L: Tensor, right: Tensor) -> Tensor:
    """`L^-1 B` of a unit lower triangular L, (n, n), in place of B, (n, m).

    A row block at a time: LAPACK wants whole matrices next to each other in memory, and would get a copy of a part.
    """
    for start, stop in column_blocks(len(L), device=L.device.type):
        block = right[start:stop].addmm_(L[start:stop, :start], right[:start], alpha=-1)
        torch.linalg.solve_triangular(L[start:stop, start:stop], block, upper=False, unitriangular=True, out=block)
    return right


def times_lower(W: Tensor, L: Tensor) -> Tensor:
    """`W L` of a lower triangular L, leaving out most of the products with its zeros."""
    U = torch.empty_like(W)
    for start, stop in column_blocks(len(L), device=L.device.type):
        torch.mm(W[:, start:], L[start:, start:stop], out=U[:, start:stop])
    return U


def metric_root(gradient: Tensor) -> Tensor:
    """A square root R of `F = R R^T`, so that `||R^T v||^2 = v^T F v`; lower triangular where F is definite.

    Args:
        gradient: F, symmetric, positive semidefinite up to rounding, (d, d), float64 or float32.
    """
    cholesky, info = try_cholesky(gradient.clone())
    if int(info) == 0:
        return cholesky
    values, vectors = torch.linalg.eigh(gradient)
    return vectors * values.clamp_min(0).sqrt()
