import pytest
import torch

from snp_llm.linalg.gram import (
    add_moments,
    add_outputs,
    add_product,
    add_sparse_product,
    column_blocks,
    drift_from,
    empty_moments,
    empty_output_sums,
    gram_matrix,
)
from tests.linalg.problems import make_inputs, make_weight


def moments_of(X, pieces=3):
    moments = empty_moments(X.shape[-1], X.dtype)
    for piece in X.tensor_split(pieces):
        moments = add_moments(moments, piece)
    return moments


@pytest.mark.parametrize("n", [1, 12, 64, 65, 130, 700])
def test_gram_equals_the_product(n):
    X = make_inputs(50, n)
    torch.testing.assert_close(gram_matrix(moments_of(X), centred=False), X.T @ X, rtol=1e-12, atol=1e-9)


def test_batches_of_any_shape_add_up():
    X = make_inputs(48, 12)
    moments = add_moments(empty_moments(12, torch.float64), X.reshape(4, 12, 12))
    assert moments.tokens == 48
    torch.testing.assert_close(gram_matrix(moments, centred=False), X.T @ X)


def test_centring_is_the_schur_complement_of_a_constant_channel():
    X = make_inputs(100, 12)
    ones = torch.cat([torch.ones(100, 1, dtype=torch.float64), X], 1)
    G = ones.T @ ones
    schur = G[1:, 1:] - torch.outer(G[1:, 0], G[0, 1:]) / G[0, 0]
    torch.testing.assert_close(gram_matrix(moments_of(X), centred=True), schur, rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    X = make_inputs(500, 70).to(dtype)
    moments = moments_of(X, pieces=7)
    assert moments.second.dtype == torch.float32
    exact = X.double().T @ X.double()
    error = (gram_matrix(moments, centred=False) - exact).abs().max() / exact.abs().max()
    assert error < 1e-6


def summed(X, references, tokens=100):
    """Gram matrix, sum of the inputs, and both sums of the references."""
    moments, sums = empty_moments(70, X.dtype, X.device), empty_output_sums(7, 70, X.dtype, X.device)
    for x, y in zip(X.split(tokens), references.split(tokens), strict=True):
        moments = add_moments(moments, x.reshape(4, -1, 70))
        add_outputs(sums, y.reshape(4, -1, 7), x.reshape(4, -1, 70))
    return moments.second.tril(), moments.first, sums.cross, sums.first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_cores_sum_in_float32(dtype):
    X, references = (make_inputs(20_000, n).to("cuda", dtype) for n in (70, 7))
    second, _, cross, _ = summed(X, references, tokens=20_000)
    for found, exact in ((second, (X.double().T @ X.double()).tril()), (cross, references.double().T @ X.double())):
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_is_not_widened_gives_the_same_sums(dtype, monkeypatch):
    """The products that a GPU would be asked for, done here."""
    X, references = (make_inputs(500, n).to(dtype) for n in (70, 7))
    asked = []

    def tensor_cores(a, b, *, out_dtype):
        asked.append((a.dtype, b.dtype, out_dtype))
        return a.float() @ b.float()

    expected = summed(X, references)
    monkeypatch.setattr("snp_llm.linalg.gram.SUMMED_AT_ONCE", 30)  # of the hundred in a batch
    monkeypatch.setattr("snp_llm.linalg.gram.widened", lambda x, _dtype: x)
    monkeypatch.setattr(torch, "mm", tensor_cores)
    found = summed(X, references)
    assert set(asked) == {(dtype, dtype, torch.float32)}
    assert len(asked) == 5 * 4 * (len(column_blocks(70)) + 1)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def test_a_constant_channel_is_dead_once_centred():
    X = make_inputs(300, 12).float()
    X[:, 4] = 3.7
    X[:, 7] = 0.0
    gram = gram_matrix(moments_of(X), centred=True)
    assert gram[4, 4] == 0 and gram[7, 7] == 0
    assert not gram[4].any() and not gram[:, 7].any()
    assert (gram.diagonal() > 0).sum() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="sparse products on a CPU need MKL")
def test_the_sparse_product_is_the_product(dtype):
    X = make_inputs(60, 700, mean=0.0).to(dtype)
    X = X.where(X.quantile(0.95) < X, 0)
    X[:, 100:300] = 0
    dense, sparse = torch.zeros(700, 700, dtype=dtype), torch.zeros(700, 700, dtype=dtype)
    for _ in range(2):  # adds to what is there
        add_product(dense, X)
        add_sparse_product(sparse, X)
    exact = 2 * X.double().T @ X.double()
    bound = 1e-6 * float(exact.abs().max())
    assert (sparse.double() - exact).tril().abs().max() < bound and (dense.double() - exact).tril().abs().max() < bound
    moments = moments_of(X)  # takes the one or the other
    assert (gram_matrix(moments, centred=False) - exact / 2).abs().max() < bound


@pytest.mark.parametrize("with_bias", [False, True])
def test_what_outputs_lack_is_known_without_computing_any(with_bias):
    """Against the outputs themselves, token by token."""
    X, W, references = make_inputs(), make_weight(), 3 + make_inputs(n=7, seed=9)
    bias = torch.arange(7, dtype=torch.float64) if with_bias else None
    moments, sums = empty_moments(12, torch.float64), empty_output_sums(7, 12, torch.float64)
    for x, y in zip(X.split(17), references.split(17), strict=True):
        moments = add_moments(moments, x)
        add_outputs(sums, y, x)
    moments.second.tril_().add_(torch.full((12, 12), 1e9).triu(1))  # nobody says what is above the diagonal
    drift = drift_from(sums, moments, W, bias)
    lacking = references - X @ W.T - (0 if bias is None else bias)
    torch.testing.assert_close(drift.cross, lacking.T @ X, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(drift.first, lacking.sum(0), rtol=1e-10, atol=1e-9)


def test_little_that_is_lacking_is_known_in_float32():
    """Outputs many times what they lack, of inputs whose mean is ten times their spread."""
    X, W = make_inputs(4000, 12) / 10 + 10 * torch.arange(12), make_weight()
    lacking = 0.1 * make_inputs(4000, 7, seed=9)
    moments, sums = empty_moments(12, torch.float32), empty_output_sums(7, 12, torch.float32)
    for x, e in zip(X.split(400), lacking.split(400), strict=True):
        moments = add_moments(moments, x.float())
        add_outputs(sums, (x @ W.T + e).float(), x.float())
    drift = drift_from(sums, moments, W, None)
    outputs = X @ W.T + lacking
    scale = outputs.norm(dim=0)[:, None] * X.norm(dim=0)
    assert ((drift.cross - lacking.T @ X).abs() / scale).max() < 5e-6  # so much the sums themselves are rounded
    assert float(lacking.norm()) < 0.02 * float(outputs.norm())
