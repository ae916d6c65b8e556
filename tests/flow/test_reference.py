"""What sites are repaired to give: the definitions, replayed from the activations of whole models."""

import copy

import pytest
import torch

from benchmarks.peers.common import names_of
from snp_llm import prune
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import capture_calls, input_of, output_of, run_block
from snp_llm.models.projections import projection, weight_of
from tests.conftest import small_model, small_recipe
from tests.families import IN_FLOAT32, MORE, every_family

CUTS = {"ffn_sparsity": 0.3, "head_sparsity": 0.3, "round_to": 4, "num_samples": 12, "dampening": 1e-9}
# What their sites put out goes through a norm before it is added, or the sum does.
NORMALISED = (
    *("gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "olmo2", "beam", "exaone4", "glm4", "hyperclovax"),
    *("olmo3", "openai-gpt"),
    "gpt_neox_japanese",  # its last block adds a bias of its own, which its FFN is taken to put out as well
)
UNLIKE = ("gemma3_text", "olmo2", "gpt_neox_japanese")  # one of each kind of them
STUCK = ("bloom", "mpt")  # all their heads stay


def with_ones(X, projection):
    return X if projection.bias is None else torch.cat([X, torch.ones(len(X), 1, dtype=X.dtype)], 1)


def flat(x):
    return x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize(
    ("reference", "referred"),
    [
        *(("residual", 9), ("dense", 12)),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("residual", 12), ("dense", 9))),
    ],
)
@every_family(*NORMALISED, *STUCK, *MORE, *IN_FLOAT32)
def test_every_site_is_the_least_squares_solution(model_type, reference, referred, tokenizer, monkeypatch):
    """At each site lstsq on what really arrives there, for a reference taken from the dense model's own stream.

    Where some windows have no reference, what the output lacks of it is fitted on the others, and the cut on all.
    """
    monkeypatch.setattr("snp_llm.pruning.reference.enough_windows", lambda _widest, _seq_len: referred)
    dense = small_model(model_type)
    pruned = prune(dense, tokenizer, small_recipe(**CUTS, reference=reference, reference_weight=1.0))
    names = names_of(find_blocks(dense)[0])
    dense_blocks, blocks = find_blocks(dense), find_blocks(pruned.model)
    hidden, calls = capture_calls(dense, dense_blocks, pruned.calibration.tokens)
    stream = hidden
    for index, (before, after) in enumerate(zip(dense_blocks, blocks, strict=True)):
        scale = getattr(before, "residual_multiplier", 1.0)
        wanted = {}
        for path in (names.attention_out, names.ffn_out):
            wanted[path] = output_of(projection(before, path), before, stream, calls[index]).reshape(hidden.shape)
        half = copy.deepcopy(before)  # attention pruned, FFN still dense
        half.set_submodule(names.attention, copy.deepcopy(after.get_submodule(names.attention)))
        for path, full in ((names.attention_out, before), (names.ffn_out, half)):
            channels = result_channels(pruned, index, path)
            inputs = input_of(projection(full, path), full, hidden, calls[index])
            X = flat(inputs)[:, channels]
            old = projection(full, path)
            own = flat(inputs) @ weight_of(old).T + (0 if old.bias is None else old.bias)
            goal = wanted[path]
            if reference == "residual":
                goal = goal + (stream - hidden) / scale
                if path == names.ffn_out:
                    attended = output_of(projection(half, names.attention_out), half, hidden, calls[index])
                    goal = goal + wanted[names.attention_out] - attended.reshape(hidden.shape)
            new = projection(after, path)
            A = with_ones(X, new)
            some = slice(referred * hidden.shape[1])
            fit = torch.linalg.lstsq(A, own, driver="gelsd").solution
            fit += torch.linalg.lstsq(A[some], (flat(goal) - own)[some], driver="gelsd").solution
            expected = A @ fit
            got = X @ weight_of(new).T + (0 if new.bias is None else new.bias)
            # As a whole: norms inside compute in float32, and some of these random sites are nearly singular.
            assert float((got - expected).norm()) < 1e-4 * float(expected.norm())
        hidden = run_block(after, hidden, calls[index])
        stream = run_block(before, stream, calls[index])


def result_channels(pruned, block, path):
    result = next(r for r in pruned.sites if r.site.block == block and r.site.path == path)
    size = result.site.unit_size
    return torch.cat([torch.arange(u * size, (u + 1) * size) for u in result.kept.tolist()])


