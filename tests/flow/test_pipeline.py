"""The whole pruner on small models, against independent computations of what it should give."""

import copy
from dataclasses import replace
from itertools import product
from operator import ne

import pytest
import torch

from snp_llm import prune
from snp_llm.linalg.allocation import ALLOCATIONS
from snp_llm.linalg.ordering import ORDERINGS
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.blocks import capture_calls, input_of, run_block
from snp_llm.models.families.decoders import find_family
from snp_llm.pruning.pipeline import plan
from snp_llm.pruning.run import read_calibration, resolve
from snp_llm.runtime.errors import SnpError
from tests.conftest import OPT_VARIANTS, small_opt, small_recipe, zeroed

TOKENS = torch.randint(2048, (2, 24), generator=torch.Generator().manual_seed(0))


USUAL = ("pre-norm", "loss", torch.float32)


@pytest.mark.parametrize(
    ("variant", "allocation", "dtype"),
    [  # by default those that differ from the usual case in one thing
        pytest.param(*case, marks=() if sum(map(ne, case, USUAL)) < 2 else pytest.mark.exhaustive)
        for case in product(OPT_VARIANTS, ALLOCATIONS, (torch.float32, torch.float16, torch.bfloat16))
    ],
)
def test_sparsity_zero_is_the_dense_model_to_the_bit(variant, allocation, dtype, tokenizer):
    dense = small_opt(dtype, **OPT_VARIANTS[variant])
    pruned = prune(dense, tokenizer, small_recipe(sparsity=0.0, allocation=allocation))
    assert pruned.model.dtype == dtype
    assert torch.equal(pruned.model(TOKENS).logits, dense(TOKENS).logits)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("variant", OPT_VARIANTS)
def test_pruned_equals_dense_with_those_units_zeroed_and_the_rest_reconstructed(variant, allocation, tokenizer):
    dense = small_opt(torch.float64, **OPT_VARIANTS[variant])
    recipe = small_recipe(ffn_sparsity=0.3, head_sparsity=0.3, allocation=allocation, round_to=4)
    pruned = prune(dense, tokenizer, recipe)
    masked = zeroed(dense, pruned)
    assert any(len(r.kept) < r.site.units for r in pruned.sites if r.site.kind == "attention")
    torch.testing.assert_close(pruned.model(TOKENS).logits, masked(TOKENS).logits, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["pre-norm", "350m", "no-bias"])
def test_every_site_is_the_least_squares_solution_on_what_the_pruned_blocks_before_it_give(variant, tokenizer):
    """Replays the result: at each site, lstsq on the activations that really arrive there, to 1e-9."""
    dense = small_opt(torch.float64, **OPT_VARIANTS[variant])
    recipe = small_recipe(sparsity=0.4, dampening=0.0, num_samples=40, round_to=4, reference="self")
    pruned = prune(dense, tokenizer, recipe)
    tokens = pruned.calibration.tokens
    dense_blocks, blocks = find_blocks(dense), find_blocks(pruned.model)
    hidden, calls = capture_calls(dense, dense_blocks, tokens)
    for index, (before, after) in enumerate(zip(dense_blocks, blocks, strict=True)):
        half = copy.deepcopy(before)  # attention pruned, FFN still dense
        half.self_attn = copy.deepcopy(after.self_attn)
        for result, full in ((pruned.sites[2 * index], before), (pruned.sites[2 * index + 1], half)):
            site = result.site
            size = site.unit_size
            channels = torch.cat([torch.arange(u * size, (u + 1) * size) for u in result.kept.tolist()])
            out = full.get_submodule(site.path)
            X = input_of(out, full, hidden, calls[index]).reshape(-1, out.in_features)
            A = X[:, channels]
            if out.bias is not None:
                A = torch.cat([A, torch.ones(len(X), 1, dtype=torch.float64)], 1)
            expected = torch.linalg.lstsq(A, out(X), driver="gelsd").solution
            new = after.get_submodule(site.path)
            got = new.weight.T if new.bias is None else torch.cat([new.weight.T, new.bias[None]])
            # Compared as outputs: dead ReLU channels make the weights themselves ambiguous, rare ones ill-conditioned.
            torch.testing.assert_close(A @ got, A @ expected, rtol=1e-6, atol=1e-6)
        hidden = run_block(after, hidden, calls[index])


