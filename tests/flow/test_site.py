import pytest
import torch

from snp_llm.errors import SnpError
from snp_llm.linalg.gram import Moments
from snp_llm.models.families import FAMILIES, find_blocks, find_sites
from snp_llm.site import factor_site
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
