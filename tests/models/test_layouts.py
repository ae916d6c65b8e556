import copy

import pytest
import torch
from torch import nn
from transformers import OPTForCausalLM

from snp_llm.models.families import FAMILIES, find_blocks, find_sites
from snp_llm.models.layouts import assemble, needs_code
from snp_llm.models.modeling_snp_opt import SnpOPTForCausalLM
from snp_llm.models.surgery import prune_site
from tests.conftest import OPT_VARIANTS, small_opt

FAMILY = FAMILIES[0]


def cut_blocks(model, widths):
    """Copies of a model's blocks whose sites keep their first units, without repair."""
    blocks = nn.ModuleList(copy.deepcopy(list(find_blocks(model, FAMILY))))
    for site, width in zip(find_sites(blocks, FAMILY), widths, strict=True):
        if width < site.units:
            out = blocks[site.block].get_submodule(site.out_projection)
            weight = out.weight[:, : width * site.unit_size]
            prune_site(blocks[site.block], FAMILY, site, torch.arange(width), weight, out.bias)
    return blocks


@pytest.mark.parametrize("variant", OPT_VARIANTS)
def test_blocks_of_different_widths_get_a_config_of_their_own(variant):
    dense = small_opt(**OPT_VARIANTS[variant])
    pruned = assemble(dense, FAMILY, cut_blocks(dense, [4, 64, 2, 40, 3, 64]))
    assert type(pruned) is SnpOPTForCausalLM and needs_code(pruned.config)
    assert pruned.config.pruned_layers == {
        "1": {"num_attention_heads": 2, "ffn_dim": 40},
        "2": {"num_attention_heads": 3},
    }
    assert pruned.config.hidden_size == 32 and pruned.config.num_attention_heads == 4
    assert not any(p.is_meta for p in [*pruned.parameters(), *pruned.buffers()])
    tied = pruned.lm_head.weight is pruned.model.decoder.embed_tokens.weight
    assert tied == dense.config.tie_word_embeddings
    assert torch.isfinite(pruned(torch.randint(2048, (1, 8))).logits).all()


def test_equal_ffn_widths_alone_are_a_plain_opt():
    dense = small_opt()
    pruned = assemble(dense, FAMILY, cut_blocks(dense, [4, 40] * 3))
    assert type(pruned) is OPTForCausalLM and pruned.config.ffn_dim == 40 and not needs_code(pruned.config)


def test_equal_widths_with_fewer_heads_still_need_code():
    dense = small_opt()
    assert needs_code(assemble(dense, FAMILY, cut_blocks(dense, [3, 40] * 3)).config)


def test_a_pruned_model_can_become_plain_again_but_not_dense():
    dense = small_opt()
    once = assemble(dense, FAMILY, cut_blocks(dense, [4, 64, 4, 40, 4, 40]))
    twice = assemble(once, FAMILY, cut_blocks(once, [4, 40, 4, 40, 4, 40]))
    assert type(twice) is OPTForCausalLM and twice.config.ffn_dim == 40
    assert not hasattr(twice.config, "pruned_layers")


def test_tensors_outside_the_blocks_are_shared():
    dense = small_opt()
    pruned = assemble(dense, FAMILY, cut_blocks(dense, [2, 40] * 3))
    assert pruned.lm_head.weight.data_ptr() == dense.lm_head.weight.data_ptr()
