import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig, T5Config, ViTConfig

from snp_llm.models.anatomy import find_anatomy, find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_model, small_opt


def test_sites_of_an_opt_model():
    model = small_opt()
    family = find_family(model.config)
    sites = find_sites(find_blocks(model), family)
    assert [(s.block, s.kind, s.units, s.unit_size) for s in sites[:2]] == [(0, "attention", 4, 8), (0, "ffn", 64, 1)]
    assert sites[0].cost == 4 * 32 * 8 and sites[1].cost == 2 * 32
    assert sites[2].name == "block 1 self_attn.out_proj"
    linear = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    assert sum(s.units * s.cost for s in sites) == linear


@pytest.mark.parametrize("config", [T5Config(), ViTConfig()])
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


def test_two_projections_that_are_one_tensor_are_refused():
    model = small_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SnpError, match="block 1 mlp.up_proj: shares its weights with block 0 mlp.up_proj"):
        find_anatomy(model)


def test_names_do_not_matter():
    config = LlamaConfig(name_or_path="somebody/finetune-of-a-renamed-model")
    assert find_family(config).name == "Llama"
