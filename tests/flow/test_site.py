import pytest
import torch

from snp_llm.errors import SnpError
from snp_llm.linalg.gram import Moments
from snp_llm.models.families import FAMILIES, find_blocks, find_sites
from snp_llm.site import CURVE_POINTS, factor_site, sample_curve
from snp_llm.sums import Statistics
from tests.conftest import small_opt, small_recipe


def test_a_gram_matrix_that_stays_indefinite_names_the_block():
    model, family = small_opt(), FAMILIES[0]
    blocks = find_blocks(model, family)
    site = find_sites(blocks, family)[3]
    second = torch.eye(64)
    second[1, 0] = -1e6
    moments = Moments(second, torch.zeros(64), 100)
    with pytest.raises(SnpError, match=r"^block 1 fc2: Gram matrix of 64 channels is not positive definite \(pivot 2"):
        factor_site(blocks[1], family, site, Statistics(moments), small_recipe())


def test_the_mean_moves_only_where_there_is_a_bias():
    for variant, centred in (({}, True), ({"enable_bias": False}, False)):
        model, family = small_opt(**variant), FAMILIES[0]
        blocks = find_blocks(model, family)
        site = find_sites(blocks, family)[1]
        moments = Moments(4 * torch.eye(64), torch.full((64,), 2.0), 4)
        factored = factor_site(blocks[0], family, site, Statistics(moments), small_recipe())
        assert factored.centred == centred
        assert factored.gram[0, 1] == (-1 if centred else 0) and factored.mean[0] == 0.5


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
