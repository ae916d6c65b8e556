"""What holds for decoders whose blocks differ: hybrids, latent attention, mixtures of experts."""

from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from snp_llm import SnpError, checkpoint, prune
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.outline import ffn_kinds, structure_of
from snp_llm.models.plain import ffn_key, uniform_widths
from snp_llm.models.size import model_size
from snp_llm.models.staying import has_more, what_stays
from snp_llm.pruning.run import resolve
from snp_llm.pruning.widths.plan import check_budget
from tests.alone import RELOAD
from tests.conftest import FAMILY_CONFIGS, small_model, small_recipe, zeroed
from tests.differing import DIFFERING, HYBRIDS, LATENTS, MIXTURES, differing_model
from tests.families import MORE

TOKENS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
FEW = ("lfm3", "falcon_h1", "deepseek_v3")  # in every run of the tests
TYPES = [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in DIFFERING]
IN_FLOAT64 = {"qwen3_5_text", "lfm2", "lfm3", "bamba", "falcon_h1", "granitemoehybrid", "olmo_hybrid"} | {
    "recurrent_gemma",
    "minicpm3",
    "youtu",
    "llama4_text",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
}  # kernels for experts take no more than float32
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def model_of(model_type: str) -> PreTrainedModel:
    return differing_model(model_type, torch.float64 if model_type in IN_FLOAT64 else torch.float32)


def cut(model: PreTrainedModel, tokenizer, layout: str = "compact", **overrides):
    """A model of which as much has gone of FFN and heads as can go in a layout."""
    anatomy = find_anatomy(model)
    uniform = layout == "uniform"
    heads = any(
        site.heads is not None and site.prunable and (not uniform or uniform_widths(model, anatomy.family, site))
        for site in anatomy.sites
    )
    kinds = ffn_kinds(structure_of(model))
    ffn = any(not uniform or ffn_key(model, anatomy.family, kind.facts) for kind in kinds)
    settings = {"ffn_sparsity": (0.1 if uniform else 0.3) * ffn, "head_sparsity": 0.3 * heads}
    values = {**settings, "round_to": 4, "num_samples": 4, "layout": layout, **overrides}
    return prune(model, tokenizer, small_recipe(**values))


@pytest.mark.parametrize("model_type", TYPES)
def test_sparsity_zero_is_the_dense_model_to_the_bit(model_type, tokenizer):
    dense = model_of(model_type)
    for layout in ("compact", "uniform", "padded"):
        pruned = prune(dense, tokenizer, small_recipe(sparsity=0.0, layout=layout, num_samples=2))
        assert torch.equal(pruned.model(TOKENS).logits, dense(TOKENS).logits)
        assert pruned.model.config.model_type == model_type


@pytest.mark.parametrize(
    ("layout", "head_unit"),
    [
        *(("compact", "kv_group"), ("uniform", "query")),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (("compact", "query"), ("uniform", "kv_group"))
        ),
    ],
)
@pytest.mark.parametrize("model_type", TYPES)
def test_pruned_equals_dense_with_those_units_zeroed_and_the_rest_repaired(model_type, layout, head_unit, tokenizer):
    dense = model_of(model_type)
    pruned = cut(dense, tokenizer, layout, head_unit=head_unit)
    torch.testing.assert_close(pruned.model(TOKENS).logits, zeroed(dense, pruned)(TOKENS).logits, **CLOSE)
    gone = any(len(result.kept) < result.site.units for result in pruned.sites)
    assert gone == bool((pruned.model(TOKENS).logits - dense(TOKENS).logits).abs().max() > 1e-3)
    if layout == "uniform":
        assert pruned.model.config.model_type == model_type
        if not gone:
            with pytest.raises(SnpError, match="at most 0, .* layout uniform; got 0.3. Use --layout compact"):
                prune(dense, tokenizer, small_recipe(layout=layout))
            pytest.skip("no plain config holds other widths, which is said")
    assert gone


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_back_gives_the_dense_shape_and_the_same_function(model_type, tokenizer):
    dense = model_of(model_type)
    compact, padded = (cut(dense, tokenizer, layout) for layout in ("compact", "padded"))
    assert type(padded.model) is type(dense)
    assert {k: v.shape for k, v in padded.model.state_dict().items()} == {
        k: v.shape for k, v in dense.state_dict().items()
    }
    torch.testing.assert_close(padded.model(TOKENS).logits, compact.model(TOKENS).logits, **CLOSE)


