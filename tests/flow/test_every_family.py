"""What holds for every family, from a small random config: identities, layouts, caches, fresh processes."""

from inspect import signature

import pytest
import torch

from snp_llm import prune
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.calls import with_cache
from snp_llm.models.families.decoders import find_family
from snp_llm.models.outline import ffn_kinds, structure_of
from snp_llm.models.plain import ffn_key, uniform_widths
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_model, small_recipe, zeroed
from tests.families import every_family

TOKENS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
CUTS = {"ffn_sparsity": 0.3, "head_sparsity": 0.3, "round_to": 4, "num_samples": 4}
# Many norms compute in float32 whatever the model's type, so that last bits in front of one come out as 1e-7 behind it.
NO_OTHERS = "no plain config holds other widths, which is said"
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def cut(model, tokenizer, **overrides):
    """A pruned model; heads stay where they cannot go."""
    family = find_family(model.config)
    first = find_sites(find_blocks(model), family, overrides.get("head_unit", "kv_group"))[0]
    stuck = not first.prunable or (overrides.get("layout") == "uniform" and not uniform_widths(model, family, first))
    settings = {**CUTS, **({"head_sparsity": 0.0} if stuck else {}), **overrides}
    return prune(model, tokenizer, small_recipe(**settings))


def says_ffn(model):
    """Whether a plain config can hold another FFN width."""
    return all(ffn_key(model, find_family(model.config), kind.facts) for kind in ffn_kinds(structure_of(model)))


@every_family(variants=True)
def test_sparsity_zero_is_the_dense_model_to_the_bit(model_type, tokenizer):
    dense = small_model(model_type, torch.float32)
    for layout in ("compact", "uniform", "padded"):
        pruned = prune(dense, tokenizer, small_recipe(sparsity=0.0, layout=layout, num_samples=2))
        assert torch.equal(pruned.model(TOKENS).logits, dense(TOKENS).logits)
        assert pruned.model.config.model_type == dense.config.model_type


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
@every_family(variants=True)
def test_pruned_equals_dense_with_those_units_zeroed_and_the_rest_reconstructed(
    model_type, layout, head_unit, tokenizer
):
    dense = small_model(model_type)
    if layout == "uniform" and not says_ffn(dense):
        with pytest.raises(SnpError, match="with which every unit is gone .* layout uniform; .* Use --layout compact"):
            cut(dense, tokenizer, head_unit=head_unit, layout=layout)
        pytest.skip(NO_OTHERS)
    pruned = cut(dense, tokenizer, head_unit=head_unit, layout=layout)
    masked, removed = zeroed(dense, pruned), {"attention": 0, "ffn": 0}
    for result in pruned.sites:
        removed[result.site.kind] += result.site.units - len(result.kept)
    assert removed["ffn"] > 0 and (removed["attention"] > 0) == bool(pruned.recipe.head_sparsity)
    torch.testing.assert_close(pruned.model(TOKENS).logits, masked(TOKENS).logits, **CLOSE)
    assert (pruned.model(TOKENS).logits - dense(TOKENS).logits).abs().max() > CLOSE["atol"]


@every_family(variants=True)
def test_padding_back_gives_the_dense_shape_and_the_same_function(model_type, tokenizer):
    dense = small_model(model_type)
    compact, padded = (cut(dense, tokenizer, layout=layout) for layout in ("compact", "padded"))
    assert type(padded.model) is type(dense)
    assert {k: v.shape for k, v in padded.model.state_dict().items()} == {
        k: v.shape for k, v in dense.state_dict().items()
    }
    torch.testing.assert_close(padded.model(TOKENS).logits, compact.model(TOKENS).logits, **CLOSE)
    assert any(bool((v == 0).any()) for k, v in padded.model.state_dict().items() if v.dim() == 2)


