"""Every ordering against an independent computation of its definition, for channels and for heads."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from snp_llm.linalg import ordering
from snp_llm.linalg.ldl import make_definite
from snp_llm.linalg.ordering import FLOPS, ORDERINGS, OrderingProblem, order_units, zca_exact
from snp_llm.linalg.quadrature import zca_quadrature
from snp_llm.linalg.units import diagonal_blocks, per_unit, unit_channels
from snp_llm.runtime.errors import SnpError
from tests.counting import Products
from tests.linalg.problems import least_squares, make_inputs, make_weight
from tests.rehearsal import rehearsed

SIZES = [1, 3]  # channels, and heads of three


def make_problem(size, units=6, *, dampening=0.0, seed=0):
    n = size * units
    X, W = make_inputs(200, n, seed=seed), make_weight(7, n, seed=seed + 1)
    in_weight = torch.rand(units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return OrderingProblem(make_definite(X.T @ X, dampening), W, in_weight, size, seed=seed), X


def error_without(X, W, removed, size):
    """Squared output error of the best repair after removing units, by lstsq."""
    gone = unit_channels(torch.tensor(removed), size).tolist()
    kept = [i for i in range(X.shape[1]) if i not in gone]
    Y = X @ W.T
    if not kept:
        return Y.square().sum().item()
    solution = torch.linalg.lstsq(X[:, kept], Y, driver="gelsd").solution
    return (X[:, kept] @ solution - Y).square().sum().item()


def test_unit_helpers():
    matrix = torch.arange(36.0).reshape(6, 6)
    blocks = diagonal_blocks(matrix, 2)
    assert all(torch.equal(blocks[i], matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2]) for i in range(3))
    assert unit_channels(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
    assert per_unit(torch.arange(6.0), 2).tolist() == [1, 5, 9]


@pytest.mark.parametrize("size", SIZES)
def test_zca_is_the_energy_under_the_whitening_rescaled_to_unit_blocks(size):
    problem, X = make_problem(size)
    G = X.T @ X
    u, s, _ = torch.linalg.svd(G)
    whitening = u @ torch.diag(s**-0.5) @ u.T
    torch.testing.assert_close(whitening @ G @ whitening, torch.eye(len(G), dtype=torch.float64), rtol=0, atol=1e-8)
    expected = []
    for unit in range(6):
        rows = slice(unit * size, (unit + 1) * size)
        rescaled = torch.linalg.inv(whitening[rows, rows]) @ whitening[rows]  # identity on the unit's own block
        torch.testing.assert_close(rescaled[:, rows], torch.eye(size, dtype=torch.float64))
        expected.append(torch.trace(rescaled @ G @ rescaled.T))
    torch.testing.assert_close(ORDERINGS["zca"](problem), torch.stack(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [1, 8])
def test_quadrature_ranks_units_as_the_exact_zca_does(size):
    n = 800
    units, k = n // size, round(0.7 * n / size)
    X = make_inputs(2000, n, mean=0.0).relu()
    X[:, 7] = 0
    definite = make_definite(X.T @ X, 0.01)
    problem = OrderingProblem(definite, make_weight(7, n), torch.ones(units, dtype=torch.float64), size, seed=0)
    exact, quick = zca_exact(problem), zca_quadrature(definite, size)
    assert (quick / exact).log().abs().median() < 0.1
    assert torch.isfinite(quick).all()
    assert len({*exact.argsort()[-k:].tolist()} & {*quick.argsort()[-k:].tolist()}) >= 0.98 * k
    torch.testing.assert_close(ORDERINGS["zca"](problem), quick)


def test_quadrature_is_exact_where_every_channel_sees_two_eigenvalues():
    pairs = torch.block_diag(*(torch.tensor([[a, 1.0], [1.0, b]]).double() for a, b in ((2, 3), (9, 0.5), (4, 4))))
    alone = torch.block_diag(pairs, 7 * torch.eye(2, dtype=torch.float64))
    definite = make_definite(alone, 0.0)
    problem = OrderingProblem(definite, make_weight(7, 8), torch.ones(8), 1, seed=0)
    torch.testing.assert_close(zca_quadrature(definite, 1), zca_exact(problem), rtol=1e-9, atol=0)
    problem = replace(problem, in_weight=torch.ones(4), unit_size=2)  # a unit that knows nothing of any other
    torch.testing.assert_close(zca_quadrature(definite, 2), zca_exact(problem), rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", SIZES)
def test_units_that_are_kept_for_certain_are_the_same_as_without_saying_so(size):
    problem, _ = make_problem(size, units=150, dampening=0.01)
    order = order_units("greedy", problem)
    sparing = order_units("greedy", replace(problem, keep=100))
    assert sorted(sparing.tolist()) == list(range(150))
    assert {*sparing[:100].tolist()} == {*order[:100].tolist()}
    assert torch.equal(sparing[100:], order[100:])


def test_float32_removes_what_float64_does():
    problem, _ = make_problem(1, units=300, dampening=0.1)
    single = replace(problem, definite=make_definite(problem.definite.gram.float(), 0.0), W=problem.W.float())
    kept = order_units("greedy", problem)[:200]
    assert len({*kept.tolist()} & {*order_units("greedy", single)[:200].tolist()}) >= 198


@pytest.mark.parametrize("size", SIZES)
def test_residual_is_the_energy_others_cannot_explain(size):
    problem, X = make_problem(size)
    expected = []
    for unit in range(6):
        own = list(range(unit * size, (unit + 1) * size))
        others = [i for i in range(X.shape[1]) if i not in own]
        fit = torch.linalg.lstsq(X[:, others], X[:, own], driver="gelsd").solution
        expected.append((X[:, own] - X[:, others] @ fit).square().sum())
    torch.testing.assert_close(ORDERINGS["residual"](problem), torch.stack(expected), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", SIZES)
def test_obs_is_the_exact_cost_of_removing_one_unit(size):
    problem, X = make_problem(size)
    expected = torch.tensor([error_without(X, problem.W, [u], size) for u in range(6)], dtype=torch.float64)
    torch.testing.assert_close(ORDERINGS["obs"](problem), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_greedy_takes_the_cheapest_unit_at_every_step(size, seed):
    problem, X = make_problem(size, units=8 if size == 1 else 5, seed=seed)
    removed: list[int] = []
    while len(removed) < len(problem.in_weight):
        left = [u for u in range(len(problem.in_weight)) if u not in removed]
        removed.append(min(left, key=lambda u: error_without(X, problem.W, [*removed, u], size)))
    assert order_units("greedy", problem).tolist() == removed[::-1]


def test_greedy_in_blocks_removes_all_units_once():
    problem, _ = make_problem(1, units=300, dampening=0.01)
    scores = ORDERINGS["greedy"](problem)
    assert sorted(scores.tolist()) == list(range(300))


def test_a_round_of_greedy_asks_a_device_for_few_operations_and_one_answer():
    problem, _ = make_problem(1, units=512, dampening=0.01)
    order, rounds = order_units("greedy", problem), 512 // 4
    with rehearsed("cuda") as gpu:
        gram, W, in_weight = (t.to("cuda") for t in (problem.definite.gram, problem.W, problem.in_weight))
        there = replace(problem, definite=make_definite(gram, 0.0), W=W, in_weight=in_weight)
        gpu.kernels = gpu.waits = 0
        assert torch.equal(order_units("greedy", there).cpu(), order)
        assert rounds < gpu.waits < 2 * rounds and gpu.kernels < 40 * rounds


def related(kind, X):
    """The inputs, (tokens, n), with as many channels again, or twice as many, that say nothing new."""
    if kind == "sums":
        return torch.cat([X, X + X.roll(1, 1)], 1)
    if kind == "nearly equal":
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(3), dtype=X.dtype)
        return torch.cat([X, X + 1e-6 * X.std() * noise], 1)
    factors = {"twice": [1, 1], "three times": [1, 1, 1], "scaled": [1, 100], "negated": [1, -1]}[kind]
    return torch.cat([factor * X for factor in factors], 1)


def remaining_error(X, W, kept):
    """Relative squared output error of the best repair on the kept channels, by lstsq."""
    Y = X @ W.T
    return float((X[:, kept] @ least_squares(X, Y, kept).T - Y).square().sum() / Y.square().sum())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["twice", "three times", "scaled", "negated", "nearly equal", "sums"])
@pytest.mark.parametrize("rounds", [pytest.param(128, marks=pytest.mark.exhaustive), 16])
def test_units_that_say_nothing_new_cost_nothing_however_many_go_at_once(kind, size, rounds, monkeypatch):
    monkeypatch.setattr(ordering, "GREEDY_ROUNDS", rounds)
    independent = 192 if rounds == 128 else 24  # three at once or more
    X = make_inputs(2 * independent * size, independent * size).relu()
    X = related(kind, X / X.square().mean(0).sqrt())
    W, units = make_weight(7, X.shape[1]), X.shape[1] // size
    definite = make_definite(X.T @ X, 1e-7)
    for keep in (0, independent):
        problem = OrderingProblem(definite, W, torch.ones(units, dtype=torch.float64), size, seed=0, keep=keep)
        order = order_units("greedy", problem)
        assert sorted(order.tolist()) == list(range(units))
        assert remaining_error(X, W, unit_channels(order[:independent], size)) < 1e-9
        assert remaining_error(X, W, unit_channels(order[: independent - independent // 4], size)) > 1e-6


@pytest.mark.parametrize("dampening", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["independent", "twice", "sums"])
def test_three_at_once_lose_about_what_one_at_a_time_does(kind, dampening, monkeypatch):
    """At single widths either may be better: with noise in all channels no order is the best at every width."""
    X = make_inputs(600, 120)
    X = X if kind == "independent" else related(kind, X[:, :60])
    X = X + 0.02 * X.std(0) * torch.randn(X.shape, generator=torch.Generator().manual_seed(5), dtype=X.dtype)
    W, ones = make_weight(7, 120), torch.ones(120, dtype=torch.float64)
    errors = {}
    for rounds in (120, 40):
        monkeypatch.setattr(ordering, "GREEDY_ROUNDS", rounds)
        order = order_units("greedy", OrderingProblem(make_definite(X.T @ X, dampening), W, ones, 1, seed=0))
        errors[rounds] = torch.tensor([remaining_error(X, W, order[:keep]) for keep in range(3, 120, 3)])
    assert (errors[40] / errors[120]).log().mean().exp() < 1.05


@pytest.mark.parametrize("seed", range(3))
def test_several_at_once_are_never_far_from_the_best_subset(seed, monkeypatch):
    monkeypatch.setattr(ordering, "GREEDY_ROUNDS", 3)  # four at once
    X = make_inputs(60, 6, seed=seed)
    X = torch.cat([X, X], 1) + 1e-3 * make_inputs(60, 12, seed=seed + 9)
    W = make_weight(3, 12)
    problem = OrderingProblem(make_definite(X.T @ X, 0.0), W, torch.ones(12, dtype=torch.float64), 1, seed=0)
    order = order_units("greedy", problem)
    for keep in (6, 4):
        best = min(remaining_error(X, W, list(kept)) for kept in combinations(range(12), keep))
        assert remaining_error(X, W, order[:keep]) <= 2 * best


def test_in_float32_equal_channels_are_not_both_removed_either():
    X = make_inputs(800, 192).relu()
    X, W = related("twice", X / X.square().mean(0).sqrt()).float(), make_weight(7, 192).float()
    definite = make_definite(X.T @ X, 1e-3)
    problem = OrderingProblem(definite, torch.cat([W, W], 1), torch.ones(384, dtype=torch.float64), 1, seed=0)
    assert len((order_units("greedy", problem)[:192] % 192).unique()) == 192


def test_greedy_beats_single_removals_on_a_duplicated_pair():
    # Two copies of one channel are both free to remove alone, but not together: obs cannot see it, greedy does.
    X = make_inputs(200, 6)
    X[:, 4] = X[:, 5] + 1e-4 * torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    W = make_weight(7, 6)
    problem = OrderingProblem(make_definite(X.T @ X, 0.0), W, torch.ones(6, dtype=torch.float64), 1, seed=0)
    assert set(order_units("obs", problem)[-2:].tolist()) == {4, 5}
    assert set(order_units("greedy", problem)[-2:].tolist()) != {4, 5}


@pytest.mark.parametrize("size", SIZES)
def test_simple_scores(size):
    problem, X = make_problem(size)
    assert torch.equal(ORDERINGS["saw"](problem), problem.in_weight)
    energies = X.square().sum(0).reshape(6, size).sum(1)
    torch.testing.assert_close(ORDERINGS["variance"](problem), energies)


def test_random_is_seeded():
    first, _ = make_problem(1, seed=1)
    second, _ = make_problem(1, seed=2)
    assert torch.equal(ORDERINGS["random"](first), ORDERINGS["random"](first))
    assert not torch.equal(ORDERINGS["random"](first), ORDERINGS["random"](second))


@pytest.mark.parametrize("name", ORDERINGS)
def test_dead_units_go_first_and_the_order_is_a_permutation(name):
    X, W = make_inputs(200, 12), make_weight(7, 12)
    X[:, 4:6] = 0  # unit 2 is dead
    X[:, 6] = 0  # unit 3 is half dead: it stays where its other channel puts it
    W[:, 4:6] = 100
    problem = OrderingProblem(make_definite(X.T @ X, 0.01), W, torch.full((6,), 5.0, dtype=torch.float64), 2, seed=0)
    order = order_units(name, problem).tolist()
    assert sorted(order) == list(range(6))
    assert order[-1] == 2


@pytest.mark.parametrize("name", ["zca", "residual", "obs", "greedy", "variance"])
def test_orderings_follow_a_permutation_of_the_units(name):
    problem, X = make_problem(3)
    shuffle = torch.tensor([3, 1, 5, 0, 4, 2])
    channels = unit_channels(shuffle, 3)
    moved = OrderingProblem(
        make_definite((X.T @ X)[channels][:, channels], 0.0),
        problem.W[:, channels],
        problem.in_weight[shuffle],
        3,
        seed=0,
    )
    assert shuffle[order_units(name, moved)].tolist() == order_units(name, problem).tolist()


def test_greedy_is_never_far_from_the_best_subset():
    problem, X = make_problem(1, units=7)
    order = order_units("greedy", problem)
    for k in (2, 4):
        best = min(error_without(X, problem.W, list(c), 1) for c in combinations(range(7), k))
        assert error_without(X, problem.W, order[-k:].tolist(), 1) <= 2 * best


def test_an_unknown_name_gets_a_suggestion():
    problem, _ = make_problem(1)
    with pytest.raises(SnpError, match="unknown ordering 'greddy'.*Did you mean 'greedy'"):
        order_units("greddy", problem)


@pytest.mark.parametrize("name", ORDERINGS)
@pytest.mark.parametrize(("units", "keep"), [(256, 0), (768, 0), (768, 500)])
def test_flops_are_what_torch_counts(name, units, keep):
    problem = replace(make_problem(1, units, dampening=0.1)[0], keep=keep)
    problem.definite.factor()
    with Products(algebra=True) as counted:
        ORDERINGS[name](problem)
    expected = FLOPS[name](units, len(problem.W), keep) if name in FLOPS else 0
    assert counted.flops == pytest.approx(expected, rel=0.25)
