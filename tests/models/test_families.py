from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, CLIPVisionConfig, LlamaConfig, T5Config

from snp_llm import prune
from snp_llm.models import carried
from snp_llm.models.anatomy import find_anatomy, find_blocks, find_sites
from snp_llm.models.families import decoders
from snp_llm.models.families.decoders import FAMILIES, WRAPPERS, find_family
from snp_llm.models.outline import block_widths, ffn_kinds, structure_of
from snp_llm.models.plain import ffn_key, uniform_widths
from snp_llm.models.staying import what_stays
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_model, small_opt, small_recipe
from tests.differing import DIFFERING, differing_model
from tests.families import FAMILY_CONFIGS, GROUPED, every_family
from tests.wrappers import WRAPPERS as TEXT_AND_IMAGES
from tests.wrappers import small_wrapper


def test_sites_of_an_opt_model():
    model = small_opt()
    family = find_family(model.config)
    sites = find_sites(find_blocks(model), family)
    assert [(s.block, s.kind, s.units, s.unit_size) for s in sites[:2]] == [(0, "attention", 4, 8), (0, "ffn", 64, 1)]
    assert sites[0].cost == 4 * 32 * 8 and sites[1].cost == 2 * 32
    assert sites[2].name == "block 1 self_attn.out_proj"
    linear = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    assert sum(s.units * s.cost for s in sites) == linear


@pytest.mark.parametrize("config", [T5Config(), CLIPVisionConfig()])
def test_what_is_no_causal_language_model_is_refused(config):
    with pytest.raises(SnpError, match=f"model_type '{config.model_type}' is not supported; expected a decoder-only"):
        find_family(config)


def test_encoders_are_refused_with_what_they_have():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(BertConfig(num_hidden_layers=2, is_decoder=True))
    with pytest.raises(SnpError, match=r"'bert' is not supported: .*first block has .*attention\.self\.query, "):
        find_anatomy(model)


def test_a_layout_that_nearly_fits_is_refused_with_what_does_not():
    model = small_opt()
    model.model.decoder.layers[1].fc2 = torch.nn.Identity()
    with pytest.raises(SnpError, match=r"block 1 has no FFN as OPT has it; its projections are .*fc1\."):
        find_anatomy(model)
    model = small_model("llama")
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(48, 60)
    with pytest.raises(SnpError, match=r"block 0 mlp\.gate_proj: expected as many rows as mlp\.down_proj has columns"):
        find_anatomy(model)
    model = small_model("llama")
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(48, 20)
    with pytest.raises(SnpError, match=r"block 1 self_attn: expected query heads that split evenly into KV groups"):
        find_anatomy(model)


def test_a_norm_over_all_channels_keeps_them_and_single_values_go_along():
    model = small_model("llama")
    for block in model.model.layers:
        block.mlp.register_parameter("scale", torch.nn.Parameter(torch.ones(64)))
    site = find_anatomy(model).sites[1]
    assert site.prunable and [p.path for p in site.producers] == ["mlp.gate_proj", "mlp.up_proj", "mlp.scale"]
    model.model.layers[0].mlp.norm = torch.nn.LayerNorm(64)
    assert find_anatomy(model).sites[1].stay == "a norm over all of them at once would change"


def test_other_classes_of_projections_are_refused_with_what_the_blocks_have():
    class Quantized(torch.nn.Module):
        weight = torch.empty(48, 64)

    model = small_model("llama")
    for block in model.model.layers:
        block.mlp.down_proj = Quantized()
    with pytest.raises(SnpError, match=r"block 0 has no FFN as Llama has it; its projections are .*mlp\.up_proj"):
        find_anatomy(model)


@every_family(variants=True)
def test_the_table_says_what_modules_say_of_heads(model_type):
    model = small_model(model_type)
    first = find_anatomy(model).sites[0]
    family = find_family(model.config)
    assert first.kind == "attention" and first.stay == family.heads_stay


def test_every_family_has_a_small_config_here():
    assert {*FAMILY_CONFIGS, *DIFFERING} == {family.model_type for family in FAMILIES}
    assert {*TEXT_AND_IMAGES} == {family.model_type for family in WRAPPERS}
    assert {*FAMILY_CONFIGS} - {*DIFFERING} == {family.model_type for family in FAMILIES if family.alike}


FEW = ("lfm3", "deepseek_v3", "mixtral", "gemma3")


