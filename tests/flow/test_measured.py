"""Measured cuts: divergences against whole models with one site cut, corrections against their definition."""

import copy
import math
import statistics

import pytest
import torch
from torch.nn import functional

from snp_llm import prune
from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.depth import with_depth
from snp_llm.models.site import site_bias
from snp_llm.models.surgery import NoBlock, prune_site
from snp_llm.pruning import measured
from snp_llm.pruning.curves import HELD_OUT_OF
from snp_llm.pruning.measured import measured_widths, measured_windows
from snp_llm.pruning.run import Run, resolve
from snp_llm.pruning.sensitivity import visit_dense
from snp_llm.runtime.device import Clock
from tests.conftest import small_model, small_recipe
from tests.differing import differing_model

TOKENS = torch.randint(3, 2048, (16, 24), generator=torch.Generator().manual_seed(0))


def visited(model, folder=None, **overrides):
    recipe = resolve(small_recipe(**overrides), model)
    anatomy = with_depth(find_anatomy(model), recipe.depth, recipe.layout)
    run = Run(recipe, Clock(torch.device("cpu")), Journal(folder))
    return anatomy, recipe, visit_dense(anatomy, TOKENS, run)


def without(model, site, width, cuts):
    """A copy of the model with one site cut as the visit has cut it."""
    other = copy.deepcopy(model)
    blocks = find_blocks(other)
    if site.whole_block:
        blocks[site.block] = NoBlock()
        return other
    name = f"{site.path} cut to {width}"
    units, weight, bias = (cuts.get(site.block, f"{name} {part}") for part in ("units", "weight", "bias"))
    prune_site(blocks[site.block], site, units, weight, site_bias(blocks[site.block], site) if bias is None else bias)
    return other


@pytest.mark.parametrize(("model_type", "depth"), [("opt", "never"), ("qwen3", "auto"), ("gpt_neox", "never")])
def test_divergences_are_those_of_whole_models_with_one_site_cut(model_type, depth, tmp_path):
    model = small_model(model_type)
    anatomy, recipe, curves = visited(model, tmp_path, measured_cuts=2, depth=depth)
    cuts, found = (Journal(tmp_path).phase(name) for name in ("curves", "measured"))
    tokens = measured_windows(TOKENS, one_of=HELD_OUT_OF)
    assert torch.equal(tokens, TOKENS[3::4])
    wanted = functional.log_softmax(model(tokens).logits.double(), -1)
    factors = []
    for site, curve in zip(anatomy.sites, curves, strict=True):
        rows = found.get(0, site.name)
        assert rows[:, 0].tolist() == measured_widths(site, recipe)
        for width, divergence in rows.tolist():
            logits = without(model, site, round(width), cuts)(tokens).logits.double()
            expected = functional.kl_div(functional.log_softmax(logits, -1), wanted, log_target=True, reduction="sum")
            assert divergence == pytest.approx(float(expected) / tokens.numel(), rel=1e-2, abs=2e-7)
            if not width:  # of a whole, or a block: what was measured is known
                assert float(curve.loss[0]) == pytest.approx(divergence, rel=1e-5)
                continue
            predicted = float(cuts.get(site.block, f"{site.path} loss")[round(width)])
            factors.append((divergence / predicted, float(curve.loss[round(width)]) / predicted))
    assert len(factors) >= sum(not site.whole_block for site in anatomy.sites)
    median = math.exp(statistics.median(math.log(factor) for factor, _ in factors))
    for factor, used in factors:
        assert used == pytest.approx(math.sqrt(median * min(10 * median, max(median / 10, factor))), rel=0.02)


def test_without_measured_cuts_losses_are_as_predicted():
    model = small_model("llama")
    predicted, tried = (visited(model, measured_cuts=count)[2] for count in (0, 1))
    ratios = [float(m.loss[0] / p.loss[0]) for p, m in zip(predicted, tried, strict=True)]
    assert len(set(ratios)) == len(ratios)
    for ratio, before, after in zip(ratios, predicted, tried, strict=True):
        torch.testing.assert_close(after.loss, ratio * before.loss, rtol=1e-5, atol=0)  # one cut, one factor


def test_factors_between_two_cuts_are_interpolated_and_those_far_off_held_back(monkeypatch):
    loss = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    rows = [
        torch.tensor([[1.0, 2.0], [3.0, 2.0]]),  # half of 4, twice 1: as much at both
        torch.tensor([[2.0, 2.0]]),  # as predicted
        torch.tensor([[2.0, 2e6]]),
        torch.tensor([[2.0, 0.0]]),  # nothing to go by
        None,
    ]
    median = math.sqrt(1.0 * 2.0)  # of 1/2, 1, 2 and a million, between the two in the middle in logarithms
    monkeypatch.setattr(measured, "TRUST", 1.0)
    between, same, far, nothing, none = measured.corrected([loss] * 5, rows)
    torch.testing.assert_close(between, torch.tensor([4.0, 2.0, 2.0, 2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(far, 10 * median * loss)
    torch.testing.assert_close(nothing, median * loss)
    torch.testing.assert_close(none, median * loss)
    assert torch.equal(measured.corrected([loss], [None])[0], loss)
    block = measured.corrected([loss[-2:], loss], [torch.tensor([[0.0, 2e6]]), rows[1]])
    torch.testing.assert_close(block, [torch.tensor([2e6, 0.0], dtype=torch.float64), loss])
    monkeypatch.setattr(measured, "TRUST", 0.5)
    half = measured.corrected([loss] * 5, rows)
    torch.testing.assert_close(half[1], math.sqrt(median) * loss)
    torch.testing.assert_close(half[2], math.sqrt(10) * median * loss)


def test_widths_are_whole_units_of_every_group_and_never_none_or_all():
    sites = find_anatomy(small_model("llama")).sites
    for count in range(9):
        recipe = small_recipe(measured_cuts=count)
        for site in sites:
            widths = measured_widths(site, recipe)
            assert len(widths) <= count and sorted(set(widths)) == widths
            assert all(0 < width < site.units and width % site.step == 0 for width in widths)


def test_experts_are_not_compared_with_sites_that_were_measured(tokenizer):
    dense = differing_model("mixtral")
    one, other = (
        prune(dense, tokenizer, small_recipe(experts="channels", measured_cuts=count, sparsity=0.4)) for count in (0, 1)
    )
    assert [r.predicted_loss for r in one.sites] == [r.predicted_loss for r in other.sites]
