import math

import pytest
import torch
from torch.nn import functional

from snp_llm import perplexity, prune
from snp_llm.evaluate.prefill import prefill_times
from snp_llm.models.size import model_size
from snp_llm.runtime.errors import SnpError
from tests.conftest import OPT_VARIANTS, small_opt, small_recipe

WINDOWS = torch.randint(2048, (5, 16), generator=torch.Generator().manual_seed(1))


def test_perplexity_is_the_mean_over_tokens_two_to_the_last():
    model = small_opt(torch.float64)
    total = 0.0
    for window in WINDOWS:
        logits = model(window[None]).logits[0].float()
        total += sum(functional.cross_entropy(logits[t], window[t + 1]).item() for t in range(15))
    assert perplexity(model, WINDOWS, batch_size=2) == pytest.approx(math.exp(total / (5 * 15)), rel=1e-6)
    assert perplexity(model, WINDOWS, batch_size=5) == pytest.approx(perplexity(model, WINDOWS, batch_size=1), rel=1e-6)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    model = small_opt(tie_word_embeddings=False)
    model.lm_head.weight.zero_()
    assert perplexity(model, WINDOWS) == pytest.approx(2048, rel=1e-5)


def test_perplexity_that_is_not_finite_is_refused():
    model = small_opt()
    model.model.decoder.final_layer_norm.weight.fill_(float("nan"))
    with pytest.raises(SnpError, match="expected a finite log-likelihood, got nan"):
        perplexity(model, WINDOWS)


@pytest.mark.parametrize("variant", OPT_VARIANTS)
def test_sizes_of_a_model(variant, tokenizer):
    model = small_opt(torch.float16, **OPT_VARIANTS[variant])
    size = model_size(model, 16)
    assert size.parameters == model.num_parameters()
    assert size.bytes == 2 * size.parameters
    assert size.block_linear == 3 * (4 * 32 * 32 + 2 * 32 * 64)
    projections = 2 * 24 * 32 if variant == "350m" else 0
    head = 2048 * (24 if variant == "350m" else 32)
    assert size.flops == 2 * (size.block_linear + projections + head) + 4 * 3 * 32 * 17 / 2


def test_sizes_shrink_with_what_was_removed(tokenizer):
    dense = small_opt()
    recipe = small_recipe(ffn_sparsity=0.5, head_sparsity=0.25, allocation="uniform")
    before, after = model_size(dense, 16), model_size(prune(dense, tokenizer, recipe).model, 16)
    removed = 3 * (2 * 32 * 32 + 4 * 32 * 8)
    biases = 3 * (32 + 3 * 8)
    assert before.block_linear - after.block_linear == removed
    assert before.parameters - after.parameters == removed + biases
    assert before.flops - after.flops == 2 * removed + 4 * 3 * 8 * 17 / 2


def test_times_of_several_models_in_turn():
    told = []
    times = prefill_times([small_opt(), small_opt()], WINDOWS, turns=2, on_share=told.append)
    assert [len(of_one) for of_one in times] == [2, 2] and all(seconds > 0 for of_one in times for seconds in of_one)
    assert told == sorted(told) and 0 < told[-1] < 1
