import copy

import pytest
import torch
from torch import nn
from transformers import MistralForCausalLM, OPTConfig, OPTForCausalLM

from snp_llm import SnpError, prune
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.blocks import capture_calls, run_block
from snp_llm.models.families.decoders import find_family
from snp_llm.models.layouts import assemble, needs_code
from snp_llm.models.modeling_snp import SnpOPTForCausalLM, resize_block
from snp_llm.models.outline import block_widths, structure_of
from snp_llm.models.plain import uniform_widths
from snp_llm.models.site import site_bias, site_weight
from snp_llm.models.surgery import prune_site
from snp_llm.pruning.run import resolve
from tests.conftest import OPT_VARIANTS, small_model, small_opt, small_recipe
from tests.families import every_family

FAMILY = find_family(OPTConfig())


def cut_blocks(model, widths):
    """Copies of a model's blocks whose sites keep their first units, without repair."""
    blocks = nn.ModuleList(copy.deepcopy(list(find_blocks(model))))
    for site, width in zip(find_sites(blocks, FAMILY), widths, strict=True):
        if width < site.units:
            out = blocks[site.block].get_submodule(site.path)
            weight = out.weight[:, : width * site.unit_size]
            prune_site(blocks[site.block], site, torch.arange(width), weight, out.bias)
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


# --- which config holds which widths ---------------------------------------------------------------------------------


def sites_of(model, head_unit="kv_group"):
    family = find_family(model.config)
    return find_sites(find_blocks(model), family, head_unit)


def test_head_counts_that_llama_refuses_are_saved_as_mistral(tokenizer):
    """Six heads of a hidden size of 48 lose one: five do not divide it."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 16
    dense = small_model("llama", num_key_value_heads=6, rope_parameters=rope)
    heads_only = {"head_sparsity": 0.16, "ffn_sparsity": 0.0, "num_samples": 2, "reference": "self"}
    pruned = prune(dense, tokenizer, small_recipe(layout="uniform", **heads_only))
    config = pruned.model.config
    assert type(pruned.model) is MistralForCausalLM
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (5, 5, 8)
    assert config.sliding_window is None and config.rope_parameters == dense.config.rope_parameters
    tokens = torch.randint(3, 2048, (1, 40))
    compact = prune(dense, tokenizer, small_recipe(**heads_only))
    if [r.kept.tolist() for r in compact.sites] == [r.kept.tolist() for r in pruned.sites]:
        assert torch.equal(compact.model(tokens).logits, pruned.model(tokens).logits)
    # The same blocks, run by Llama's own code.
    llama = copy.deepcopy(dense)
    for mine, theirs in zip(llama.model.layers, pruned.model.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(mine.self_attn, name, getattr(theirs.self_attn, name))
    torch.testing.assert_close(llama(tokens).logits, pruned.model(tokens).logits)


def test_what_no_plain_config_can_hold():
    biased = small_model("llama", num_key_value_heads=6, attention_bias=True)
    assert uniform_widths(biased, find_family(biased.config), sites_of(biased)[0]) == (1, 2, 3, 4)
    plain = small_model("llama", num_key_value_heads=6)
    assert uniform_widths(plain, find_family(plain.config), sites_of(plain)[0]) == (1, 2, 3, 4, 5)
    gemma = small_model("gemma3_text")
    assert uniform_widths(gemma, find_family(gemma.config), sites_of(gemma)[0]) == (1, 2, 3, 4)
    for tied in ("opt", "gpt2", "gpt_neox", "stablelm"):
        model = small_model(tied)
        assert uniform_widths(model, find_family(model.config), sites_of(model)[0]) == ()
    by_query = small_model("qwen3")
    assert uniform_widths(by_query, find_family(by_query.config), sites_of(by_query, "query")[0]) == (3,)


def test_the_head_budget_goes_to_the_ffn_where_heads_must_stay(tokenizer):
    pruned = prune(small_opt(), tokenizer, small_recipe(sparsity=0.3, layout="uniform", num_samples=2))
    assert [len(r.kept) for r in pruned.sites[::2]] == [4, 4, 4]
    assert type(pruned.model) is OPTForCausalLM
    removed = sum((r.site.units - len(r.kept)) * r.site.cost for r in pruned.sites)
    assert removed / sum(r.site.parameters for r in pruned.sites) == pytest.approx(0.3, abs=0.05)


def test_blocks_that_differ_can_be_made_uniform_or_are_refused(tokenizer):
    once = prune(small_model("llama"), tokenizer, small_recipe(sparsity=0.3, round_to=4, num_samples=2))
    assert needs_code(once.model.config)
    even = prune(once.model, tokenizer, small_recipe(sparsity=0.1, round_to=4, num_samples=2, layout="uniform"))
    assert not needs_code(even.model.config)
    fewer_heads = prune(small_opt(), tokenizer, small_recipe(head_sparsity=0.3, ffn_sparsity=0.0, num_samples=2))
    with pytest.raises(
        SnpError, match="layout uniform: expected head counts and widths that one plain OPT config can hold"
    ):
        prune(fewer_heads.model, tokenizer, small_recipe(sparsity=0.1, num_samples=2, layout="uniform"))


def test_rounding_follows_the_layout_and_the_width():
    wide, narrow = small_model("llama", intermediate_size=1024), small_model("llama")
    assert [resolve(small_recipe(layout=x), wide).round_to for x in ("uniform", "compact")] == [64, 8]
    assert resolve(small_recipe(layout="uniform"), narrow).round_to == 8
    assert resolve(small_recipe(layout="uniform", round_to=16), wide).round_to == 16


def test_targets_that_round_badly_are_announced(tokenizer, caplog):
    prune(small_model("llama"), tokenizer, small_recipe(head_sparsity=0.4, ffn_sparsity=0.25, num_samples=2))
    assert any(
        message == "attention: 40 % of the block-linear parameters were to go, whole units give 33.3 %"
        for message in caplog.messages
    )
    assert not any(message.startswith("ffn:") for message in caplog.messages)


@every_family()
def test_a_block_of_other_widths_is_described_to_the_row(model_type):
    """A block that surgery has cut has the shapes that the file which travels with it gives to such a block."""
    model, other = small_model(model_type), small_model(model_type)
    structure, block = structure_of(model), find_blocks(model)[1]
    for site in find_sites(find_blocks(model), find_family(model.config)):
        if site.block == 1 and site.prunable:
            kept = torch.arange(site.step, site.units)
            prune_site(
                block, site, kept, site_weight(block, site)[:, site.step * site.unit_size :], site_bias(block, site)
            )
    (part,) = (part for part in structure["parts"] if 1 in part["of"])
    (heads, channels, *_), names = block_widths(block), part["attention"]["keys"]
    keys = {names[0]: heads.query, part["ffn"]["key"]: channels, **({names[1]: heads.key_value} if names[1] else {})}
    resized = find_blocks(other)[1]
    resize_block(resized, part, other.config, keys)
    shapes = {name: tensor.shape for name, tensor in block.state_dict().items()}
    assert {name: tensor.shape for name, tensor in resized.state_dict().items()} == shapes
    resized.load_state_dict(block.state_dict())
    hidden, calls = capture_calls(other, find_blocks(other), torch.randint(3, 2048, (2, 16)))
    assert torch.equal(run_block(resized, hidden, calls[1]), run_block(block, hidden, calls[1]))
