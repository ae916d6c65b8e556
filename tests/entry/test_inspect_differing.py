"""`snp-llm inspect` of models whose blocks differ, from what their publishers say in `config.json`."""

import json

import pytest
from transformers import AutoConfig

from snp_llm.cli.parse import inspect_main

GEMMA = {  # Gemma 3 27B: its text model
    "vocab_size": 262208,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "max_position_embeddings": 131072,
}
KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
HALF = {"dtype": "bfloat16", "max_position_embeddings": 8192}
CONFIGS = {
    "gemma3": {
        "dtype": "bfloat16",
        "text_config": GEMMA,
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
        },
        "mm_tokens_per_image": 256,
    },
    "qwen3_5_text": {  # Qwen3.5 9B
        **HALF,
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
    },
    "deepseek_v3": {
        **HALF,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "first_k_dense_replace": 3,
    },
    "llama4_text": {  # Llama 4 Scout
        **HALF,
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
    },
    "nemotron_h": {  # Nemotron-H 8B
        **HALF,
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "layers_block_type": [KINDS[letter] for letter in NEMOTRON],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
    },
    "granitemoehybrid": {  # Granite 4.0 H Tiny
        **HALF,
        "vocab_size": 100352,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "num_hidden_layers": 40,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
        "layer_types": ["full_attention" if i % 10 == 5 else "linear_attention" for i in range(40)],
        "tie_word_embeddings": True,
    },
}
# Billions of parameters that publishers say, blocks with attention, with an FFN or shared experts, and what stays.
WHOLE = {
    "gemma3": (27.4, 62, 62, []),
    "qwen3_5_text": (9.0, 8, 32, ["linear_attn (Qwen3_5GatedDeltaNet) in 24 of 32 blocks"]),
    "deepseek_v3": (671.0, 61, 61, ["experts stay as they are"]),
    "llama4_text": (107.8, 48, 48, ["experts stay as they are"]),
    "nemotron_h": (8.1, 4, 24, ["mixer (NemotronHMamba2Mixer) in 24 of 52 blocks"]),
    "granitemoehybrid": (6.9, 4, 40, ["mamba (GraniteMoeHybridMambaLayer) in 36 of 40 blocks", "experts stay"]),
}
SHORT = {
    "gemma3": {"text_config": {**GEMMA, "num_hidden_layers": 7}},
    "qwen3_5_text": {"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"]},
    "deepseek_v3": {"num_hidden_layers": 4},
    "llama4_text": {"num_hidden_layers": 4},
    "nemotron_h": {"layers_block_type": [KINDS[letter] for letter in NEMOTRON[6:10]]},
    "granitemoehybrid": {"num_hidden_layers": 6, "layer_types": [*["linear_attention"] * 5, "full_attention"]},
}


def inspected(model_type, folder, capsys, **overrides):
    AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **overrides}).save_pretrained(folder)
    assert inspect_main([str(folder), "--seq-len", "2048"]) == 0
    printed = capsys.readouterr().out
    assert inspect_main([str(folder), "--seq-len", "2048", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    parameters, most = facts["parameters"], facts["sparsity"]["largest"]
    assert parameters["all"] == sum(count for kind, count in parameters.items() if kind != "all")
    assert 0 < most["uniform"]["both"] <= most["compact"]["both"] < 1
    assert facts["prune"]["host_bytes"] > 0 and all(line in printed for line in facts["stays"])
    return facts


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in ("granitemoehybrid", "gemma3") else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in SHORT
    ],
)
def test_a_few_blocks_of_each(model_type, tmp_path, capsys):
    facts = inspected(model_type, tmp_path, capsys, **SHORT[model_type])
    assert bool(facts["stays"]) == (model_type != "gemma3") and len(facts["units"]) == facts["blocks"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", WHOLE)
def test_whole_models_in_seconds(model_type, tmp_path, capsys):
    facts = inspected(model_type, tmp_path, capsys)
    billions, attentions, ffns, stays = WHOLE[model_type]
    assert facts["parameters"]["all"] / 1e9 == pytest.approx(billions, rel=0.02)
    assert sum(units["heads"] is not None for units in facts["units"]) == attentions
    assert sum(units["channels"] is not None for units in facts["units"]) == ffns
    assert all(any(words in line for line in facts["stays"]) for words in stays)
