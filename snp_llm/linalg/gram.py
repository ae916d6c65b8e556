"""First and second moments of a site's inputs. Knows tensors, not where they come from or what is done with them."""

import warnings
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

# Only the blocks on and below the diagonal are computed: with 8 column blocks that is 56 % of the products. Narrower
# blocks would save little more and make the products too slim to run at full speed.
COLUMN_BLOCKS = 8

NARROWEST_BLOCK = 64

NARROWEST_ON_GPU = 1024  # what is slimmer takes a GPU less time than the host takes to ask for it

# Up to this share of inputs that are not zero a sparse product is quicker on a CPU, 1.3 to 2.5 times at 3 to 5 %; at
# 10 % it is level or slower. Small sites are not worth the conversion.
SPARSE_DENSITY = 1 / 16

SPARSE_FROM = 512

SAMPLED = 16  # one token of so many shows how sparse a batch is

ROWS_AT_ONCE = {"cpu": 512, "cuda": 4096}  # of a matrix that is not worth a copy as a whole

SUMMED_AT_ONCE = 4096  # tokens that tensor cores sum


@dataclass(frozen=True)
class Moments:
    """Sums over calibration tokens of a site's inputs `x`.

    Attributes:
        second: lower triangle (the rest is undefined) of `sum x x^T`, (n, n), float32 or float64.
        first: `sum x`, (n,), same dtype.
        tokens: how many were summed.
        whole: whether the upper triangle is there as well.
    """

    second: Tensor
    first: Tensor
    tokens: int
    whole: bool = False


