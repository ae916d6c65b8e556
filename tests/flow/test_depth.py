"""Whole blocks that go: which ones, what is left, and what the config then says of it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from snp_llm import checkpoint, prune
from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.evaluate.prefill import prefill_times
from snp_llm.linalg.allocation import SiteBudget, loss
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.depth import shortened, shortened_config, with_depth
from snp_llm.models.layouts import assemble
from snp_llm.models.logits import logits_block_by_block
from snp_llm.models.outline import block_widths
from snp_llm.models.site import consumers_of, site_bias, site_weight
from snp_llm.models.size import linear_weights, model_size
from snp_llm.models.staying import has_more, what_stays
from snp_llm.models.surgery import NoBlock, prune_site
from snp_llm.pruning.run import resolve
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.trial_cut import try_dropped
from snp_llm.pruning.widths.costs import budget_costs, sparsity_costs
from snp_llm.pruning.widths.depth import block_costs, depth_plan, lost_with
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_model, small_recipe
from tests.differing import differing_model
from tests.families import FAMILY_CONFIGS

PLAIN = {"depth": "only", "layout": "uniform"}  # whole blocks, and nothing else
TOKENS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
# Types whose configs say things block by block.
LISTED = ["gemma3_text", "qwen3_moe", "gpt_oss", "llama4_text", "lfm2", "qwen3_5_text"]

NONE = {"conv", "linear_attention"}


def any_model(model_type: str):
    try:
        return small_model(model_type)
    except KeyError:
        return differing_model(model_type)


@pytest.mark.parametrize("model_type", ["opt", "llama", "gpt2", *LISTED])
def test_a_shorter_model_is_the_dense_one_without_these_blocks(model_type):
    model = any_model(model_type)
    blocks = find_blocks(model)
    for gone in range(len(blocks)):
        left = nn.ModuleList(NoBlock() if index == gone else block for index, block in enumerate(blocks))
        types = getattr(model.config, "layer_types", None) or ["full_attention"] * len(blocks)
        if {*types[:gone], *types[gone + 1 :]} <= NONE:
            continue  # transformers has no cache for a model without any attention
        wanted = logits_block_by_block(model, TOKENS, left)
        short = assemble(model, find_anatomy(model).family, left)
        assert len(find_blocks(short)) == len(blocks) - 1 and not short.config.model_type.startswith("snp_")
        with torch.no_grad():
            torch.testing.assert_close(short(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert len(find_blocks(model)) == len(blocks) == model.config.get_text_config().num_hidden_layers


def test_what_a_config_lists_block_by_block_is_cut_and_numbers_of_blocks_are_counted_anew():
    config = small_model("llama").config
    config.layer_types, config.mlp_only_layers = ["a", "b", "c", "d"], [1, 3]
    config.first_k_dense_replace, config.eos_token_id = 2, [1, 2, 3, 4]
    new = shortened_config(config, 4, [0, 2, 3])
    assert (new.layer_types, new.mlp_only_layers, new.first_k_dense_replace) == (["a", "c", "d"], [2], 1)
    assert new.num_hidden_layers == 3 and new.eos_token_id == [1, 2, 3, 4] and len(config.layer_types) == 4


def test_a_model_pruned_in_width_before_loses_blocks_with_their_own_widths(tokenizer):
    narrow = prune(small_model("llama"), tokenizer, small_recipe(sparsity=0.3)).model
    last = len(find_blocks(narrow)) - 1
    short = shortened(narrow, [last])
    assert short.config.pruned_layers == {"0": narrow.config.pruned_layers[str(last)]}
    assert [part["of"] for part in short.config.pruned_structure["parts"]] == [[0]]
    widths = [find_anatomy(m).sites_of(0 if m is short else last) for m in (short, narrow)]
    assert [s.units for s in widths[0]] == [s.units for s in widths[1]]
    recipe = resolve(small_recipe(sparsity=0.5, depth="only"), narrow, tokenizer)
    anatomy = with_depth(find_anatomy(narrow), "only", "compact")
    assert recipe.layout == "compact" and any(site.droppable and not site.whole_block for site in anatomy.sites)
    again = prune(narrow, tokenizer, small_recipe(sparsity=0.5, depth="only"))
    left = [len(r.kept) for r in again.sites if not r.site.whole_block]
    assert again.model.config.model_type == "snp_llama"  # also where no FFN is left
    assert 0 in left and {*left} <= {0, *(r.site.units for r in again.sites)}


@pytest.mark.parametrize("kind", ["params", "size", "flops"])
def test_what_a_block_costs_is_what_a_model_without_it_saves(kind, tokenizer):
    model = small_model("llama")
    recipe = resolve(small_recipe(depth="only", **{f"target_{kind}": "0.7x"}), model, tokenizer)
    anatomy = with_depth(find_anatomy(model), "only", "uniform")
    each = block_costs(anatomy.sites, budget_costs(anatomy, recipe.budget, recipe))
    left = nn.ModuleList([NoBlock(), *find_blocks(model)[1:]])
    short = assemble(model, anatomy.family, left)
    field = {"params": "parameters", "size": "bytes", "flops": "flops"}[kind]
    before, after = (getattr(model_size(m, recipe.seq_len), field) for m in (model, short))
    assert each[0] == pytest.approx(before - after)
    shares = block_costs(anatomy.sites, sparsity_costs(anatomy.sites, model_size(model, 32).block_linear))
    assert shares == [linear_weights(block) for block in anatomy.blocks]


@pytest.mark.parametrize("kind", ["params", "size", "flops"])
@pytest.mark.parametrize("model_type", ["opt", "gemma", "deepseek_v3"])  # biases; keys of no unit; a latent vector
def test_what_an_attention_or_an_ffn_costs_is_what_a_model_without_it_saves(model_type, kind, tokenizer):
    model = any_model(model_type)
    recipe = resolve(small_recipe(depth="only", **{f"target_{kind}": "0.7x"}), model, tokenizer)
    anatomy = with_depth(find_anatomy(model), "only", "compact")
    costs, field = (
        budget_costs(anatomy, recipe.budget, recipe),
        {"params": "parameters", "size": "bytes"}.get(kind, kind),
    )
    for number, site in enumerate(anatomy.sites):
        if site.whole_block or not site.droppable:
            continue
        blocks = [*find_blocks(model)]
        blocks[site.block] = without(model, site)[0]
        short = assemble(model, anatomy.family, nn.ModuleList(blocks))
        saved = [getattr(model_size(m, recipe.seq_len), field) for m in (model, short)]
        assert float(costs.sites[number][-1] - costs.sites[number][0]) == pytest.approx(saved[0] - saved[1])
        shares = sparsity_costs(anatomy.sites, model_size(model, 32).block_linear).sites[number]
        linear = [model_size(m, 32).block_linear for m in (model, short)]
        assert float(shares[-1] - shares[0]) == linear[0] - linear[1]


def test_blocks_and_widths_together_are_predicted_to_cost_least(tokenizer):
    """One block costs little, the others much: no other, with widths for the rest, is predicted to do better."""
    model = small_model("llama", num_hidden_layers=4)
    anatomy = with_depth(find_anatomy(model), "auto", "uniform")
    torch.manual_seed(1)
    alone = [torch.rand(s.units).double().cumsum(0).flip(0) + 9 * s.whole_block for s in anatomy.sites]
    alone[0] = torch.tensor([0.01])
    curves = [SiteCurves(None, torch.cat([c, torch.zeros(1)]), None, None, lambda: None) for c in alone]
    costs = sparsity_costs(anatomy.sites, model_size(model, 32).block_linear)
    recipe = resolve(small_recipe(sparsity=0.4, depth="auto"), model, tokenizer)

    def rest(left, curves, costs, amount):
        budgets = [
            SiteBudget(s.kind, s.units, c, 1, 1, loss=f.loss)
            for s, c, f in zip(left.sites, costs.sites, curves, strict=True)
        ]
        return loss(budgets, 1 - amount / sum(float(c[-1]) for c in costs.sites))

    widths = depth_plan(anatomy, curves, costs, 0.4 * costs.dense, recipe, rest)
    assert {s.block for s, w in zip(anatomy.sites, widths, strict=True) if not w} == {0}
    removed = sum(float(c[-1] - c[w]) for c, w in zip(costs.sites, widths, strict=True))
    assert abs(removed - 0.4 * costs.dense) < 0.04 * costs.dense
    found, each = sum(lost_with(anatomy.sites, curves, widths)), block_costs(anatomy.sites, costs)
    for gone in [(), (0,), (1,), (2,), (3,)]:
        inside = [i for i, s in enumerate(anatomy.sites) if not s.whole_block and s.block not in gone]
        left, some = replace(anatomy, sites=tuple(anatomy.sites[i] for i in inside)), [curves[i] for i in inside]
        amount = 0.4 * costs.dense - sum(each[block] for block in gone)
        got = rest(left, some, replace(costs, sites=[costs.sites[i] for i in inside]), amount)
        lost = sum(float(curve.loss[w]) for curve, w in zip(some, got, strict=True))
        whole = [c for s, c in zip(anatomy.sites, curves, strict=True) if s.block in gone and s.whole_block]
        lost += sum(float(curve.loss[0]) for curve in whole)
        assert found <= lost + 1e-9


def test_blocks_alone_go_and_what_stays_is_repaired(tokenizer, tmp_path):
    model = small_model("llama", torch.float32)
    before = copy.deepcopy(model.state_dict())
    pruned = prune(model, tokenizer, small_recipe(sparsity=0.34, **PLAIN, num_samples=24, measured_cuts=0))
    assert len(pruned.gone) == 1 and not pruned.model.config.model_type.startswith("snp_")
    assert all(len(r.kept) == r.site.units for r in pruned.sites if r.site.block not in pruned.gone)
    assert all(not len(r.kept) for r in pruned.sites if r.site.block in pruned.gone)
    changed = [r for r in pruned.sites if r.reference_weight > 0]
    assert changed and all(r.site.block > pruned.gone[0] for r in changed)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(min(seconds) > 0 for seconds in prefill_times([model, pruned.model], TOKENS, turns=1))
    pruned.save(tmp_path / "out")
    assert (tmp_path / "out" / "report.html").exists()
    again = prune(checkpoint.load(str(tmp_path / "out"), "auto")[0], tokenizer, small_recipe(sparsity=0.3))
    assert len(find_blocks(again.model)) == len(find_blocks(model)) - 1
    text = pruned.model.generate(TOKENS[:, :8], max_new_tokens=6, use_cache=True, do_sample=False)
    assert torch.equal(text, pruned.model.generate(TOKENS[:, :8], max_new_tokens=6, use_cache=False, do_sample=False))


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/short", trust_remote_code=True).eval()
torch.save(model(torch.load(sys.argv[1] + "/tokens.pt")).logits.detach(), sys.argv[1] + "/logits.pt")
assert "snp_llm" not in sys.modules
"""


