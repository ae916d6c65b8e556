"""Experts that lose channels, or go: whatever their layout, the others compute what they did."""

import copy
import json
import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from snp_llm import SnpError, checkpoint, prune
from snp_llm.checkpoint.skeleton import load_skeleton
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.experts import (
    activated,
    arrived,
    expert_of,
    experts_module,
    find_experts,
    put_together,
    watch_arrivals,
)
from snp_llm.models.size import model_size
from snp_llm.models.staying import what_stays
from snp_llm.pruning.run import resolve
from snp_llm.pruning.widths.plan import check_budget
from tests.alone import RELOAD
from tests.conftest import small_recipe, zeroed
from tests.differing import differing_model

TOKENS = torch.randint(3, 2048, (2, 24), generator=torch.Generator().manual_seed(0))
FEW = ("qwen3_moe", "gpt_oss", "llama4_text")  # in every run of the tests
MORE = (
    *("mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm4_moe", "minimax", "nemotron_h"),
    *("jamba", "qwen3_next", "kimi_linear", "afmoe", "mimo_v2_flash", "laguna", "flint", "beam", "axk1", "dots1"),
    *("granitemoe", "phimoe", "olmoe", "ernie4_5_moe"),
)
TYPES = [*FEW, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)]
# Types whose shared experts, or dense FFNs, are as wide as a config says that the others are.
NO_KEY = {
    *("llama4_text", "jamba", "dots1", "glm4_moe", "ernie4_5_moe", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    *("afmoe", "mimo_v2_flash", "axk1", "kimi_linear"),
}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def cut(model: PreTrainedModel, tokenizer, layout: str = "compact", **overrides):
    settings = {"ffn_sparsity": 0.3, "head_sparsity": 0.0, "round_to": 4, "num_samples": 4, "experts": "channels"}
    return prune(model, tokenizer, small_recipe(**{**settings, "layout": layout, **overrides}))


@cache
def cut_once(model_type: str, tokenizer):
    dense = differing_model(model_type)
    return dense, cut(dense, tokenizer, ffn_sparsity=None, head_sparsity=None, sparsity=0.25)


def masked(dense: PreTrainedModel, pruned) -> PreTrainedModel:
    """The dense model with the channels zeroed that the experts have lost, and their repaired weights."""
    others = [result for result in pruned.sites if result.site.kind != "experts"]
    found = zeroed(dense, SimpleNamespace(sites=others, model=pruned.model))
    for result in pruned.sites:
        if result.site.kind != "experts":
            continue
        mixture = result.site.mixture
        large, small = (
            experts_module(find_blocks(m)[result.site.block], mixture).down_proj for m in (found, pruned.model)
        )
        for number in range(mixture.count):
            into, values = (t.data[number].T if mixture.transposed else t.data[number] for t in (large, small))
            into.zero_()[:, result.kept[:, number]] = values
    return found


@pytest.mark.parametrize("model_type", TYPES)
def test_taken_apart_experts_compute_what_their_module_does(model_type):
    model, tried = differing_model(model_type), 0
    for block in find_blocks(model):
        if (mixture := find_experts(block)) is None:
            continue
        seen = []
        module = experts_module(block, mixture)
        hook = module.register_forward_hook(
            lambda _m, args, kwargs, output, seen=seen: seen.append((args, kwargs, output)), with_kwargs=True
        )
        model(TOKENS)
        hook.remove()
        args, kwargs, output = seen[0]
        output = output.reshape(-1, output.shape[-1])
        output = output.view(mixture.count, -1, output.shape[-1]).sum(0) if mixture.scaled else output
        torch.testing.assert_close(put_together(block, mixture, arrived(mixture, args, kwargs)), output, **CLOSE)
        assert (mixture.rows and mixture.each <= mixture.count == 4) or model_type == "jamba"
        tried += 1
    assert tried


@pytest.mark.parametrize("layout", ["compact", "uniform", "padded"])
@pytest.mark.parametrize("model_type", TYPES)
def test_sparsity_zero_is_the_dense_model_to_the_bit(model_type, layout, tokenizer):
    dense = differing_model(model_type)
    pruned = prune(
        dense, tokenizer, small_recipe(sparsity=0.0, layout=layout, num_samples=2, experts="channels", eval=False)
    )
    assert torch.equal(pruned.model(TOKENS).logits, dense(TOKENS).logits)
    assert pruned.model.config.model_type == model_type


@pytest.mark.parametrize("model_type", TYPES)
def test_pruned_equals_masked_and_repaired(model_type, tokenizer):
    dense, pruned = cut_once(model_type, tokenizer)
    torch.testing.assert_close(pruned.model(TOKENS).logits, masked(dense, pruned)(TOKENS).logits, **CLOSE)
    experts = [result for result in pruned.sites if result.site.kind == "experts"]
    gone = [result for result in experts if len(result.kept) < result.site.units]
    assert gone and all(result.kept.shape[1] == result.site.mixture.count for result in gone)
    assert any((result.kept != result.kept[:, :1]).any() for result in gone)  # each its own
    assert what_stays(find_anatomy(dense, experts="channels")) == pruned.stays
    assert not any("experts" in line for line in pruned.stays)
    sizes = [model_size(model, 32, "channels").block_linear for model in (dense, pruned.model)]
    removed = sum((r.site.units - len(r.kept)) * r.site.cost for r in pruned.sites)
    assert sizes[0] - sizes[1] == removed and removed / sizes[0] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("model_type", TYPES)
def test_padding_back_gives_the_dense_shape_and_the_same_function(model_type, tokenizer):
    dense, compact = cut_once(model_type, tokenizer)
    padded = cut(dense, tokenizer, "padded", ffn_sparsity=None, head_sparsity=None, sparsity=0.25)
    assert type(padded.model) is type(dense)
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (padded.model, dense)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(padded.model(TOKENS).logits, compact.model(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_uniform_layout_is_a_plain_config_where_that_has_a_key_for_experts_alone(model_type, tokenizer):
    dense = differing_model(model_type)
    if model_type in NO_KEY:
        recipe = small_recipe(ffn_sparsity=0.5, head_sparsity=0.0, layout="uniform", experts="channels", round_to=4)
        sites = find_anatomy(dense, experts="channels").sites
        if not any(site.kind == "ffn" for site in sites):
            with pytest.raises(SnpError, match="in this model and layout uniform"):
                check_budget(dense, resolve(recipe, dense))
        pytest.skip("its config says another width by the same key")
    pruned = cut(dense, tokenizer, "uniform", ffn_sparsity=0.2)
    widths = {len(r.kept) for r in pruned.sites if r.site.kind == "experts"}
    assert pruned.model.config.model_type == model_type and len(widths) == 1
    assert max(widths) < find_experts(find_blocks(dense)[-1]).channels
    torch.testing.assert_close(pruned.model(TOKENS).logits, masked(dense, pruned)(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize("model_type", TYPES)
def test_generation_with_a_cache_equals_that_without(model_type, tokenizer):
    _, pruned = cut_once(model_type, tokenizer)
    prompt = TOKENS[:, :10]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    with_cache, without = (
        pruned.model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=cache, **settings)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_pruned_model_is_an_input_like_any_other(model_type, tokenizer):
    _, once = cut_once(model_type, tokenizer)
    twice = cut(once.model, tokenizer, ffn_sparsity=0.1, round_to=1)  # experts go by fours, whatever is asked for
    assert [r.site.channels for r in twice.sites] == [len(r.kept) * r.site.unit_size for r in once.sites]
    assert any(len(r.kept) < r.site.units for r in twice.sites)
    assert all(len(r.kept) % 4 == 0 for r in twice.sites if r.site.kind == "experts")
    torch.testing.assert_close(twice.model(TOKENS).logits, masked(once.model, twice)(TOKENS).logits, **CLOSE)


def whole(model_type: str, tokenizer, layout: str = "compact", **overrides):
    """A model with six experts a block, and what is left of it when a third of them has gone."""
    dense = differing_model(model_type, num_experts=6, num_local_experts=6, n_routed_experts=6, moe_num_experts=6)
    settings = {"ffn_sparsity": 0.3, "head_sparsity": 0.0, "num_samples": 8, "experts": "whole"}
    return dense, prune(dense, tokenizer, small_recipe(**{**settings, "layout": layout, **overrides}))


def dropped(dense: PreTrainedModel, pruned) -> PreTrainedModel:
    """The dense model whose routers never choose the experts that have gone, with the others' repaired weights."""
    others = [result for result in pruned.sites if result.site.kind != "experts"]
    found = zeroed(dense, SimpleNamespace(sites=others, model=pruned.model))
    for result in pruned.sites:
        if result.site.kind != "experts":
            continue
        mixture, block = result.site.mixture, find_blocks(found)[result.site.block]
        small = find_blocks(pruned.model)[result.site.block]
        into, values = (experts_module(b, mixture) for b in (block, small))
        for name, tensor in into.named_parameters():
            tensor.data[result.kept] = values.get_parameter(name).data
        outer = block.get_submodule(mixture.module.rpartition(".")[0])
        watch_router(outer, mixture, result.kept)
    return found


def watch_router(outer: nn.Module, mixture, kept: torch.Tensor) -> None:
    """Lets a module of experts get what a router with the kept rows alone chooses, by the numbers that these had."""
    narrow = copy.deepcopy(outer)
    path = mixture.module.rpartition(".")[0]
    for name, dimension in mixture.rows:
        owner, _, leaf = name.removeprefix(f"{path}.").rpartition(".")
        holder, tensor = narrow.get_submodule(owner), getattr(narrow.get_submodule(owner), leaf)
        rows = tensor.detach().index_select(dimension, kept)
        setattr(holder, leaf, nn.Parameter(rows, requires_grad=False) if isinstance(tensor, nn.Parameter) else rows)
    for part in narrow.modules():
        for name, value in list(vars(part).items()):
            if type(value) is int and value == mixture.count and "experts" in name and "per_tok" not in name:
                setattr(part, name, len(kept))
    experts = outer.experts

    def through(*args, **kwargs):
        values = [*args, *kwargs.values()]
        if len(values) == 1:  # every expert gets all tokens, in their order
            each = values[0].view(len(kept), -1, values[0].shape[-1])
            all_of_them = each.new_zeros(mixture.count, *each.shape[1:])
            all_of_them[kept] = each
            return experts(all_of_them.flatten(0, 1)).view(mixture.count, -1, each.shape[-1])[kept].flatten(0, 1)
        return experts(values[0], kept[values[1]], *values[2:])

    narrow.experts.forward = through
    outer.forward = narrow.forward


@pytest.mark.parametrize("model_type", TYPES)
def test_whole_experts_go_with_their_rows_of_the_router(model_type, tokenizer):
    if model_type == "jamba":
        pytest.skip("its tiny model has no more experts than a token comes by")
    dense, pruned = whole(model_type, tokenizer)
    torch.testing.assert_close(pruned.model(TOKENS).logits, dropped(dense, pruned)(TOKENS).logits, **CLOSE)
    sites = [result for result in pruned.sites if result.site.kind == "experts"]
    assert any(len(r.kept) < 6 for r in sites) and all(len(r.kept) >= r.site.mixture.each for r in sites)
    left = [find_experts(find_blocks(pruned.model)[r.site.block]) for r in sites]
    assert [m.count for m in left] == [len(r.kept) for r in sites]
    prompt, settings = TOKENS[:, :10], {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    written = [pruned.model.generate(prompt, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*written)
    again = prune(pruned.model, tokenizer, small_recipe(sparsity=0.0, experts="whole", num_samples=2))
    assert torch.equal(again.model(TOKENS).logits, pruned.model(TOKENS).logits)


@pytest.mark.parametrize("model_type", TYPES)
def test_fewer_experts_of_all_blocks_are_a_plain_config(model_type, tokenizer):
    if model_type == "jamba":
        pytest.skip("its tiny model has no more experts than a token comes by")
    dense, pruned = whole(model_type, tokenizer, "uniform", allocation="uniform", expert_score="reap")
    counts = {len(result.kept) for result in pruned.sites if result.site.kind == "experts"}
    assert pruned.model.config.model_type == model_type and counts == {4}
    torch.testing.assert_close(pruned.model(TOKENS).logits, dropped(dense, pruned)(TOKENS).logits, **CLOSE)


@pytest.mark.parametrize("layout", ["compact", "uniform"])
@pytest.mark.parametrize("model_type", TYPES)
def test_whole_experts_go_first_and_channels_of_the_others_then(model_type, layout, tokenizer, tmp_path):
    if model_type == "jamba" or (layout == "uniform" and model_type in NO_KEY):
        pytest.skip("it has no experts to spare, or its config no key for their width alone")
    _, fewer = whole(model_type, tokenizer, layout, allocation="uniform")
    fewer.save(tmp_path / "fewer")
    loaded = checkpoint.load(str(tmp_path / "fewer"), "auto")[0]
    both = cut(loaded, tokenizer, layout, ffn_sparsity=0.25)
    sites = [result for result in both.sites if result.site.kind == "experts"]
    assert {r.site.mixture.count for r in sites} == {4} and any(len(r.kept) < r.site.units for r in sites)
    torch.testing.assert_close(both.model(TOKENS).logits, masked(loaded, both)(TOKENS).logits, **CLOSE)
    assert layout == "compact" or both.model.config.model_type == model_type
    checkpoint.save(both.model, tokenizer, tmp_path / "both")
    again = checkpoint.load(str(tmp_path / "both"), "auto")[0]
    torch.testing.assert_close(again(TOKENS).logits, both.model(TOKENS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["reap", "frequency", "loss", "random"])
def test_scores_are_what_they_say(by, tokenizer):
    dense, pruned = whole("qwen3_moe", tokenizer, expert_score=by, reference="self", allocation="uniform")
    result = next(r for r in pruned.sites if r.site.kind == "experts")
    block, mixture, seen = find_blocks(dense)[result.site.block], result.site.mixture, []
    with watch_arrivals(block, mixture, seen.append):
        dense(pruned.calibration.tokens)
    found = []
    for number in range(mixture.count):
        _, inputs, weights = seen[0].at(number)
        gate, up = (inputs @ experts_module(block, mixture).gate_up_proj[number].T).chunk(2, -1)
        norms = (torch.nn.functional.silu(gate) * up @ experts_module(block, mixture).down_proj[number].T).norm(dim=1)
        found.append({"frequency": len(inputs), "reap": float((norms * weights[:, 0]).mean())}.get(by, 0.0))
    if by in ("reap", "frequency"):
        best = sorted(range(mixture.count), key=lambda n: -found[n])[: len(result.kept)]
        assert sorted(best) == result.kept.tolist()
    new = experts_module(find_blocks(pruned.model)[result.site.block], mixture)
    assert torch.equal(new.down_proj, experts_module(block, mixture).down_proj[result.kept])  # not repaired


def test_a_repair_leaves_less_than_there_was_to_lack(tokenizer):
    errors = []
    for reference in ("self", "residual"):
        _, pruned = whole("qwen3_moe", tokenizer, reference=reference, allocation="uniform", num_samples=32)
        errors.append(next(r.error for r in pruned.sites if r.site.kind == "experts"))
    assert errors[1] < errors[0]


def test_fewer_experts_than_a_token_comes_by_are_refused():
    dense = differing_model("mixtral")
    recipe = small_recipe(ffn_sparsity=0.7, head_sparsity=0.0, experts="whole")
    with pytest.raises(SnpError, match="expected at most 0.5, with which every unit is gone that may go"):
        check_budget(dense, resolve(recipe, dense))
    with pytest.raises(SnpError, match="--experts whole: expected layout compact or uniform, got padded"):
        check_budget(dense, resolve(small_recipe(experts="whole", layout="padded"), dense))
    with pytest.raises(SnpError, match="--expert-score reap: expected together with --experts whole"):
        small_recipe(experts="channels", expert_score="reap")


def test_a_router_that_is_to_choose_more_experts_than_there_are_is_refused(tmp_path):
    differing_model("mixtral").config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 1}))
    with pytest.raises(SnpError, match="num_experts_per_tok: expected at most as many .* there are, 1, got 2"):
        load_skeleton(str(tmp_path))


@pytest.mark.parametrize("experts", ["channels", "whole", "both"])
def test_experts_that_two_blocks_share_are_refused(experts):
    model = differing_model("mixtral")
    one, other = (b.mlp.experts for b in (find_blocks(model)[0], find_blocks(model)[1]))
    other.down_proj = one.down_proj
    with pytest.raises(SnpError, match=r"block 1 mlp.experts.down_proj: shares its weights with block 0 .*Untie them"):
        find_anatomy(model, experts=experts)
    find_anatomy(model)  # where they stay, nothing is cut twice


@pytest.mark.parametrize("idle", [(2,), (2, 3)])
def test_an_expert_that_no_token_came_by_goes_first_as_a_whole(idle, tokenizer):
    dense = differing_model("gpt_oss", num_local_experts=6)
    for block in find_blocks(dense):
        block.mlp.router.bias[[*idle]] = -1e4
    settings = {"ffn_sparsity": 0.15, "head_sparsity": 0.0, "experts": "whole", "allocation": "uniform"}
    pruned = prune(dense, tokenizer, small_recipe(**settings, num_samples=4))
    first = next(result for result in pruned.sites if result.site.kind == "experts")
    (gone,) = {*range(6)} - {*first.kept.tolist()}
    assert gone in idle
    for number, facts in zip(first.kept.tolist(), first.experts, strict=True):
        assert (facts["tokens"] == 0) == (number in idle) and math.isfinite(facts["dampening"])
    assert torch.isfinite(pruned.model(TOKENS).logits).all()


@pytest.mark.parametrize("experts", ["never", "channels", "whole", "both"])
def test_blocks_and_experts_go_under_one_budget(experts, tokenizer):
    dense = differing_model("qwen3_moe", num_experts=6)
    pruned = prune(
        dense, tokenizer, small_recipe(sparsity=0.5, depth="auto", experts=experts, num_samples=8, round_to=4)
    )
    sizes = [model_size(model, 32, experts).block_linear for model in (dense, pruned.model)]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.08)
    whole_blocks = {"depth": "only", "layout": "uniform"}
    shorter = prune(dense, tokenizer, small_recipe(sparsity=0.34, **whole_blocks, experts=experts, num_samples=8))
    assert len(shorter.gone) == 1 and shorter.model.config.num_hidden_layers == 2
    with torch.no_grad():
        assert torch.isfinite(shorter.model(TOKENS).logits).all() and torch.isfinite(pruned.model(TOKENS).logits).all()


def reloads(names, tokenizer, alone, folder) -> None:
    torch.save(TOKENS, folder / "tokens.pt")
    wanted = {}
    for name in names:
        layouts = {"compact": cut_once(name, tokenizer)[1]}
        if name not in NO_KEY:
            layouts["uniform"] = cut(differing_model(name), tokenizer, "uniform", ffn_sparsity=0.2)
        if name != "jamba":
            layouts["whole"] = whole(name, tokenizer)[1]
            layouts["fewer"] = whole(name, tokenizer, "uniform", allocation="uniform")[1]
        for layout, pruned in layouts.items():
            checkpoint.save(pruned.model, tokenizer, folder / f"{name}-{layout}")
            wanted[f"{name}-{layout}"] = pruned.model(TOKENS).logits
    run = alone(RELOAD, folder)
    assert run.returncode == 0, run.stderr
    for name, logits in wanted.items():
        # Grouped products take another kernel where a file's tensors are not aligned.
        torch.testing.assert_close(torch.load(folder / name / "logits.pt"), logits, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.exhaustive
def test_a_fresh_process_reads_the_same(tokenizer, alone, tmp_path):
    reloads(("gpt_oss",), tokenizer, alone, tmp_path)


@pytest.mark.exhaustive
def test_a_fresh_process_reads_all_of_them(tokenizer, alone, tmp_path):
    reloads((*FEW, *MORE), tokenizer, alone, tmp_path)


def test_each_expert_comes_to_least_squares_weighted_by_the_router(tokenizer):
    """Over the calibration tokens that come by, what an expert adds to the stream is the least-squares fit."""
    dense = differing_model("mixtral")
    settings = {"reference": "self", "dampening": 1e-6, "metric": "error", "ordering": "obs", "num_samples": 16}
    pruned = cut(dense, tokenizer, allocation="uniform", ffn_sparsity=0.5, **settings)
    tokens = pruned.calibration.tokens
    result = next(r for r in pruned.sites if r.site.kind == "experts")
    block, new = find_blocks(dense)[0], find_blocks(pruned.model)[0]
    seen = []
    hook = experts_module(block, result.site.mixture).register_forward_pre_hook(
        lambda _m, a, k: seen.append(arrived(result.site.mixture, a, k)), with_kwargs=True
    )
    dense(tokens)
    hook.remove()
    for number in range(result.site.mixture.count):
        _, inputs, weights = seen[0].at(number)
        expert = expert_of(block, result.site.mixture, number)
        X = (activated(block, result.site.mixture, expert, inputs) * weights).double()
        wanted, kept = X @ expert.outward.weight.double().T, result.kept[:, number]
        best = torch.linalg.lstsq(X[:, kept], wanted).solution
        got = expert_of(new, find_experts(new), number).outward.weight.double().T
        assert len(inputs) > 2 * len(kept)
        torch.testing.assert_close(
            X[:, kept] @ got, X[:, kept] @ best, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        )


def test_an_expert_that_no_token_came_by_is_named_and_cut_by_its_weights(tokenizer, caplog):
    dense = differing_model("gpt_oss")
    for block in find_blocks(dense):
        block.mlp.router.bias[2] = -1e4
    pruned = cut(dense, tokenizer)
    assert "block 0 mlp.experts: no calibration token came by expert 2; what they keep" in caplog.text
    torch.testing.assert_close(pruned.model(TOKENS).logits, masked(dense, pruned)(TOKENS).logits, **CLOSE)
    experts = next(result for result in pruned.sites if result.site.kind == "experts").experts
    assert experts[2]["tokens"] == 0 and all(other["tokens"] for other in (*experts[:2], experts[3]))


def test_few_tokens_get_more_dampening(tokenizer):
    found = {}
    for windows in (1, 16):
        pruned = cut(differing_model("mixtral"), tokenizer, num_samples=windows, seq_len=16)
        for result in pruned.sites:
            found.update({e["tokens"]: e["dampening"] for e in result.experts})
    few = {tokens: dampening for tokens, dampening in found.items() if 0 < tokens < 64}
    assert few
    for tokens, dampening in few.items():
        assert dampening == pytest.approx(min(3.0, 0.1 * 64 / tokens))