def test_the_dense_model_is_left_alone(tokenizer):
    dense = small_opt()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    prune(dense, tokenizer, small_recipe(sparsity=0.5))
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert type(dense).__name__ == "OPTForCausalLM" and dense.model.decoder.layers[0].self_attn.num_heads == 4


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_every_ordering_prunes(ordering, tokenizer):
    pruned = prune(small_opt(), tokenizer, small_recipe(sparsity=0.4, ordering=ordering, round_to=4))
    assert torch.isfinite(pruned.model(TOKENS).logits).all()
    kept = sum(len(r.kept) * r.site.cost for r in pruned.sites)
    total = sum(r.site.units * r.site.cost for r in pruned.sites)
    assert 1 - kept / total == pytest.approx(0.4, abs=0.03)


def test_batch_size_and_the_place_of_hidden_states_do_not_matter(tokenizer):
    dense = small_opt(torch.float64)
    results = [
        prune(dense, tokenizer, small_recipe(batch_size=size, hidden_device=place))
        for size, place in ((1, "cpu"), (4, "disk"), (6, "cpu"))
    ]
    for other in results[1:]:
        assert all(torch.equal(a.kept, b.kept) for a, b in zip(results[0].sites, other.sites, strict=True))
        logits = other.model(TOKENS).logits
        torch.testing.assert_close(logits, results[0].model(TOKENS).logits, rtol=1e-9, atol=1e-9)


def test_the_same_recipe_gives_the_same_bits(tokenizer):
    first, second = (prune(small_opt(), tokenizer, small_recipe(ordering="random", seed=3)) for _ in range(2))
    assert first.calibration.digest == second.calibration.digest
    assert torch.equal(first.model(TOKENS).logits, second.model(TOKENS).logits)
    other = prune(small_opt(), tokenizer, small_recipe(ordering="random", seed=4))
    assert other.calibration.digest != first.calibration.digest


def test_repair_beats_no_repair_and_absorbing_the_mean_beats_not(tokenizer):
    """On calibration data the least-squares error is smaller by construction; this checks that it is really used."""
    dense = small_opt(torch.float64)
    plain = prune(dense, tokenizer, small_recipe(absorb_bias=False, ordering="saw", allocation="uniform"))
    absorbed = prune(dense, tokenizer, small_recipe(absorb_bias=True, ordering="saw", allocation="uniform"))
    assert torch.equal(plain.sites[1].kept, absorbed.sites[1].kept)
    assert torch.equal(
        plain.model.model.decoder.layers[0].fc2.bias, dense.model.decoder.layers[0].fc2.bias
    ) and not torch.equal(absorbed.model.model.decoder.layers[0].fc2.bias, dense.model.decoder.layers[0].fc2.bias)
    reference = dense(absorbed.calibration.tokens).logits
    errors = [(p.model(absorbed.calibration.tokens).logits - reference).square().mean() for p in (plain, absorbed)]
    assert errors[1] < errors[0]


def test_budgets_of_heads_and_ffn_set_apart(tokenizer):
    only_ffn = prune(small_opt(), tokenizer, small_recipe(ffn_sparsity=0.5, head_sparsity=0.0, allocation="uniform"))
    assert [len(r.kept) for r in only_ffn.sites] == [4, 32] * 3
    assert only_ffn.model.config.model_type == "opt"
    only_heads = prune(small_opt(), tokenizer, small_recipe(ffn_sparsity=0.0, head_sparsity=0.5))
    assert all(len(r.kept) == 64 for r in only_heads.sites if r.site.kind == "ffn")
    assert sum(len(r.kept) for r in only_heads.sites if r.site.kind == "attention") == 6


def test_the_plan_is_what_pruning_does(tokenizer):
    dense, recipe = small_opt(), small_recipe(sparsity=0.35)
    planned = plan(dense, tokenizer, recipe)
    pruned = prune(dense, tokenizer, recipe)
    assert [(s.name, w) for s, w in planned] == [(r.site.name, len(r.kept)) for r in pruned.sites]


def test_a_pruned_model_is_an_input_like_any_other(tokenizer):
    once = prune(small_opt(), tokenizer, small_recipe(sparsity=0.25))
    twice = prune(once.model, tokenizer, small_recipe(sparsity=0.25))
    assert [r.site.units for r in twice.sites] == [len(r.kept) for r in once.sites]
    units = [s.units for s in find_sites(find_blocks(twice.model), find_family(twice.model.config))]
    assert units == [len(r.kept) for r in twice.sites]
    assert torch.isfinite(twice.model(TOKENS).logits).all()