def written(model: PreTrainedModel, *, cache: bool) -> torch.Tensor:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "use_cache": cache}
    prompt = TOKENS[:, :10]
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def padding_moves(model: PreTrainedModel) -> float:
    """How far logits of a text are from those that it has beside a longer one."""
    alone = model(TOKENS[:1, :10]).logits
    batch = torch.cat([torch.cat([torch.full((1, 6), 1), TOKENS[:1, :10]], 1), TOKENS[1:, :16]])
    mask = (torch.arange(16) >= torch.tensor([[6], [0]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = model(batch, attention_mask=mask, position_ids=positions).logits
    return float((together[:1, 6:] - alone).abs().max())


@cache
def cut_once(model_type: str, tokenizer):
    return cut(model_of(model_type), tokenizer)


@pytest.mark.parametrize("model_type", TYPES)
def test_generation_with_a_cache_equals_that_without(model_type, tokenizer):
    once = cut_once(model_type, tokenizer)
    assert torch.equal(written(once.model, cache=True), written(once.model, cache=False))


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_moves_no_more_than_it_does_in_the_dense_model(model_type, tokenizer):
    if padding_moves(model_of(model_type)) > 1e-3:
        pytest.skip("its mixers see padding, in the dense model too")
    assert padding_moves(cut_once(model_type, tokenizer).model) < 1e-3


@pytest.mark.parametrize("model_type", TYPES)
def test_a_pruned_model_is_an_input_like_any_other(model_type, tokenizer):
    once = cut_once(model_type, tokenizer)
    twice = cut(
        once.model, tokenizer, ffn_sparsity=0.1 * any(r.site.kind == "ffn" for r in once.sites), head_sparsity=0.0
    )
    assert [r.site.channels for r in twice.sites] == [len(r.kept) * r.site.unit_size for r in once.sites]
    assert torch.isfinite(twice.model(TOKENS).logits).all()


def reloads(names, tokenizer, alone, folder, record) -> None:
    torch.save(TOKENS, folder / "tokens.pt")
    wanted = {}
    for name in names:
        for layout in ("compact", "uniform"):
            pruned = cut(differing_model(name), tokenizer, layout)
            checkpoint.save(pruned.model, tokenizer, folder / f"{name}-{layout}")
            wanted[f"{name}-{layout}"] = pruned.model(TOKENS).logits
    run = alone(RELOAD, folder)
    assert run.returncode == 0, run.stderr
    for name, logits in wanted.items():
        assert torch.equal(torch.load(folder / name / "logits.pt"), logits), name
        record("model_type", name.rpartition("-")[0])


@pytest.mark.slow
def test_a_fresh_process_reads_the_same(tokenizer, alone, tmp_path, record_property):
    reloads(FEW, tokenizer, alone, tmp_path, record_property)


@pytest.mark.exhaustive
def test_a_fresh_process_reads_all_of_them(tokenizer, alone, tmp_path, record_property):
    reloads(DIFFERING, tokenizer, alone, tmp_path, record_property)


def test_sparsity_is_a_share_of_all_linear_weights_of_the_blocks(tokenizer):
    dense = differing_model("lfm2")
    pruned = prune(dense, tokenizer, small_recipe(sparsity=0.2, round_to=1, num_samples=2))
    sizes = [model_size(model, 32).block_linear for model in (dense, pruned.model)]
    whole = sum(m.weight.numel() for m in find_blocks(dense).modules() if isinstance(m, torch.nn.Linear))
    assert sizes[0] == whole and 1 - sizes[1] / whole == pytest.approx(0.2, abs=0.01)


def test_more_than_attention_and_ffn_have_is_refused_with_the_most_that_there_is():
    dense = differing_model("granitemoehybrid")
    anatomy = find_anatomy(dense)
    least = sum(site.cost * (4 if site.kind == "ffn" else 1) for site in anatomy.sites)
    most = (sum(site.parameters for site in anatomy.sites) - least) / model_size(dense, 32).block_linear
    recipe = small_recipe(sparsity=0.9, round_to=4)
    with pytest.raises(SnpError, match=rf"--sparsity: expected at most {int(1000 * most) / 1000:g}, .*got 0\.9\."):
        check_budget(dense, resolve(recipe, dense))
    check_budget(dense, resolve(small_recipe(sparsity=int(1000 * most) / 1000, round_to=4), dense))


def test_experts_are_neither_cut_nor_counted(tokenizer):
    dense = differing_model("mixtral")
    experts = {k: v for k, v in dense.state_dict().items() if ".experts." in k}
    pruned = prune(dense, tokenizer, small_recipe(sparsity=0.3, num_samples=2))
    assert experts and all(torch.equal(pruned.model.state_dict()[k], v) for k, v in experts.items())
    assert {result.site.kind for result in pruned.sites} == {"attention"}
    share = sum(v.numel() for v in experts.values()) / sum(p.numel() for p in dense.parameters())
    assert pruned.stays == what_stays(find_anatomy(dense))
    assert f"experts stay as they are, {100 * share:.1f} % of all parameters" in pruned.stays[0]
    # Two of four experts a token, and the head; routers are no linear layers here.
    weights = model_size(dense, 31).block_linear + sum(v.numel() for v in experts.values()) / 2 + 2048 * 48
    assert model_size(dense, 31).flops == 2 * weights + 4 * 3 * 96 * 16
    with pytest.raises(SnpError, match=r"--ffn-sparsity 0\.5: expected a model with an FFN"):
        prune(dense, tokenizer, small_recipe(ffn_sparsity=0.5, num_samples=2))


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("lfm3", "conv (Lfm3ShortConv) in 1 of 3 blocks"),
        ("bamba", "mamba (BambaMixer) in 2 of 3 blocks"),
        ("kimi_linear", "self_attn (KimiLinearDeltaAttention) in 2 of 3 blocks"),
    ],
)
def test_mixers_are_named(model_type, words):
    assert words in what_stays(find_anatomy(differing_model(model_type)))[0]


@pytest.mark.parametrize("model_type", [name for name in FAMILY_CONFIGS if name not in MORE])
def test_where_all_is_cut_nothing_stays(model_type):
    anatomy = find_anatomy(small_model(model_type))
    assert what_stays(anatomy) == [] and not any(has_more(anatomy, index) for index in range(len(anatomy.blocks)))


def test_widths_that_a_config_has_computed_are_said_as_they_are(tokenizer):
    """LFM2's FFN is as wide as two thirds of what its config says, rounded up."""
    dense = differing_model("lfm2", torch.float64, block_auto_adjust_ff_dim=True, block_multiple_of=16)
    recipe = small_recipe(sparsity=0.1, layout="uniform", round_to=4, num_samples=2)
    pruned = prune(dense, tokenizer, recipe)
    config, widths = pruned.model.config, {len(r.kept) for r in pruned.sites if r.site.kind == "ffn"}
    assert dense.config.intermediate_size == 64 and find_anatomy(dense).sites[0].units == 48
    assert config.model_type == "lfm2" and {config.intermediate_size} == widths and max(widths) < 48
    torch.testing.assert_close(pruned.model(TOKENS).logits, zeroed(dense, pruned)(TOKENS).logits, **CLOSE)
    assert dense.config.block_auto_adjust_ff_dim and not config.block_auto_adjust_ff_dim


def test_heads_that_a_plain_config_cannot_lose_are_refused_in_words(tokenizer):
    """RecurrentGemma's count of heads is that of its recurrences as well, and says how large heads are."""
    dense = differing_model("recurrent_gemma")
    pruned = prune(dense, tokenizer, small_recipe(sparsity=0.1, layout="uniform", round_to=4, num_samples=2))
    assert {(r.site.kind, len(r.kept) < r.site.units) for r in pruned.sites} == {("attention", False), ("ffn", True)}
    recipe = small_recipe(head_sparsity=0.3, ffn_sparsity=0.1, layout="uniform")
    with pytest.raises(SnpError, match="--head-sparsity: expected at most 0, .* layout uniform; got 0.3. Use --head-"):
        check_budget(dense, resolve(recipe, dense))


@pytest.mark.parametrize("budget", [{"sparsity": 0.3}, {"target_params": "0.9x"}, {"max_perplexity_increase": "5%"}])
def test_a_model_of_which_nothing_may_go_is_refused_before_the_work(budget):
    dense = differing_model("olmoe")
    with pytest.raises(
        SnpError, match="this one has none: heads stay, since a norm over all of them at once would cha"
    ):
        check_budget(dense, resolve(small_recipe(**budget), dense))
    check_budget(dense, resolve(small_recipe(sparsity=0.0), dense))


def test_what_has_no_site_or_shares_its_blocks_is_refused():
    with pytest.raises(SnpError, match="its 3 blocks have no attention and no FFN that is known"):
        find_anatomy(differing_model("mamba"))
    with pytest.raises(SnpError, match=r"block 3 .*q_proj: shares its weights with block 1 .*, as Zamba's do"):
        find_anatomy(differing_model("zamba2"))


def test_the_tables_hold_enough_of_each():
    assert len(HYBRIDS) >= 8 and len(LATENTS) >= 3 and len(MIXTURES) >= 4
