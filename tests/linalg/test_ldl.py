import pytest
import torch

from snp_llm.linalg.ldl import build_subspace, energy_curve, error_curve, ldl, make_definite, probe, solve_error
from snp_llm.runtime.errors import SnpError
from tests.linalg.problems import least_squares, make_inputs, make_weight


def test_factors_multiply_to_the_gram_matrix():
    X = make_inputs()
    G = X.T @ X
    L, D = ldl(G.clone())
    torch.testing.assert_close(L @ torch.diag(D) @ L.T, G, rtol=1e-12, atol=1e-9)
    assert torch.equal(L.diagonal(), torch.ones(12, dtype=torch.float64))
    assert torch.equal(L, L.tril())


def test_latents_are_orthogonal_with_energies_D():
    X = make_inputs()
    L, D = ldl(X.T @ X)
    Z = torch.linalg.solve(L, X.T)
    torch.testing.assert_close(Z @ Z.T, torch.diag(D), rtol=1e-9, atol=1e-7)


def test_every_point_of_the_error_curve_equals_a_refactored_solution():
    X, W = make_inputs(), make_weight()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    subspace = build_subspace(make_definite(X.T @ X, 0.0), order)
    curve = error_curve(W[:, order], subspace.L, subspace.D)
    Y = X @ W.T
    assert curve[12] == 0
    torch.testing.assert_close(curve[0], Y.square().sum())
    for k in range(1, 12):
        best = least_squares(X, Y, order[:k])
        residual = (X[:, order[:k]] @ best.T - Y).square().sum()
        torch.testing.assert_close(curve[k], residual, rtol=1e-8, atol=1e-8)


def test_energy_curve_counts_whole_units():
    D = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert energy_curve(D, 1).tolist() == [0, 0.5, 0.75, 0.875, 1]
    assert energy_curve(D, 2).tolist() == [0, 0.75, 1]
    assert energy_curve(torch.zeros(4, dtype=torch.float64), 2).tolist() == [1, 1, 1]


def test_dampening_is_relative_to_each_channel():
    X = make_inputs()
    G = X.T @ X
    definite = make_definite(G.clone(), 0.1)
    torch.testing.assert_close(definite.gram, G + 0.1 * torch.diag(G.diagonal()))
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)
    rescaled = make_definite(G * scale[:, None] * scale, 0.1)
    torch.testing.assert_close(rescaled.gram, definite.gram * scale[:, None] * scale)


def test_dead_channels_are_decoupled_and_carry_no_energy():
    X = make_inputs()
    X[:, [2, 5]] = 0
    definite = make_definite(X.T @ X, 0.01)
    assert definite.dead.nonzero().squeeze(1).tolist() == [2, 5]
    subspace = build_subspace(definite, torch.arange(12))
    assert subspace.D[2] == 0 and subspace.D[5] == 0
    curve = error_curve(make_weight(), subspace.L, subspace.D)
    assert curve[2] == curve[3]  # keeping the dead channel saves nothing


def test_dampening_escalates_tenfold_until_definite():
    X = make_inputs(6, 12)  # fewer tokens than channels: rank 6
    G = X.T @ X - 1e-9 * torch.eye(12, dtype=torch.float64)
    definite = make_definite(G, 0.0)
    assert 0 < definite.dampening <= 1e-4
    assert torch.linalg.eigvalsh(definite.gram).min() > 0


def test_escalation_ends_with_an_error_that_names_the_pivot():
    G = torch.eye(4, dtype=torch.float64)
    G[0, 1] = G[1, 0] = -1e6
    with pytest.raises(SnpError, match=r"not positive definite \(pivot 2 .* raised from 0.01 to 100\).*--dampening"):
        make_definite(G, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_refused(bad):
    G = torch.eye(4, dtype=torch.float64)
    G[2, 1] = bad
    with pytest.raises(SnpError, match="NaN or Inf"):
        make_definite(G, 0.01)
    with pytest.raises(SnpError, match="not positive definite"):
        ldl(-torch.eye(3, dtype=torch.float64))


def test_the_error_of_solving_tells_a_good_factor_from_a_bad_one():
    X = make_inputs()
    G = X.T @ X
    added = 0.1 * G.diagonal()
    good = torch.linalg.cholesky(G + torch.diag(added))
    assert solve_error(good, probe(G + torch.diag(added))) < 1e-10
    assert solve_error(good, probe(G)) > 1e-2  # a factor of another matrix
    damped = (G + torch.diag(added)).float()
    assert 1e-9 < solve_error(torch.linalg.cholesky(damped), probe(damped)) < 1e-4


def test_the_inverse_is_the_same_however_often_it_is_taken():
    X = make_inputs()
    definite = make_definite(X.T @ X, 0.1)
    first, second = definite.inverse(), definite.inverse()
    torch.testing.assert_close(first @ definite.gram, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