@pytest.mark.parametrize(
    "model_type",
    [t if t in FEW else pytest.param(t, marks=pytest.mark.exhaustive) for t in (*DIFFERING, *TEXT_AND_IMAGES)],
)
def test_what_the_table_says_of_those_that_are_tried_is_so(model_type):
    """Which heads are units, what a plain config can hold, and what stays."""
    model = (differing_model if model_type in DIFFERING else small_wrapper)(model_type)
    (entry,) = (family for family in (*FAMILIES, *WRAPPERS) if family.model_type == model_type)
    anatomy = find_anatomy(model)
    attentions = [site for site in anatomy.sites if site.heads is not None]
    assert {site.stay for site in attentions} == {entry.heads_stay}
    assert any(site.heads.query > site.heads.key_value for site in attentions) == (entry.kv_heads_key is not None)
    kinds = [ffn_key(model, anatomy.family, kind.facts) for kind in ffn_kinds(structure_of(model))]
    heads = any(site.prunable and uniform_widths(model, anatomy.family, site) for site in attentions)
    ffn = ("FFN",) if kinds and all(kinds) else ("dense FFN",) if any(kinds) else ()
    assert entry.uniform == (("heads",) if heads else ()) + ffn
    said = " ".join(what_stays(anatomy))
    assert bool(entry.stays.removeprefix("towers")) == bool(said) or "experts" in entry.stays
    assert "experts" in entry.stays or "experts" not in said


@every_family(*DIFFERING)  # their blocks are tried instead
def test_what_the_table_says_of_head_sizes_is_so(model_type):
    """A config of fewer heads of the same size gives such blocks, which run, or the table says that it cannot."""
    model = small_model(model_type)
    family, was = find_family(model.config), block_widths(find_blocks(model)[0])[0]
    heads = replace(was, query=was.query * 2 // 3, key_value=max(1, was.key_value * 2 // 3))
    values = {family.heads_key: heads.query, "head_dim": was.size}
    values |= {family.kv_heads_key: heads.key_value} if family.kv_heads_key else {}
    try:
        narrow = small_model(model_type, **values)
        narrow(torch.arange(3, 13).view(2, 5))
        holds = all(block_widths(block)[0] == heads for block in find_blocks(narrow))
    except Exception:
        holds = False
    assert holds == (family.head_dim_key is not None)


@every_family()
def test_what_the_table_says_of_head_counts_is_so(model_type):
    """Heads that do not divide the hidden size."""
    family = find_family(AutoConfig.for_model(model_type))
    if family.head_dim_key is None:
        pytest.skip("its config cannot hold fewer heads")
    values = {family.heads_key: 5, "head_dim": 16, **({family.kv_heads_key: 1} if family.kv_heads_key else {})}
    try:
        small_model(model_type, **values)(torch.arange(3, 13).view(2, 5))
        refused = False
    except Exception:
        refused = True
    assert refused == family.divides_hidden


def test_a_type_without_an_entry_is_pruned_with_a_remark(tokenizer, monkeypatch, caplog):
    dense = small_model("arcee")
    known = [family for family in decoders.FAMILIES if family.model_type != "arcee"]
    monkeypatch.setattr(decoders, "FAMILIES", known)
    pruned = prune(dense, tokenizer, small_recipe(sparsity=0.3, round_to=4, num_samples=2)).model
    assert pruned.config.model_type == "snp_arcee" and any("no entry in the table" in m for m in caplog.messages)


def test_models_that_run_blocks_again_or_give_them_what_depends_on_tokens_are_refused(tokenizer, monkeypatch):
    config = AutoConfig.for_model("hrm_text", **GROUPED, num_layers_per_stack=2)
    looped = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SnpError, match="expected blocks that run once each, .* got blocks 0, 1, 0, 1"):
        prune(looped, tokenizer, small_recipe(num_samples=2))
    parts = {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1}
    looped = AutoModelForCausalLM.from_config(AutoConfig.for_model("dory", **{**GROUPED, **parts})).eval()
    with pytest.raises(SnpError, match="expected blocks that run once each, .* got blocks 0, 1, 2, 1, 2, 3"):
        prune(looped, tokenizer, small_recipe(num_samples=2))
    monkeypatch.setattr(carried, "OWN", "of another name")
    fed = small_model("gemma4_text", hidden_size_per_layer_input=8, vocab_size_per_layer_input=2048)
    with pytest.raises(SnpError, match="blocks get other arguments for other tokens"):
        prune(fed, tokenizer, small_recipe(num_samples=2))


def test_two_projections_that_are_one_tensor_are_refused():
    model = small_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SnpError, match="block 1 mlp.up_proj: shares its weights with block 0 mlp.up_proj"):
        find_anatomy(model)


def test_names_do_not_matter():
    config = LlamaConfig(name_or_path="somebody/finetune-of-a-renamed-model")
    assert find_family(config).name == "Llama"