def without(model, site):
    """A copy of a block in which one site is gone, unrepaired, and one in which what it puts out is zero."""
    gone, silent = (copy.deepcopy(find_blocks(model)[site.block]) for _ in range(2))
    for consumer in consumers_of(silent, site):
        consumer.weight.data.zero_()
    prune_site(gone, site, torch.arange(0), site_weight(gone, site)[:, :0], site_bias(gone, site))
    return gone, silent


EVERY = [pytest.param(t, marks=[] if t in ("opt", "llama", "gpt2") else pytest.mark.exhaustive) for t in FAMILY_CONFIGS]


@pytest.mark.parametrize("model_type", EVERY)
def test_attentions_and_ffns_go_as_a_whole(model_type, tokenizer, alone, tmp_path):
    """The model says what it does where they add nothing: in its own process and another, with a cache and without."""
    model = small_model(model_type, torch.float32)
    anatomy = with_depth(find_anatomy(model), "auto", "compact")
    anatomy = try_dropped(anatomy, TOKENS)
    blocks, silent = [*find_blocks(model)], [*find_blocks(model)]
    chosen = [site for site in anatomy.sites if not site.whole_block and site.droppable]
    if not chosen:
        pytest.skip("what stands in their place is not what its blocks take")
    for index, kind in enumerate(("attention", "ffn")):
        for site in (s for s in chosen if s.block == index and s.kind == kind):
            blocks[index], silent[index] = without(model, site)
    short = assemble(model, anatomy.family, nn.ModuleList(blocks))
    wanted = logits_block_by_block(model, TOKENS, nn.ModuleList(silent))
    with torch.no_grad():
        torch.testing.assert_close(short(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert [block_widths(b)[:2] for b in find_blocks(short)] == [block_widths(b)[:2] for b in blocks]
    checkpoint.save(short, tokenizer, tmp_path / "short")
    text = short.generate(TOKENS[:, :8], max_new_tokens=6, use_cache=False, do_sample=False)
    assert torch.equal(text, short.generate(TOKENS[:, :8], max_new_tokens=6, use_cache=True, do_sample=False))
    torch.save(TOKENS, tmp_path / "tokens.pt")
    run = alone(RELOAD, tmp_path)
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), short(TOKENS).logits)
    load_skeleton(str(tmp_path / "short"))
    again = find_anatomy(checkpoint.load(str(tmp_path / "short"), "auto")[0])
    assert len(again.sites) < sum(not site.whole_block for site in anatomy.sites)
    assert what_stays(again) == what_stays(find_anatomy(model))  # of what has gone nothing is left to stay
    for site in (s for s in chosen if s.block == ("attention", "ffn").index(s.kind)):
        bias = any(getattr(module, "bias", None) is not None for module in consumers_of(blocks[site.block], site))
        assert has_more(again, site.block) == (bias or has_more(find_anatomy(model), site.block))


