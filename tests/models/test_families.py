import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    T5Config,
)

from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_model, small_opt


def test_sites_of_an_opt_model():
    model = small_opt()
    family = find_family(model.config)
    sites = find_sites(find_blocks(model, family), family)
    assert [(s.block, s.kind, s.units, s.unit_size) for s in sites[:2]] == [(0, "attention", 4, 8), (0, "ffn", 64, 1)]
    assert sites[0].cost == 4 * 32 * 8 and sites[1].cost == 2 * 32
    assert sites[2].name == "block 1 self_attn.out_proj"
    linear = sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    assert sum(s.units * s.cost for s in sites) == linear


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), BloomConfig()])
def test_other_architectures_are_refused_with_the_list(config):
    with pytest.raises(SnpError, match=f"model_type '{config.model_type}' is not supported; expected .*: opt"):
        find_family(config)


def test_a_model_without_the_layout_is_refused():
    model = small_opt()
    model.model.decoder.layers[1].fc2 = torch.nn.Identity()
    with pytest.raises(SnpError, match="fc2: expected a plain linear layer, got Identity"):
        find_blocks(model, find_family(OPTConfig()))
    del model.model.decoder.layers[0].fc1
    with pytest.raises(SnpError, match="OPTForCausalLM does not have the layout of OPT"):
        find_blocks(model, find_family(OPTConfig()))


@pytest.mark.parametrize(
    "config",
    [MixtralConfig(), Qwen2MoeConfig(), Qwen3MoeConfig(), OlmoeConfig(), GraniteMoeConfig(), DeepseekV3Config()],
)
def test_mixtures_of_experts_are_refused_by_name(config):
    with pytest.raises(SnpError, match=f"'{config.model_type}' is a mixture of experts"):
        find_family(config)


def test_two_projections_that_are_one_tensor_are_refused():
    model = small_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SnpError, match="block 1 mlp.up_proj: shares its weights with block 0 mlp.up_proj"):
        find_blocks(model, find_family(model.config))


def test_names_do_not_matter():
    config = LlamaConfig(name_or_path="somebody/finetune-of-a-renamed-model")
    assert find_family(config).name == "Llama"
