"""Least-squares repair of an out-projection after its inputs were pruned. Knows matrices, not layers."""

import torch
from torch import Tensor

from snp_llm.errors import SnpError
from snp_llm.linalg.gram import column_blocks


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
