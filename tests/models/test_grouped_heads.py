"""Multi-head, grouped-query and multi-query attention: what a unit is, which rows it has, what can be refused."""

import pytest
import torch

from snp_llm import prune
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.models.projections import weight_of
from snp_llm.models.site import Heads
from snp_llm.models.surgery import prune_site
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_model, small_recipe
from tests.families import every_family

TOKENS = torch.randint(3, 2048, (2, 12), generator=torch.Generator().manual_seed(1))


def sites_of(model, head_unit):
    family = find_family(model.config)
    return find_sites(find_blocks(model), family, head_unit)


@pytest.mark.parametrize(
    ("kv_heads", "head_unit", "unit", "units", "unit_size"),
    [
        (6, "kv_group", "heads", 6, 8),
        (6, "query", "heads", 6, 8),
        (3, "kv_group", "KV groups", 3, 16),
        (3, "query", "query heads", 6, 8),
        (1, "kv_group", "query heads", 6, 8),
        (1, "query", "query heads", 6, 8),
    ],
)
def test_units_of_mha_gqa_and_mqa(kv_heads, head_unit, unit, units, unit_size):
    site = sites_of(small_model("llama", num_key_value_heads=kv_heads), head_unit)[0]
    assert (site.unit, site.units, site.unit_size, site.heads) == (unit, units, unit_size, Heads(6, kv_heads, 8))
    kv_cost = 0 if unit == "query heads" else 2 * 8 * 48
    assert site.cost == 2 * unit_size * 48 + kv_cost
    assert site.parameters == 2 * 48 * 48 + 2 * kv_heads * 8 * 48


def test_heads_after_a_cut():
    model = small_model("llama", num_key_value_heads=3)
    assert sites_of(model, "kv_group")[0].heads_after(2) == Heads(4, 2, 8)
    assert sites_of(model, "query")[0].heads_after(3) == Heads(3, 3, 8)


def test_rows_of_separate_fused_and_interleaved_projections():
    """Written out by hand: two KV groups of two query heads of two channels, or two heads without groups."""
    sizes = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama, phi = small_model("llama", **sizes), small_model("phi3", **sizes)
    neox = small_model("gpt_neox", hidden_size=4, num_attention_heads=2)

    def rows(model, head_unit="kv_group"):
        return [producer.units().tolist() for producer in sites_of(model, head_unit)[0].producers]

    q, k = [0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1]
    assert rows(llama) == [q, k, k] and rows(phi) == [q + k + k]
    q, k = [0, 0, 1, 1, 2, 2, 3, 3], [-1] * 4
    assert rows(llama, "query") == [q, k, k] and rows(phi, "query") == [q + k + k]
    assert rows(neox) == [[0] * 6 + [1] * 6]


def test_a_fused_gate_and_up_has_every_channel_twice():
    model = small_model("phi3")
    (gate_up,) = sites_of(model, "kv_group")[1].producers
    assert gate_up.units().tolist() == [*range(64), *range(64)]


@pytest.mark.parametrize("head_unit", ["kv_group", "query"])
@every_family()
def test_a_block_still_runs_after_surgery_and_equals_zeroed_columns(model_type, head_unit):
    dense, pruned = small_model(model_type), small_model(model_type)
    find_family(dense.config)
    for site in sites_of(pruned, head_unit):
        if not site.prunable:
            continue
        kept = torch.arange(site.units)[1::2] if site.kind == "ffn" or not site.groups else torch.arange(site.units)
        if site.groups:  # the last query head of every group goes
            per_group = site.units // site.groups
            kept = kept[kept % per_group != per_group - 1]
        channels = (kept[:, None] * site.unit_size + torch.arange(site.unit_size)).reshape(-1)
        block = find_blocks(pruned)[site.block]
        old = block.get_submodule(site.path)
        prune_site(block, site, kept, weight_of(old)[:, channels], old.bias)
        large = weight_of(find_blocks(dense)[site.block].get_submodule(site.path))
        zeroed = torch.zeros_like(large)
        zeroed[:, channels] = large[:, channels]
        large.copy_(zeroed)
    for implementation in {dense.config._attn_implementation, "eager"}:
        dense.set_attn_implementation(implementation)
        pruned.set_attn_implementation(implementation)
        torch.testing.assert_close(pruned(TOKENS).logits, dense(TOKENS).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("kv_heads", "head_unit"), [(6, "kv_group"), (3, "kv_group"), (3, "query"), (1, "kv_group")])
@pytest.mark.parametrize("layout", ["compact", "uniform"])
def test_pruned_heads_are_spread_as_the_unit_says(kv_heads, head_unit, layout, tokenizer, caplog):
    dense = small_model("mistral", num_key_value_heads=kv_heads)
    recipe = small_recipe(ffn_sparsity=0.0, head_sparsity=0.3, head_unit=head_unit, layout=layout, num_samples=2)
    pruned = prune(dense, tokenizer, recipe)
    for result in pruned.sites[::2]:
        if result.site.groups:
            group = result.kept // (6 // result.site.groups)
            assert len(set(group.bincount(minlength=result.site.groups).tolist())) == 1
        heads = result.site.heads_after(len(result.kept))
        assert heads.query % heads.key_value == 0 and heads.size == 16
    assert any("one key-value head" in message for message in caplog.messages) == (kv_heads == 1)


def test_heads_that_do_not_split_into_groups_are_refused():
    model = small_model("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj = torch.nn.Linear(48, 32, bias=False)
    attention.v_proj = torch.nn.Linear(48, 32, bias=False)
    with pytest.raises(
        SnpError, match="block 1 self_attn: expected query heads that split evenly into KV groups, got 48"
    ):
        sites_of(model, "kv_group")
    attention.k_proj = torch.nn.Linear(48, 12, bias=False)
    with pytest.raises(SnpError, match="block 1 self_attn: expected query heads that split evenly"):
        sites_of(model, "kv_group")


def test_heads_under_a_joint_norm_stay(tokenizer):
    dense = small_model("olmo2")
    pruned = prune(dense, tokenizer, small_recipe(sparsity=0.2, round_to=4, num_samples=2))
    assert [len(r.kept) for r in pruned.sites[::2]] == [3, 3]
    removed = sum((r.site.units - len(r.kept)) * r.site.cost for r in pruned.sites)
    assert removed / sum(r.site.parameters for r in pruned.sites) == pytest.approx(0.2, abs=0.02)
    with pytest.raises(
        SnpError,
        match="--head-sparsity: expected at most 0, .* got 0.2. Use --head-sparsity 0",
    ):
        prune(dense, tokenizer, small_recipe(head_sparsity=0.2, ffn_sparsity=0.2))
    assert not sites_of(small_model("stablelm", qk_layernorm=True), "kv_group")[0].prunable