@pytest.mark.parametrize(
    "model_type",
    [t if t in UNLIKE else pytest.param(t, marks=pytest.mark.exhaustive) for t in NORMALISED],
)
def test_blocks_that_normalise_their_outputs_get_the_dense_reference_instead(model_type, tokenizer, caplog):
    cuts = {**CUTS, **({"head_sparsity": 0.0} if model_type in ("olmo2", "olmo3") else {})}
    one, other = (
        prune(small_model(model_type), tokenizer, small_recipe(**cuts, reference=t)) for t in ("residual", "dense")
    )
    assert sum("reference residual: blocks of this model normalise" in m for m in caplog.messages) == 1
    tokens = one.calibration.tokens[:1]
    if model_type != "gpt_neox_japanese":  # whose last block alone is another
        assert torch.equal(one.model(tokens).logits, other.model(tokens).logits)


def test_no_share_of_the_reference_is_the_reference_self(tokenizer):
    nothing, itself = (
        prune(small_model("llama"), tokenizer, small_recipe(**CUTS, **settings))
        for settings in ({"reference": "residual", "reference_weight": 0.0}, {"reference": "self"})
    )
    tokens = nothing.calibration.tokens[:1]
    torch.testing.assert_close(nothing.model(tokens).logits, itself.model(tokens).logits, rtol=1e-9, atol=1e-9)
    assert all(r.reference_weight == 0 for r in nothing.sites)


def test_shares_and_dampening_are_chosen_and_reported(tokenizer):
    pruned = prune(small_model("llama"), tokenizer, small_recipe(ffn_sparsity=0.4, head_sparsity=0.3, num_samples=16))
    assert any(0 < r.reference_weight < 1 for r in pruned.sites)
    assert len({r.dampening for r in pruned.sites}) > 1


def test_the_held_out_choice_is_better_on_unseen_text_than_the_extremes(tokenizer):
    """On a model with few tokens for its channels: neither none nor all of the drift, and not the least dampening."""
    dense = small_model("llama")
    unseen = torch.randint(3, 2048, (16, 32), generator=torch.Generator().manual_seed(7))
    logits = dense(unseen).logits

    def error(**settings):
        fixed = {"allocation": "uniform", "ordering": "variance", "calibration": "random", "num_samples": 4}
        recipe = small_recipe(sparsity=0.3, round_to=4, **fixed, **settings)
        return float((prune(dense, tokenizer, recipe).model(unseen).logits - logits).square().mean())

    assert error() < error(dampening=0.0, reference_weight=1.0)


def test_one_window_leaves_nothing_to_hold_out(tokenizer):
    pruned = prune(small_model("llama"), tokenizer, small_recipe(sparsity=0.3, num_samples=1, round_to=4))
    assert all(r.reference_weight == 0 for r in pruned.sites)


@pytest.mark.parametrize("reference", ["dense", "residual"])
def test_attention_that_stays_whole_before_the_first_cut_stays_to_the_bit(reference, tokenizer):
    """Its inputs are the dense model's own, so that there is nothing for it to make good."""
    dense = small_model("opt")
    pruned = prune(dense, tokenizer, small_recipe(ffn_sparsity=0.4, head_sparsity=0.0, reference=reference, round_to=4))
    names = names_of(find_blocks(dense)[0])
    before, after = (find_blocks(model) for model in (dense, pruned.model))
    attention = [projection(block, names.attention_out) for block in (before[0], after[0])]
    assert torch.equal(attention[0].weight, attention[1].weight) and torch.equal(attention[0].bias, attention[1].bias)
    assert pruned.sites[0].reference_weight == 0 and pruned.sites[1].kept.numel() < pruned.sites[1].site.units
    if reference == "residual":  # later ones have something to make good
        assert any(result.reference_weight > 0 for result in pruned.sites[2::2])


def test_a_model_to_be_trained_is_pruned_like_any_other(tokenizer):
    trainable, frozen = (small_model("opt").requires_grad_(flag) for flag in (True, False))
    recipe = small_recipe(sparsity=0.3, round_to=4)
    one, other = (prune(model, tokenizer, recipe) for model in (trainable, frozen))
    tokens = one.calibration.tokens[:1]
    assert torch.equal(one.model(tokens).logits, other.model(tokens).logits)
    assert all(p.requires_grad for p in trainable.parameters())
