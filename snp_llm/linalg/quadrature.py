"""ZCA scores by Gauss's rules, where an eigendecomposition would take too long. Knows a Gram matrix, not its site."""

import torch
from torch import Tensor

from snp_llm.linalg.gram import column_blocks, random_signs
from snp_llm.linalg.ldl import DefiniteGram
from snp_llm.linalg.units import diagonal_blocks, per_unit

LEAST_SIGNS = 128  # random projections of a column, whose norm comes out to 12 %

SMALLEST_SPREAD = 1e-8  # relative variance of a measure, below which it is one atom up to rounding


def zca_quadrature(definite: DefiniteGram, unit_size: int) -> Tensor:
    """ZCA scores of units to a few per cent (made-up sites: 12 %), for little more than an LDL costs.

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


def quadrature_flops(n: int) -> float:
    """FLOPs of `zca_quadrature`, of n channels: columns of the inverse factor, and two products with random signs."""
    return n**3 / 3 + 2 * n * n * max(LEAST_SIGNS, n // 32)


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