@pytest.mark.parametrize("allocation", ["uniform", pytest.param("variance", marks=pytest.mark.exhaustive)])
@every_family("gemma3n_text", variants=True)  # whose heads alone go
def test_the_uniform_layout_is_a_plain_config(model_type, allocation, tokenizer):
    dense = small_model(model_type)
    recipe = small_recipe(sparsity=0.25, round_to=4, layout="uniform", num_samples=4, allocation=allocation)
    if not says_ffn(dense):
        with pytest.raises(SnpError, match="with which every unit is gone .* layout uniform; .* Use --layout compact"):
            prune(dense, tokenizer, recipe)
        pytest.skip(NO_OTHERS)
    pruned = prune(dense, tokenizer, recipe)
    assert not pruned.model.config.model_type.startswith("snp_")
    for kind in ("attention", "ffn"):
        assert len({len(r.kept) for r in pruned.sites if r.site.kind == kind}) == 1
    removed = sum((r.site.units - len(r.kept)) * r.site.cost for r in pruned.sites)
    assert removed / sum(r.site.parameters for r in pruned.sites) == pytest.approx(0.25, abs=0.03)
    assert torch.isfinite(pruned.model(TOKENS).logits).all()


@pytest.mark.parametrize("layout", ["compact", pytest.param("uniform", marks=pytest.mark.exhaustive)])
@every_family(variants=True)
def test_generation_with_a_cache_equals_logits_without(model_type, layout, tokenizer):
    settings = {"sparsity": 0.25, "ffn_sparsity": None, "head_sparsity": None} if layout == "uniform" else {}
    dense = small_model(model_type)
    if layout == "uniform" and not says_ffn(dense):
        pytest.skip(NO_OTHERS)
    if "use_cache" not in signature(dense.forward).parameters:
        pytest.skip("it keeps no cache")
    model = cut(dense, tokenizer, layout=layout, **settings).model
    prompt = TOKENS[:, :10]
    cached = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=1,
    )
    logits = model(cached, use_cache=False).logits
    cache = model(cached[:, :9], use_cache=True).past_key_values
    for at in range(9, cached.shape[1]):
        step = model(cached[:, at : at + 1], **with_cache(model, cache)).logits
        torch.testing.assert_close(step[:, 0], logits[:, at], **CLOSE)
    logits[..., 2] = -torch.inf  # min_new_tokens forbids the end of text
    assert torch.equal(logits[:, 9:-1].argmax(-1), cached[:, 10:])


@every_family(variants=True)
def test_padding_and_batch_do_not_change_logits(model_type, tokenizer):
    dense, close = small_model(model_type), CLOSE
    if dense.config._attn_implementation == "eager":
        # In float64 that turns the rows of padding into NaN, in the dense model too.
        dense, close = small_model(model_type, torch.float32), {"rtol": 1e-3, "atol": 1e-3}
    model = cut(dense, tokenizer).model
    alone = model(TOKENS[:1, :10]).logits
    batch = torch.cat([torch.cat([torch.full((1, 6), 1), TOKENS[:1, :10]], 1), TOKENS[1:, :16]])
    mask = (torch.arange(16) >= torch.tensor([[6], [0]])).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes = signature(model.forward).parameters
    extra = {"position_ids": positions} if "position_ids" in takes and model_type != "opt" else {}
    together = model(batch, attention_mask=mask, **extra).logits
    torch.testing.assert_close(together[:1, 6:], alone, **close)
    torch.testing.assert_close(together[1:], model(TOKENS[1:, :16]).logits, **close)


@every_family(variants=True)
def test_changing_the_attention_implementation_reaches_every_block(model_type, tokenizer):
    model = cut(small_model(model_type), tokenizer).model
    before = model(TOKENS).logits
    if model.config._attn_implementation == "eager" or not model._can_set_attn_implementation():
        pytest.skip("it has one alone, or does not change it")
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(TOKENS).logits, before, **CLOSE)


@every_family(variants=True)
def test_a_pruned_model_is_an_input_like_any_other(model_type, tokenizer):
    once = cut(small_model(model_type), tokenizer)
    twice = cut(once.model, tokenizer, ffn_sparsity=0.2, head_sparsity=0.0)
    assert [r.site.units * r.site.unit_size for r in twice.sites] == [
        len(r.kept) * r.site.unit_size for r in once.sites
    ]
    assert torch.isfinite(twice.model(TOKENS).logits).all()
