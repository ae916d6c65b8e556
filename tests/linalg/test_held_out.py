import pytest
import torch

from snp_llm.linalg.gram import OutputSums
from snp_llm.linalg.least_squares import KeptSums, choose_repair, repair
from snp_llm.runtime.errors import SnpError
from tests.linalg.problems import least_squares, make_inputs, make_weight

KEPT = torch.tensor([0, 2, 5, 7, 8])


GONE = torch.tensor([1, 3, 4, 6, 9, 10, 11])


def sums(X, lacking=None, mean=None, W=None, kept=KEPT, gone=GONE):
    """What the tokens say of a repair on the kept channels, from the tokens themselves."""
    X, W = X if mean is None else X - mean, make_weight() if W is None else W
    stay, lost = X[:, kept], X[:, gone] @ W[:, gone].T
    cut, drift = (None if v is None else OutputSums(v.T @ stay, v.sum(0)) for v in (lost, lacking))
    return KeptSums(lambda: stay.T @ stay, stay.sum(0), len(X), cut, drift, mean)


def cut_repair(sums, dampening):
    return repair(sums.gram(), sums.cut.cross, dampening)


def drift_repair(sums, dampening):
    return repair(sums.gram(), sums.drift.cross, dampening)


def ridge(X, target, penalty):
    """Least squares with `penalty` on the squares of the weights, by rows added to the problem: no Gram matrix."""
    rows = torch.cat([X, penalty.sqrt().diag()])
    return torch.linalg.lstsq(rows, torch.cat([target, target.new_zeros(len(penalty), target.shape[1])])).solution.T


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_what_is_taken_over_is_a_ridge_regression_on_what_went(dampening):
    X, W = make_inputs(), make_weight()
    gone = [i for i in range(12) if i not in KEPT]
    penalty = dampening * X[:, KEPT].square().sum(0)
    expected = ridge(X[:, KEPT], X[:, gone] @ W[:, gone].T, penalty)
    torch.testing.assert_close(cut_repair(sums(X), dampening), expected, rtol=1e-9, atol=1e-9)


def test_without_dampening_cut_and_drift_together_are_least_squares_on_the_reference():
    X, W, lacking = make_inputs(), make_weight(), make_inputs(n=7, seed=9)
    found = W[:, KEPT] + cut_repair(sums(X), 0.0)
    found = found + drift_repair(sums(X, lacking), 0.0)
    torch.testing.assert_close(found, least_squares(X, X @ W.T + lacking, KEPT), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_choice_is_what_a_search_over_held_out_tokens_finds(bias, weighted):
    """Everything again from the tokens themselves: dampening by trying all, alpha by a fine grid."""
    W, drift, dampenings = make_weight(), 0.2 * make_weight(seed=2), [0.01, 0.1, 1.0, 10.0]
    root = make_weight(7, 7, seed=5) if weighted else torch.eye(7, dtype=torch.float64)
    X, others = make_inputs(30, seed=0), make_inputs(40, seed=11)  # few: dampening matters
    lacking = 10 * X @ drift.T + make_inputs(30, 7, seed=9)
    missing = 6 * others @ drift.T + make_inputs(40, 7, seed=12)
    mean = X.mean(0) if bias else None
    fit, held = sums(X, lacking, mean), sums(others, missing, mean)
    choice = choose_repair(fit.seen_by(root), held.seen_by(root), dampenings)

    seen = others - mean if bias else others

    def output(weight):  # of what is wrong with the held-out tokens' outputs, in the metric
        return seen[:, KEPT] @ weight.T

    wanted = seen @ W.T
    cuts = {d: W[:, KEPT] + cut_repair(fit, d) for d in dampenings}
    best = min(dampenings, key=lambda d: float(((wanted - output(cuts[d])) @ root).square().sum()))
    assert choice.dampening == best
    left = missing + wanted - output(cuts[best])
    tried = {}
    for dampening in dampenings:
        added = output(drift_repair(fit, dampening)) + (lacking.mean(0) if bias else 0)
        for alpha in torch.linspace(0, 1, 201).tolist():
            tried[dampening, alpha] = float(((left - alpha * added) @ root).square().sum())
    drift_best, alpha = min(tried, key=lambda key: tried[key])
    assert choice.drift_dampening == drift_best and choice.alpha == pytest.approx(alpha, abs=0.005)
    assert 0 < alpha < 1


def test_a_repair_that_only_harms_is_left_out_and_one_that_falls_short_is_taken_whole():
    X = make_inputs()
    drift = X @ make_weight(seed=2).T
    everything = {"kept": torch.arange(12), "gone": torch.arange(0)}
    fit = sums(X, drift, **everything)
    against = choose_repair(fit, sums(X, -drift, **everything), [0.01])
    more = choose_repair(fit, sums(X, 3 * drift, **everything), [0.01])
    assert (against.alpha, more.alpha) == (0.0, 1.0)


def test_dampenings_at_which_nothing_can_be_solved_are_left_out():
    X = torch.ones(3, 12, dtype=torch.float64)  # all channels are one
    choice = choose_repair(sums(X), sums(X), [0.0, 0.1])
    assert choice.dampening == 0.1 and choice.alpha == 0
    with pytest.raises(SnpError, match="5 channels is not positive definite .dampening up to 0"):
        choose_repair(sums(X), sums(X), [0.0])


def test_dead_channels_get_nothing():
    X = make_inputs()
    X[:, 5] = 0
    added = cut_repair(sums(X), 0.1)
    assert torch.isfinite(added).all() and not added[:, 2].any()