@pytest.mark.parametrize("score", ["influence", "angular"])
def test_other_scores_take_the_blocks_that_turn_the_stream_least(score, tokenizer):
    model = small_model("llama", torch.float32, num_hidden_layers=5)
    for number, block in enumerate(find_blocks(model)):  # first a little, then more, least in the middle
        for parameter in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            parameter.data *= (4.0, 0.9, 1.0, 0.2, 3.0)[number]
    pruned = prune(model, tokenizer, small_recipe(sparsity=0.4, depth="only", depth_score=score, num_samples=4))
    seen = []  # before every block and behind the last, whose norm transformers has applied to what it returns
    hooks = [block.register_forward_hook(lambda _m, a, o: seen.append((a[0], o))) for block in find_blocks(model)]
    with torch.no_grad():
        model(pruned.calibration.tokens)
    [hook.remove() for hook in hooks]
    if score == "influence":
        turned = [1 - torch.cosine_similarity(x, y, dim=-1).mean() for x, y in seen]
        expected = sorted(range(5), key=lambda i: turned[i])[:2]
    else:
        turned = [torch.cosine_similarity(seen[i][0][:, -1], seen[i + 1][1][:, -1]).acos().mean() for i in range(4)]
        first = min(range(4), key=lambda i: turned[i])
        expected = [first, first + 1]
    assert pruned.gone == sorted(expected)


