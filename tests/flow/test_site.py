import copy

import pytest
import torch

from snp_llm.checkpoint.journal import Journal
from snp_llm.linalg.gram import Moments, OutputSums
from snp_llm.linalg.least_squares import KeptSums, choose_repair
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.pruning.algebra import for_algebra
from snp_llm.pruning.cut import cut
from snp_llm.pruning.factor import factor_site
from snp_llm.pruning.repair import DAMPENINGS, VIEWS, viewed
from snp_llm.pruning.result import CURVE_POINTS, sample_curve
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import Statistics, TokenSums
from snp_llm.runtime.device import Clock
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_opt, small_recipe


def test_a_gram_matrix_that_stays_indefinite_names_the_block():
    model = small_opt()
    family = find_family(model.config)
    blocks = find_blocks(model)
    site = find_sites(blocks, family)[3]
    second = torch.eye(64)
    second[1, 0] = -1e6
    moments = Moments(second, torch.zeros(64), 100)
    with pytest.raises(SnpError, match=r"^block 1 fc2: Gram matrix of 64 channels is not positive definite \(pivot 2"):
        factor_site(blocks[1], site, Statistics(moments), small_recipe(), Clock(torch.device("cpu")))


def test_the_mean_moves_only_where_there_is_a_bias():
    for variant, centred in (({}, True), ({"enable_bias": False}, False)):
        model = small_opt(**variant)
        family = find_family(model.config)
        blocks = find_blocks(model)
        site = find_sites(blocks, family)[1]
        moments = Moments(4 * torch.eye(64), torch.full((64,), 2.0), 4)
        factored, gram = factor_site(blocks[0], site, Statistics(moments), small_recipe(), Clock(torch.device("cpu")))
        assert gram[0, 1] == (-1 if centred else 0)
        assert factored.mean[0] == 0.5 if centred else factored.mean is None


@pytest.mark.parametrize(("n", "cut"), [(1, 1), (5, 3), (128, 128), (1000, 517)])
def test_a_sampled_curve_holds_the_ends_and_the_cut(n, cut):
    D = torch.rand(n, dtype=torch.float64)
    errors = torch.cat([D, torch.zeros(1, dtype=torch.float64)]).flip(0).cumsum(0).flip(0)
    curve = sample_curve(D, errors, 10, cut)
    assert curve.channels == sorted(set(curve.channels)) and len(curve.channels) <= CURVE_POINTS + 1
    assert {1, cut, n} <= set(curve.channels) and curve.cut == cut
    ranked = D.sort(descending=True).values
    for place, k in enumerate(curve.channels):
        assert curve.variance[place] == D[k - 1] / 10 and curve.spectrum[place] == ranked[k - 1] / 10
        assert curve.error[place] == errors[k] / errors[0]


def test_a_curve_of_a_site_without_energy_is_zero():
    zero = torch.zeros(3, dtype=torch.float64)
    assert sample_curve(zero, torch.zeros(4, dtype=torch.float64), 10, 2).error == [0.0, 0.0, 0.0]


def test_a_large_site_is_cut_in_float32_as_it_is_in_float64(monkeypatch):
    """The threshold lowered, the same site both ways: same units, nearly the same weights, curves and errors."""
    model = small_opt()
    family = find_family(model.config)
    site = find_sites(find_blocks(model), family)[1]
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator)

    def moments(tokens):
        x = (torch.randn(tokens, 64, generator=generator) @ mixing).relu()
        return Moments((x.T @ x).tril(), x.sum(0), tokens), x

    (total, x), (held, y) = moments(800), moments(100)
    d_out = find_blocks(model)[0].fc2.weight.shape[0]
    pull = 0.05 * torch.randn(d_out, 64, generator=generator)
    drift, held_drift = (OutputSums(pull @ s.T @ s, (s @ pull.T).sum(0)) for s in (x, y))
    total = Moments(total.second + held.second, total.first + held.first, 900)
    drift = OutputSums(drift.cross + held_drift.cross, drift.first + held_drift.first)
    results = []
    for threshold in (10**9, 1):
        monkeypatch.setattr("snp_llm.pruning.algebra.SINGLE_PRECISION_FROM", threshold)
        block = copy.deepcopy(find_blocks(model)[0])
        apart = TokenSums(total, drift), TokenSums(held, held_drift)
        statistics = for_algebra(site.name, Statistics(total, *apart, torch.eye(d_out)))
        factored, _ = factor_site(block, site, statistics, small_recipe(), Clock(torch.device("cpu")))
        assert factored.W.dtype == (torch.float64 if threshold > 1 else torch.float32)
        curve = factored.loss_curve(statistics)
        result = cut(block, site, statistics, 40, Run(small_recipe(), Clock(torch.device("cpu")), Journal()))
        results.append((result, block.fc2.weight, block.fc2.bias, curve))
    (wide, W, b, curve), (single, W32, b32, curve32) = results
    assert torch.equal(wide.kept, single.kept) and wide.dampening == single.dampening
    assert 0 < wide.reference_weight == pytest.approx(single.reference_weight, abs=1e-4)
    assert wide.error == pytest.approx(single.error, rel=1e-3)
    assert wide.predicted_error == pytest.approx(single.predicted_error, rel=1e-3)
    torch.testing.assert_close(W, W32, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(b, b32, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curve, curve32, rtol=1e-3, atol=1e-4 * float(curve[0]))


@pytest.mark.parametrize("metric", [True, False])
def test_candidates_are_compared_in_some_directions_as_in_all(metric):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    d_out, n, k = 2 * VIEWS, 60, 40
    W, pull, mixing = draw(d_out, n), draw(d_out, n), draw(n, n)
    root = draw(d_out, d_out).tril() if metric else None

    def sums(tokens):
        x = draw(tokens, n) @ mixing
        lacking = 0.1 * x @ pull.T + 3 * draw(tokens, d_out)
        kept, gone = x[:, :k], x[:, k:] @ W[:, k:].T
        cut, drift = (OutputSums(v.T @ kept, v.sum(0)) for v in (gone, lacking))
        return KeptSums(lambda: kept.T @ kept, kept.sum(0), tokens, cut, drift, torch.zeros(n, dtype=torch.float64))

    fit, held = sums(200), sums(100)
    view = viewed(root, W)
    assert view is not None and view.shape == (d_out, VIEWS)
    assert viewed(root, W[:-1]) is root  # few enough for all of them
    whole = torch.eye(d_out, dtype=torch.float64) if root is None else root
    every = choose_repair(fit.seen_by(whole), held.seen_by(whole), DAMPENINGS)
    some = choose_repair(fit.seen_by(view), held.seen_by(view), DAMPENINGS)
    assert (some.dampening, some.drift_dampening) == (every.dampening, every.drift_dampening)
    assert 0 < every.alpha < 1 and some.alpha == pytest.approx(every.alpha, abs=0.05)
