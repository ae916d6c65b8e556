"""Experts that go while the others lose channels, in one run under one budget."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from snp_llm import SnpError, checkpoint, prune
from snp_llm.cli.inspect import inspect
from snp_llm.linalg.allocation import finest_step
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.experts import experts_module, find_experts
from snp_llm.models.size import model_size, stored_bytes
from snp_llm.pruning.experts import curves_of_those_left
from snp_llm.pruning.run import resolve
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.widths.costs import budget_costs, saved, sparsity_costs
from snp_llm.pruning.widths.depth import lost_with
from snp_llm.pruning.widths.paired import paired_budgets
from snp_llm.pruning.widths.plan import Removal, Removals, check_budget, plan_widths
from tests.conftest import small_recipe, zeroed
from tests.differing import differing_model
from tests.flow.test_experts import CLOSE, FEW, MORE, TOKENS, watch_router

REST = [name for name in (*FEW, *MORE) if name not in ("qwen3_moe", "jamba")]  # the last has no experts to spare
SOME = ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in REST)]


def both(model_type: str, tokenizer, **overrides):
    """A model with six experts a block, and what is left of it under one budget."""
    dense = differing_model(model_type, num_experts=6, num_local_experts=6, n_routed_experts=6, moe_num_experts=6)
    settings = {"sparsity": 0.4, "round_to": 4, "num_samples": 8, "experts": "both", **overrides}
    return dense, prune(dense, tokenizer, small_recipe(**settings))


def apart(pruned):
    """Results of the sites of whole experts, and of the channels of those that are left, block by block."""
    found = [result for result in pruned.sites if result.site.kind == "experts"]
    return [*zip(found[::2], found[1::2], strict=True)]


def masked(dense: PreTrainedModel, pruned) -> PreTrainedModel:
    """The dense model whose routers never choose the experts that have gone, the channels zeroed that the others have
    lost, with their repaired weights."""
    others = [result for result in pruned.sites if result.site.kind != "experts"]
    found = zeroed(dense, SimpleNamespace(sites=others, model=pruned.model))
    for gone, narrowed in apart(pruned):
        mixture, index = gone.site.mixture, gone.site.block
        block, small = (find_blocks(m)[index] for m in (found, pruned.model))
        large, values = (experts_module(b, mixture).down_proj.data for b in (block, small))
        for place, number in enumerate(gone.kept.tolist()):
            into, its = (t.T if mixture.transposed else t for t in (large[number], values[place]))
            into.zero_()[:, narrowed.kept[:, place]] = its
        watch_router(block.get_submodule(mixture.module.rpartition(".")[0]), mixture, gone.kept)
    return found


@pytest.mark.parametrize("layout", ["compact", "uniform"])
@pytest.mark.parametrize("model_type", SOME)
def test_some_go_and_the_others_lose_channels(model_type, layout, tokenizer, tmp_path):
    dense, pruned = both(model_type, tokenizer, layout=layout)
    torch.testing.assert_close(pruned.model(TOKENS).logits, masked(dense, pruned)(TOKENS).logits, **CLOSE)
    left = [find_experts(find_blocks(pruned.model)[gone.site.block]) for gone, _ in apart(pruned)]
    assert [(m.count, m.channels) for m in left] == [(len(a.kept), len(b.kept)) for a, b in apart(pruned)]
    assert any(len(r.kept) < r.site.units for pair in apart(pruned) for r in pair)
    sites, widths = zip(*((r.site, len(r.kept)) for r in pruned.sites), strict=True)
    sizes = [model_size(model, 32, "both").block_linear for model in (dense, pruned.model)]
    removed = sum(saved(sites, sparsity_costs(sites, sizes[0]).sites, widths))  # rows of some routers go as well
    assert sizes[0] - sizes[1] == pytest.approx(removed, rel=0.01)
    assert 0.37 < 1 - sizes[1] / sizes[0] < 0.5  # more, where that is predicted to lose less
    if layout == "uniform":
        assert pruned.model.config.model_type == model_type and len({(m.count, m.channels) for m in left}) == 1
    checkpoint.save(pruned.model, tokenizer, tmp_path)
    again = checkpoint.load(str(tmp_path), "auto")[0]
    torch.testing.assert_close(again(TOKENS).logits, pruned.model(TOKENS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", SOME)
def test_a_model_that_lost_both_is_an_input_like_any_other(model_type, tokenizer):
    dense, pruned = both(model_type, tokenizer)
    for model in (dense, pruned.model):
        same = prune(model, tokenizer, small_recipe(sparsity=0.0, experts="both", num_samples=2))
        assert torch.equal(same.model(TOKENS).logits, model(TOKENS).logits)
    twice = prune(pruned.model, tokenizer, small_recipe(sparsity=0.1, experts="both", round_to=4, num_samples=8))
    torch.testing.assert_close(twice.model(TOKENS).logits, masked(pruned.model, twice)(TOKENS).logits, **CLOSE)
    prompt, settings = TOKENS[:, :10], {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    written = [pruned.model.generate(prompt, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*written)


@pytest.mark.parametrize(
    ("model_type", "kind"), [("gpt_oss", "params"), ("qwen2_moe", "size"), ("llama4_text", "flops")]
)
def test_costs_are_those_of_the_model_that_is_left(model_type, kind, tokenizer):
    dense, pruned = both(model_type, tokenizer, sparsity=None, **{f"target_{kind}": "0.75x"})
    recipe, anatomy = pruned.recipe, find_anatomy(dense, experts="both")
    costs = budget_costs(anatomy, recipe.budget, recipe)
    field = {"params": "parameters", "size": "bytes", "flops": "flops"}[kind]
    sizes = [model_size(model, recipe.seq_len) for model in (dense, pruned.model)]
    beside = stored_bytes(dense) - sizes[0].bytes if kind == "size" else 0  # what files have beside the numbers
    found = getattr(sizes[1], field) + beside
    removed = sum(saved(anatomy.sites, costs.sites, [len(r.kept) for r in pruned.sites]))
    assert found == pytest.approx(costs.dense - removed) and found <= 0.75 * costs.dense


def random_curves(anatomy, seed: int) -> list[SiteCurves]:
    torch.manual_seed(seed)
    found = []
    for site in anatomy.sites:
        alone = torch.cat([torch.rand(site.units).double().sort().values.cumsum(0).flip(0), torch.zeros(1)])
        left = None
        if site.nested:
            each = torch.rand(site.mixture.count, 1).double() * alone
            left = curves_of_those_left(each, torch.rand(site.mixture.count).double() * 100)
        found.append(SiteCurves(None, alone, None, None, lambda: None, left=left))
    return found


@pytest.mark.parametrize("layout", ["compact", "uniform"])
@pytest.mark.parametrize("seed", range(3))
def test_no_other_numbers_are_predicted_to_do_better(seed, layout, tokenizer):
    """At what the least of loss and costs costs, by brute force over all experts and channels, nothing loses less."""
    dense = differing_model("qwen3_moe", mlp_only_layers=[0])
    anatomy = find_anatomy(dense, experts="both")
    recipe = resolve(
        small_recipe(ffn_sparsity=0.4, head_sparsity=0.0, experts="both", round_to=8, layout=layout), dense
    )
    curves, whole = random_curves(anatomy, seed), model_size(dense, 32, "both").block_linear
    costs = sparsity_costs(anatomy.sites, whole)
    choices = [
        [site.units] if site.mixture is None else [2, 3, 4] if site.whole else [8, 16, 24, 32] for site in anatomy.sites
    ]
    numbers = [i for i, site in enumerate(anatomy.sites) if site.mixture is not None]

    def facts(widths) -> tuple[float, float]:
        """What widths are predicted to lose, and what they save, in words of their own."""
        lost = spared = 0.0
        for i in numbers[::2]:
            (n, w), site = widths[i : i + 2], anatomy.sites[i]
            lost += float(curves[i].loss[n] + curves[i + 1].left[n, w])
            spared += site.parameters * (1 - n * w / (site.mixture.count * site.mixture.channels))
        return lost, spared

    all_of_them = [*itertools.product(*choices)]
    if layout == "uniform":
        all_of_them = [w for w in all_of_them if len({(w[i], w[i + 1]) for i in numbers[::2]}) == 1]
    budgets, _ = paired_budgets(anatomy, recipe, curves, costs.sites)
    slack = finest_step([budgets[i] for i in numbers]) * (1 if layout == "uniform" else 0.5)
    for price in (0.2, 0.5, 1.0, 2.0):
        each = price * sum(float(c.loss[0]) for c in curves) / whole
        best = min(all_of_them, key=lambda widths: facts(widths)[0] - each * facts(widths)[1])
        lost, spared = facts(best)
        removals = Removals(costs, [Removal(("ffn", "experts"), spared, whole)])
        widths = plan_widths(anatomy, curves, removals, recipe)
        found = [loss for i, loss in enumerate(lost_with(anatomy.sites, curves, widths)) if i in numbers]
        assert sum(found) == pytest.approx(facts(widths)[0])
        assert sum(found) <= lost + 1e-9 and facts(widths)[1] >= spared - slack * len(numbers)


def test_those_left_take_over_the_tokens_of_those_that_go():
    losses, tokens = torch.rand(5, 9, dtype=torch.float64), torch.tensor([7.0, 0, 3, 2, 8], dtype=torch.float64)
    found = curves_of_those_left(losses, tokens)
    assert torch.equal(found[0], torch.zeros(9))
    for left in range(1, 6):
        wanted = sum(losses[:left]) * 20 / sum(tokens[:left])
        torch.testing.assert_close(found[left], wanted)


@pytest.mark.parametrize("depth", ["never", "auto"])
def test_inspect_says_the_most_that_both_may_give(depth):
    dense = differing_model("qwen3_moe", mlp_only_layers=[])  # four experts of 32 channels, two for a token
    facts = inspect(dense, small_recipe(experts="both", depth=depth))
    assert facts["sparsity"]["largest"]["compact"]["ffn"] == pytest.approx(1 - 2 / 4 * 8 / 32)
    assert [facts["sites"][name]["unit"] for name in ("experts", "channels of experts")] == [
        "experts",
        "channels of every expert",
    ]
    assert facts["units"][0]["experts"] == 4 and facts["units"][0]["expert_channels"] == 32


def test_settings_that_leave_nothing_to_weigh_are_refused():
    with pytest.raises(SnpError, match="--experts both: expected --allocation loss, .*; got variance"):
        small_recipe(experts="both", allocation="variance")
    dense = differing_model("mixtral")
    with pytest.raises(SnpError, match="--experts both: expected layout compact or uniform, got padded"):
        check_budget(dense, resolve(small_recipe(experts="both", layout="padded"), dense))
    with pytest.raises(SnpError, match="expected at most 0.937, with which every unit is gone that may go"):
        check_budget(dense, resolve(small_recipe(ffn_sparsity=0.99, head_sparsity=0.0, experts="both"), dense))