@pytest.mark.parametrize("variant", OPT_VARIANTS)
def test_generation_with_a_cache_equals_logits_without(variant, tokenizer):
    dense = small_opt(torch.float64, **OPT_VARIANTS[variant])
    model = prune(dense, tokenizer, small_recipe(sparsity=0.4)).model
    prompt = TOKENS[:, :8]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 1}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)
    sequence = prompt
    for _ in range(12):
        logits = model(sequence, use_cache=False).logits[:, -1]
        logits[:, 2] = -torch.inf  # min_new_tokens forbids the end of text
        sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, sequence)


def test_padding_and_batch_do_not_change_logits(tokenizer):
    model = prune(small_opt(torch.float64), tokenizer, small_recipe(sparsity=0.4)).model
    alone = model(TOKENS[:1, :10]).logits
    padded = torch.cat([torch.full((1, 6), 1), TOKENS[:1, :10]], 1)
    batch = torch.cat([padded, TOKENS[1:, :16]])
    mask = (torch.arange(16) >= torch.tensor([[6], [0]])).long()
    together = model(batch, attention_mask=mask).logits
    torch.testing.assert_close(together[:1, 6:], alone, rtol=1e-9, atol=1e-9)


def test_not_a_number_in_weights_names_the_tensor(tokenizer):
    dense = small_opt()
    dense.model.decoder.layers[1].fc1.weight[3, 4] = float("nan")
    with pytest.raises(SnpError, match=r"model.decoder.layers.1.fc1.weight: weights hold NaN or Inf"):
        prune(dense, tokenizer, small_recipe())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_overflowing_activations_name_the_block(allocation, tokenizer):
    dense = small_opt(torch.float16)
    dense.model.decoder.layers[1].fc1.weight[:, :4] = 6e4
    with pytest.raises(SnpError, match=r"block 1\b.*NaN or Inf.*--dtype float32"):
        prune(dense, tokenizer, small_recipe(allocation=allocation))


def test_windows_longer_than_the_positions_are_refused():
    with pytest.raises(SnpError, match="--seq-len: expected at most the model's 64 positions, got 65"):
        resolve(small_recipe(seq_len=65), small_opt())
    assert resolve(small_recipe(seq_len=None), small_opt()).seq_len == 64
    long = small_opt(max_position_embeddings=4096)
    assert resolve(small_recipe(seq_len=None), long).seq_len == 2048


def test_a_resolved_recipe_has_the_same_settings_and_nothing_of_the_model_left_open():
    recipe, model = small_recipe(seq_len=None, calibration=None, round_to=None), small_opt()
    resolved = resolve(recipe, model)
    open_ones = {"seq_len": 64, "calibration": "wikitext2", "eval_dataset": "wikitext2", "round_to": 8}
    assert resolved.as_dict() == {**recipe.as_dict(), **open_ones, "sparsity": resolved.sparsity}
    assert list(resolved.as_dict()) == list(recipe.as_dict()) and resolve(resolved, model) == resolved


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = small_opt(vocab_size=100)
    with pytest.raises(SnpError, match="the model embeds ids below 100"):
        read_calibration(tokenizer, resolve(small_recipe(), model), model)


def test_a_target_below_the_minimum_is_refused(tokenizer):
    for allocation in ("uniform", "variance", "loss"):
        with pytest.raises(SnpError, match="--sparsity: expected at most 0.812, .* got 0.95"):
            prune(small_opt(), tokenizer, small_recipe(sparsity=0.95, allocation=allocation))


def test_random_tokens_calibrate_too(tokenizer):
    pruned = prune(small_opt(), tokenizer, replace(small_recipe(), calibration="random"))
    assert pruned.calibration.description.startswith("uniformly random token ids, 6 windows of 32")
    assert torch.isfinite(pruned.model(TOKENS).logits).all()


def test_rank_deficient_statistics_escalate_dampening_and_say_so(tokenizer, caplog):
    # 32 tokens for 64 channels and no dampening: the Gram matrix is singular.
    recipe = small_recipe(num_samples=1, dampening=0.0, allocation="uniform")
    pruned = prune(small_opt(), tokenizer, recipe)
    raised = [r for r in pruned.sites if r.dampening > 0]
    assert raised and any("dampening raised from 0 to" in message for message in caplog.messages)
    assert torch.isfinite(pruned.model(TOKENS).logits).all()