def empty_moments(n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Moments:
    """Moments of nothing, for inputs of `n` channels; sums are kept in `dtype`, raised to float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return Moments(
        torch.zeros(n, n, dtype=wide, device=device),
        torch.zeros(n, dtype=wide, device=device),
        0,
    )


def add_moments(moments: Moments, inputs: Tensor) -> Moments:
    """Adds a batch of inputs to the sums, in place, and returns the moments with the new count.

    Inputs that are mostly zero, as after a ReLU, are multiplied as a sparse matrix where that is quicker.

    Args:
        moments: of n channels.
        inputs: (..., n), any floating dtype, on the moments' device.
    """
    x = widened(inputs.reshape(-1, inputs.shape[-1]), moments.second.dtype)
    add = add_sparse_product if _mostly_zero(x) else add_product
    add(moments.second, x)
    moments.first.add_(x.sum(0, dtype=moments.first.dtype))
    return Moments(moments.second, moments.first, moments.tokens + x.shape[0])


def add_product(second: Tensor, x: Tensor) -> None:
    """`second += x^T x` on and below the diagonal, in place; above it only within blocks.

    Args:
        second: (n, n), float32 or float64.
        x: (tokens, n), `widened`.
    """
    for start, stop in column_blocks(len(second), device=second.device.type):
        add_matmul(second[start:, start:stop], x[:, start:].T, x[:, start:stop])


def add_matmul(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """`sums += a b`, in place, for `widened` a and b; what they have in half precision goes through tensor cores.

    Products of two such numbers are exact in float32. Tensor cores add them up in float32 too, but may truncate where
    others round, so that not too many are left to them at once.
    """
    if a.dtype == sums.dtype:
        sums.addmm_(a, b)
        return
    for start in range(0, a.shape[1], SUMMED_AT_ONCE):
        part = slice(start, start + SUMMED_AT_ONCE)
        sums.add_(torch.mm(a[:, part], b[part], out_dtype=sums.dtype))


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs in the type in which they are multiplied, for sums of type `dtype`."""
    return x.to(multiplied_as(x.dtype, dtype, x.device.type))


def multiplied_as(inputs: torch.dtype, sums: torch.dtype, device: str) -> torch.dtype:
    """Type in which inputs are multiplied: that of the sums, or half precision where a device sums it in float32."""
    halves = inputs in (torch.float16, torch.bfloat16) and sums == torch.float32
    cores = device == "cuda" and torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()
    return inputs if halves and cores else sums


def add_sparse_product(second: Tensor, x: Tensor) -> None:
    """`second += x^T x` on and below the diagonal, with `x^T` as a sparse matrix of compressed rows, by MKL."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        rows = x.T.contiguous().to_sparse_csr()
        ends, columns, values = rows.crow_indices(), rows.col_indices(), rows.values()
        for start, stop in column_blocks(len(second)):
            before = int(ends[start])
            size = (len(second) - start, len(x))
            part = torch.sparse_csr_tensor(
                ends[start:] - before, columns[before:], values[before:], size, check_invariants=False
            )
            second[start:, start:stop] += part @ x[:, start:stop]


def column_blocks(n: int, multiple: int = 1, device: str = "cpu") -> list[tuple[int, int]]:
    """Ends of the column blocks in which one triangle of a symmetric matrix is computed, of a multiple of columns."""
    width = max(NARROWEST_ON_GPU if device == "cuda" else NARROWEST_BLOCK, -(-n // COLUMN_BLOCKS))
    width = -(-width // multiple) * multiple
    return [(start, min(start + width, n)) for start in range(0, n, width)]


def triangle_flops(n: int) -> float:
    """FLOPs that one row takes in a product with one triangle of an (n, n) matrix, or one token in `add_product`."""
    return sum(2.0 * (n - start) * (stop - start) for start, stop in column_blocks(n))


def random_signs(rows: int, columns: int, like: Tensor) -> Tensor:
    """Entries 1 and -1, always the same, (rows, columns); products keep norms on average (Achlioptas, 2003)."""
    return _drawn_signs(rows, columns).to(like)


@lru_cache(maxsize=1)
def _drawn_signs(rows: int, columns: int) -> Tensor:
    drawn = torch.randint(2, (rows, columns), generator=torch.Generator().manual_seed(0))
    return (2 * drawn - 1).to(torch.int8)


def _mostly_zero(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.shape[1] < SPARSE_FROM or not torch.backends.mkl.is_available():
        return False
    sample = x[::SAMPLED]
    return int(torch.count_nonzero(sample)) <= SPARSE_DENSITY * sample.numel()


@dataclass(frozen=True)
class OutputSums:
    """Sums over calibration tokens of something at a site's output, `v`, against the site's inputs `x`.

    It may be what the site should put out, or what its output lacks of that.

    Attributes:
        cross: `sum v x^T`, (d_out, n), float32 or float64.
        first: `sum v`, (d_out,), same dtype.
    """

    cross: Tensor
    first: Tensor


def empty_output_sums(d_out: int, n: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> OutputSums:
    """Sums of no tokens; they are kept in `dtype`, raised to float32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return OutputSums(torch.zeros(d_out, n, dtype=wide, device=device), torch.zeros(d_out, dtype=wide, device=device))


def add_outputs(sums: OutputSums, outputs: Tensor, inputs: Tensor) -> None:
    """Adds a batch to the sums, in place.

    Args:
        sums: of d_out and n channels.
        outputs: v, (..., d_out), any floating dtype, on the sums' device.
        inputs: x, (..., n), likewise.
    """
    dtype = sums.cross.dtype
    y, x = (widened(values.reshape(-1, values.shape[-1]), dtype) for values in (outputs, inputs))
    if y.dtype != x.dtype:
        y, x = y.to(dtype), x.to(dtype)
    add_matmul(sums.cross, y.T, x)
    sums.first.add_(y.sum(0, dtype=dtype))


def drift_from(sums: OutputSums, moments: Moments, W: Tensor, bias: Tensor | None) -> OutputSums:
    """Drift, what outputs `W x + b` lack of their references `y`, in place of the sums of those.

    `sum (y - W x - b) x^T = sum y x^T - W sum x x^T - b sum x^T`: no output has to be computed.

    Args:
        sums: of the references.
        moments: of the inputs, over the same tokens.
        W: out-projection weight, (d_out, n).
        bias: b, (d_out,), or None.
    """
    moments = completed(moments)
    at_once = rows_at_once(moments.second.device)
    for start in range(0, len(W), at_once):
        rows = slice(start, start + at_once)
        some = W[rows].to(moments.second)
        sums.cross[rows] -= (some @ moments.second).to(sums.cross)
        sums.first[rows] -= (some @ moments.first).to(sums.first)
    if bias is not None:
        bias = bias.detach().to(sums.cross)
        sums.cross.addr_(bias, moments.first.to(bias), alpha=-1)
        sums.first.sub_(bias, alpha=moments.tokens)
    return sums


def drift_flops(d: int, n: int) -> float:
    """FLOPs of `drift_from` for d outputs and n inputs; `add_reference` takes `2 d n` a token before."""
    return 2.0 * d * n * n


def gram_matrix(moments: Moments, *, centred: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    """The Gram matrix `G = X^T X`, or with `centred` its Schur complement after a constant-1 channel.

    A constant channel that is always kept and ordered first absorbs the mean of everything pruned into the
    out-projection's bias. Eliminating it from G leaves `G - s s^T / T` with `s = sum x` over T tokens, so nothing of
    size n + 1 is ever built.

    Returns:
        (n, n), symmetric, of type `dtype`. Channels whose remaining energy is below the rounding of the sums are
        exactly zero in row and column: they are dead, or constant where `centred`.
    """
    moments = completed(moments)
    gram = moments.second.to(dtype, copy=True)
    if centred:
        first = moments.first.to(dtype)
        gram.addr_(first, first / max(moments.tokens, 1), alpha=-1)
        alive = alive_channels(moments.second.diagonal(), moments.first, moments.tokens).to(dtype)
        gram.mul_(alive[:, None]).mul_(alive)
    return gram


def rows_at_once(device: torch.device) -> int:
    """Rows of a large matrix that are copied at a time on a device."""
    return ROWS_AT_ONCE.get(device.type, ROWS_AT_ONCE["cpu"])


def alive_channels(energy: Tensor, first: Tensor, tokens: int) -> Tensor:
    """Channels whose energy about their mean is more than the rounding of their sums, (n,), bool.

    Args:
        energy: `sum x^2`, (n,), in the type of the sums.
        first: `sum x`, (n,), same type.
        tokens: how many.
    """
    eps = torch.finfo(energy.dtype).eps
    energy, first = energy.double(), first.double()
    return energy - first * (first / max(tokens, 1)) > 8 * eps * energy


def completed(moments: Moments) -> Moments:
    """The moments where they can be factored, the upper triangle of the second filled in, in place."""
    if moments.whole:
        return moments
    if moments.second.device.type == "mps":  # no float64 there
        moments = replace(moments, second=moments.second.cpu(), first=moments.first.cpu())
    second = moments.second
    for start in range(0, len(second), COLUMN_BLOCKS * NARROWEST_BLOCK):
        stop = start + COLUMN_BLOCKS * NARROWEST_BLOCK
        block = second[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)
        second[start:stop, stop:] = second[stop:, start:stop].mT
    return replace(moments, whole=True)
