"""Refinement of blocks: what it promises, replayed from the activations of whole models."""

from dataclasses import replace

import pytest
import torch

from snp_llm import SnpError, prune
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import capture_calls, run_block
from snp_llm.pruning import refine, run
from snp_llm.pruning.estimate import estimate
from snp_llm.pruning.statistics import held_out
from tests.conftest import small_model, small_recipe
from tests.differing import DIFFERING, differing_model
from tests.families import every_family

CUTS = {"sparsity": 0.4, "round_to": 4, "num_samples": 64, "allocation": "uniform", "metric": "error"}


def behind_first_block(model, tokens):
    hidden, calls = capture_calls(model, find_blocks(model), tokens)
    return run_block(find_blocks(model)[0], hidden, calls[0])


@pytest.mark.parametrize("reference", ["residual", "self"])
@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_a_block_errs_less_on_windows_that_no_step_saw(model_type, reference, tokenizer):
    """Of the first block, whose input nothing has spoilt, the error is that of a forward pass, as it is reported."""
    dense = small_model(model_type)
    cut, refined = (
        prune(dense, tokenizer, small_recipe(**CUTS, reference=reference, refine=steps)) for steps in ("none", 60)
    )
    held = refined.calibration.tokens[held_out(64)]
    wanted = behind_first_block(dense, held)

    def error(model):
        lost = (behind_first_block(model, held) - wanted).square().sum(-1) / wanted.square().sum(-1)
        return float(lost.mean())

    first = [result.refinement for result in refined.sites if result.site.block == 0]
    assert first[:-1] == [None] * (len(first) - 1)
    assert first[-1] == pytest.approx(error(refined.model) / error(cut.model), rel=1e-4)
    assert first[-1] < 0.98
    assert all(result.refinement is None for result in cut.sites)
    assert all(result.refinement is None or result.refinement <= 1 for result in refined.sites)


def test_steps_that_do_harm_are_not_kept(tokenizer, monkeypatch):
    monkeypatch.setattr(refine, "RATE", 10.0)
    dense = small_model("llama")
    cut, refined = (prune(dense, tokenizer, small_recipe(**CUTS, refine=steps)).model for steps in ("none", 4))
    for one, other in zip(cut.parameters(), refined.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("refinements", "stops"),
    [
        ([], False),
        ([0.999, 0.999, 0.999], False),
        ([0.999, None, 0.999, None, 0.999, 0.999], True),
        ([0.5, 0.999, 0.999, 1.0, 1.0], True),
        ([0.999, 0.999, 0.98, 0.999], False),
    ],
)
def test_blocks_that_gain_too_little_are_counted_in_a_row(refinements, stops):
    assert refine.gains_nothing(refinements) == stops


def test_refining_stops_where_it_does_not_pay(tokenizer, monkeypatch):
    """Blocks after that are what they are without it, but for what they see of the ones before."""
    monkeypatch.setattr(refine, "PATIENCE", 1)
    monkeypatch.setattr(refine, "WORTH", 1.1)  # more than there is: the first block counts as a failure
    refined = prune(small_model("opt"), tokenizer, small_recipe(**CUTS, refine=4))
    by_block = {}
    for result in refined.sites:
        by_block.setdefault(result.site.block, []).append(result.refinement is not None)
    assert [any(found) for found in by_block.values()] == [True] + [False] * (len(by_block) - 1)


def test_nothing_cut_is_nothing_refined(tokenizer):
    dense = small_model("opt", torch.float32)
    same = prune(dense, tokenizer, small_recipe(**{**CUTS, "sparsity": 0.0}, refine=3))
    for one, other in zip(dense.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_does_not_fit_is_taken_in_parts(tokenizer, monkeypatch):
    """As a device's memory runs out: with batches of one window the same model to rounding."""
    dense, whole = small_model("opt"), small_recipe(**CUTS, refine=4)
    expected = prune(dense, tokenizer, whole).model
    run_with = refine.run_with

    def small(block, weights, hidden, call):
        if len(hidden) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_with(block, weights, hidden, call)

    monkeypatch.setattr(refine, "run_with", small)
    for one, other in zip(expected.parameters(), prune(dense, tokenizer, whole).model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_no_memory_for_the_optimizer_is_said_with_what_helps(tokenizer, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.Adam, "step", full)
    with pytest.raises(
        SnpError, match=r"block 0: no memory left to refine it \(CUDA out of memory\). Use --refine none"
    ):
        prune(small_model("opt"), tokenizer, small_recipe(**CUTS, refine=4))


def test_half_precision_is_refined_in_float32(tokenizer):
    refined = prune(small_model("llama", torch.bfloat16), tokenizer, small_recipe(**CUTS, refine=20))
    assert {p.dtype for p in refined.model.parameters()} == {torch.bfloat16}
    assert min(result.refinement or 1 for result in refined.sites) < 1


def test_auto_takes_as_long_as_the_rest(monkeypatch):
    """By the estimate; nothing of experts, where it was not measured, unless it is asked for."""
    monkeypatch.setattr(estimate, "MOST_STEPS", 10**6)
    model = small_model("llama", torch.float32)
    resolved = run.resolve(small_recipe(refine="auto", num_samples=64), model)

    def work(steps):
        found = estimate.estimate(model, replace(resolved, refine=steps)).work
        return sum(w.flops / (estimate.ALGEBRA_SPEED if w.algebra else 1) for w in found)

    steps = estimate.decide(model, resolved).refine
    assert work(steps) <= (1 + estimate.STEPS_SPEED) * work("none") < work(steps + 1)
    experts = differing_model("mixtral")
    assert estimate.decide(experts, run.resolve(small_recipe(refine="auto"), experts)).refine == "none"


def assert_refined(model, tokenizer):
    """Every block took steps, and the model is whole."""
    result = prune(model, tokenizer, small_recipe(sparsity=0.2, refine=3, num_samples=16))
    assert sum(found.refinement is not None for found in result.sites) > 0
    assert all(torch.isfinite(parameter).all() for parameter in result.model.parameters())


@every_family(variants=True)
def test_blocks_of_every_family_take_steps(model_type, tokenizer):
    assert_refined(small_model(model_type, torch.float32), tokenizer)


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", DIFFERING)
def test_blocks_that_differ_take_steps(model_type, tokenizer):
    assert_refined(differing_model(model_type), tokenizer)


@pytest.mark.parametrize("steps", [0, "many", -1, 1.5])
def test_steps_are_a_number_or_a_word_that_is_known(steps):
    with pytest.raises(SnpError, match="--refine: expected"):
        small_recipe(refine=steps)