def test_no_sparsity_leaves_every_block_as_it_is(tokenizer):
    model = small_model("opt")
    for depth in ("auto", "only"):
        pruned = prune(model, tokenizer, small_recipe(sparsity=0.0, depth=depth))
        assert not pruned.gone
        for name, tensor in pruned.model.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ffn_sparsity": 0.5}, "expected one budget for blocks and what is in them"),
        ({"allocation": "uniform"}, "expected --allocation loss"),
        ({"layout": "padded"}, "a block of zeros is still a block"),
        ({"depth": "auto", "depth_score": "angular"}, "expected together with --depth only"),
    ],
)
def test_settings_that_leave_no_choice_are_refused(settings, said):
    with pytest.raises(SnpError, match=said):
        small_recipe(**{"depth": "only", **settings})


def test_what_whole_blocks_come_to_is_said_once(tokenizer, caplog):
    for settings in (PLAIN, {"depth": "auto"}):
        caplog.clear()
        prune(small_model("opt"), tokenizer, small_recipe(sparsity=0.4, **settings, refine="none"))
        said = [message for message in caplog.messages if "were to go" in message]
        assert len(said) == (settings is PLAIN)  # widths make up for the rest


def test_one_block_stays(tokenizer):
    with pytest.raises(SnpError, match="expected a budget that leaves one block"):
        prune(small_model("opt"), tokenizer, small_recipe(sparsity=0.99, depth="only"))


def test_the_cheapest_block_stays_where_a_target_wants_all_others():
    model = small_model("llama", num_hidden_layers=3)
    anatomy = with_depth(find_anatomy(model), "only", "uniform")
    scale = [1.0, 4.0, 9.0]  # the last block, which loses most for what it saves, costs most as well
    costs = sparsity_costs(anatomy.sites, model_size(model, 32).block_linear)
    costs = replace(costs, sites=[c * scale[s.block] for s, c in zip(anatomy.sites, costs.sites, strict=True)])
    lost = [
        torch.tensor([scale[s.block] ** 2, 0.0]) if s.whole_block else torch.zeros(s.units + 1) for s in anatomy.sites
    ]
    curves = [SiteCurves(None, loss.double(), None, None, lambda: None) for loss in lost]
    each = block_costs(anatomy.sites, costs)
    recipe = resolve(small_recipe(depth="only", layout="uniform", target_params="0.5x"), model)
    for amount, stay in ((each[0] + each[1], {2}), (each[1] + each[2], {0})):
        widths = depth_plan(anatomy, curves, costs, amount, recipe, lambda *_given: [])
        assert {s.block for s, width in zip(anatomy.sites, widths, strict=True) if width} == stay


@pytest.mark.parametrize("settings", [{"sparsity": 0.1}, {"sparsity": 0.3, "depth": "only"}])
def test_a_model_that_lost_ffns_has_no_plain_config(settings, tokenizer):
    model = small_model("llama", num_hidden_layers=3)
    anatomy = with_depth(find_anatomy(model), "auto", "compact")
    lost = {s.block: without(model, s)[0] for s in anatomy.sites if s.kind == "ffn" and s.block}
    short = assemble(model, anatomy.family, nn.ModuleList([find_blocks(model)[0], *lost.values()]))
    with pytest.raises(
        SnpError, match="widths that one plain Llama config can hold in every block, got .* and 0.* FFN"
    ):
        prune(short, tokenizer, small_recipe(layout="uniform", measured_cuts=0, **settings))


def test_a_config_that_cannot_say_what_the_others_are_is_refused(tokenizer):
    model = small_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(SnpError, match="the config of a gpt2 cannot say what the others are"):
        prune(model, tokenizer, small_recipe(sparsity=0.5, **PLAIN))
