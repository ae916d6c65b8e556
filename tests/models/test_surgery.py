import pytest
import torch
from transformers import OPTConfig

from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.models.surgery import prune_site
from tests.conftest import OPT_VARIANTS, small_opt


@pytest.mark.parametrize("variant", OPT_VARIANTS)
def test_removing_units_equals_zeroing_their_columns(variant):
    dense, pruned = small_opt(**OPT_VARIANTS[variant]), small_opt(**OPT_VARIANTS[variant])
    family, tokens = find_family(OPTConfig()), torch.randint(2048, (2, 16))
    kept = {"attention": torch.tensor([0, 2]), "ffn": torch.arange(3, 47)}
    for site in find_sites(find_blocks(pruned), family):
        units = kept[site.kind]
        channels = torch.cat([torch.arange(u * site.unit_size, (u + 1) * site.unit_size) for u in units.tolist()])
        block = find_blocks(pruned)[site.block]
        old = block.get_submodule(site.path)
        prune_site(block, site, units, old.weight[:, channels].double(), old.bias)
        zeroed = torch.zeros_like(old.weight)
        zeroed[:, channels] = old.weight[:, channels]
        find_blocks(dense)[site.block].get_submodule(site.path).weight.copy_(zeroed)
    torch.testing.assert_close(pruned(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    assert [s.units for s in find_sites(find_blocks(pruned), family)] == [2, 44] * 3
