import pytest
import torch

from snp_llm.linalg.gram import add_moments, empty_moments, gram_matrix
from snp_llm.linalg.ldl import build_subspace, error_curve, held_out_curve, ldl, make_definite, metric_root
from snp_llm.linalg.least_squares import absorb_mean, factored_repair, repair
from snp_llm.runtime.errors import SnpError
from tests.linalg.problems import least_squares, make_inputs, make_weight, relative_error


def reconstruct(W, L, width):
    """The weight W' on the first channels of an ordered site."""
    return W[:, :width] + factored_repair(W, L, width)


@pytest.mark.parametrize("width", [1, 5, 11, 12])
def test_agrees_with_lstsq(width):
    X, W = make_inputs(), make_weight()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    L, _ = ldl((X.T @ X)[order][:, order])
    expected = least_squares(X, X @ W.T, order[:width])
    torch.testing.assert_close(reconstruct(W[:, order], L, width), expected, rtol=1e-9, atol=1e-9)


def test_with_a_bias_it_agrees_with_lstsq_with_an_intercept():
    X, W = make_inputs(mean=2.0), make_weight()
    bias = make_weight(7, 1, seed=4)[:, 0]
    kept = torch.tensor([0, 3, 4, 9])
    order = torch.cat([kept, torch.tensor([i for i in range(12) if i not in kept])])
    moments = add_moments(empty_moments(12, torch.float64), X)
    G = gram_matrix(moments, centred=True)
    L, _ = ldl(G[order][:, order])
    W_new = reconstruct(W[:, order], L, 4)
    new_bias = absorb_mean(bias, W, W_new, kept, X.mean(0))
    with_ones = torch.cat([X[:, kept], torch.ones(len(X), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(with_ones, X @ W.T + bias, driver="gelsd").solution.T
    torch.testing.assert_close(W_new, expected[:, :4], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new_bias, expected[:, 4], rtol=1e-9, atol=1e-9)


def test_full_width_is_the_same_weight_to_the_bit():
    X, W = make_inputs(), make_weight()
    L, _ = ldl(X.T @ X)
    assert torch.equal(reconstruct(W, L, 12), W)


@pytest.mark.parametrize("dampening", [0.01, 0.3])
def test_what_is_read_off_the_factorisation_is_what_is_solved_from_the_sums(dampening):
    X, W = make_inputs(n=40), make_weight(n=40)
    X[:, 7] = 0  # dead, and kept
    gram, order = X.T @ X, torch.cat([torch.tensor([7]), torch.arange(7), torch.arange(8, 40)])
    subspace = build_subspace(make_definite(gram.clone(), dampening), order)
    kept, gone = order[:25], order[25:]
    solved = repair(gram[kept[:, None], kept], W[:, gone] @ gram[gone[:, None], kept], dampening)
    read = factored_repair(W[:, order], subspace.L, 25)
    torch.testing.assert_close(read, solved, rtol=1e-10, atol=1e-10)


def test_a_duplicated_channel_costs_nothing_to_remove():
    X, W = make_inputs(), make_weight()
    X = torch.cat([X, 2 * X[:, 3:4]], 1)
    W = torch.cat([W, W[:, :1]], 1)
    definite = make_definite(X.T @ X, 1e-10)
    subspace = build_subspace(definite, torch.arange(13))
    W_new = reconstruct(W, subspace.L, 12)
    assert relative_error(W, W_new, torch.arange(12), X.T @ X) < 1e-9
    torch.testing.assert_close(X[:, :12] @ W_new.T, X @ W.T, rtol=1e-5, atol=1e-5)


def test_relative_error_is_what_the_curve_predicts():
    X, W = make_inputs(), make_weight()
    G = X.T @ X
    L, D = ldl(G.clone())
    curve = error_curve(W, L, D)
    for k in (1, 6, 11):
        error = relative_error(W, reconstruct(W, L, k), torch.arange(k), G)
        assert error == pytest.approx(float(curve[k] / curve[0]), rel=1e-9)


@pytest.mark.parametrize("width", [-1, 13])
def test_width_out_of_range_is_refused(width):
    with pytest.raises(SnpError, match="width of 0 to 12"):
        factored_repair(make_weight(), torch.eye(12, dtype=torch.float64), width)


def test_the_error_on_other_tokens_at_every_width():
    """Cut and repaired with the statistics of some tokens, counted on others, in a metric of fewer directions."""
    X, W, others, root = make_inputs(), make_weight(), make_inputs(seed=11), make_weight(7, 3, seed=8)
    F = root @ root.T
    L, D = ldl(X.T @ X)
    torch.testing.assert_close(metric_root(F) @ metric_root(F).T, F)
    curve = held_out_curve(metric_root(F).T @ W, L, others.T @ others)
    for k in range(1, 13):
        missing = others @ W.T - others[:, :k] @ reconstruct(W, L, k).T
        torch.testing.assert_close(curve[k], ((missing @ F) * missing).sum(), rtol=1e-9, atol=1e-9)
    own = held_out_curve(metric_root(F).T @ W, L, X.T @ X)
    torch.testing.assert_close(own, error_curve(metric_root(F).T @ W, L, D), rtol=1e-9, atol=1e-9)
