"""Small random decoders whose blocks differ from one another: hybrids, latent attention, mixtures of experts."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.families import OWN_EMBEDDINGS, SHARED_KEYS

TINY = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
DELTA = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MAMBA = {
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
MIXED = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
SHARED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
MIXED_LATENT = {**LATENT, **SHARED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR_LATENT = {  # linear attention beside that from latent vectors
    **MIXED_LATENT,
    "num_experts": 4,
    "num_expert_group": 1,
    "num_experts_per_token": 2,
    "q_lora_rank": None,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "dense", "sparse"],
}

HYBRIDS = {
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, **MIXED, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm3": {"sliding_window": 8, "layer_types": ["conv", "full_attention", "sliding_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_dt_rank": 4,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {
        **MAMBA,
        "mamba_d_ssm": 96,
        "attention_out_multiplier": 0.8,
        "mlp_multipliers": [0.9, 0.7],
        "key_multiplier": 0.5,
        "ssm_out_multiplier": 0.6,
    },
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "moe"],
        "mamba_num_heads": 12,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 40,
    },
    "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4},
    "recurrent_gemma": {"lru_width": 48, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "bailing_hybrid": {**LINEAR_LATENT, "num_nextn_predict_layers": 0},
    "kimi_linear": LINEAR_LATENT,
    "minimax": {**MIXED, "block_size": 8, "layer_types": ["full_attention", "linear_attention", "full_attention"]},
}
SHARING = {  # keys and values of some blocks are those of others
    "gemma3n_text": {
        **SHARED_KEYS,
        **OWN_EMBEDDINGS,
        "sliding_window": 8,
        "laurel_rank": 4,
        "altup_num_inputs": 3,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {**SHARED_KEYS, **OWN_EMBEDDINGS, "sliding_window": 8, "global_head_dim": 32},
    "gemma4_unified_text": {**SHARED_KEYS, "sliding_window": 8, "global_head_dim": 32},
}
LATENTS = {
    "deepseek_v2": {**MIXED_LATENT, "first_k_dense_replace": 1},
    "deepseek_v3": {**MIXED_LATENT, "first_k_dense_replace": 1},
    "minicpm3": LATENT,
    "youtu": LATENT,
    "axk1": {**MIXED_LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "glm4_moe_lite": {**MIXED_LATENT, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "sarvam_mla": {**MIXED_LATENT, "q_lora_rank": None, "first_k_dense_replace": 1},
}
MIXTURES = {
    "mixtral": MIXED,
    "qwen3_moe": {**MIXED, "mlp_only_layers": [0]},
    "qwen2_moe": {**MIXED, "shared_expert_intermediate_size": 40},
    "gpt_oss": {**MIXED, "sliding_window": 8},
    "llama4_text": {**MIXED, "num_experts_per_tok": 1, "intermediate_size_mlp": 80, "moe_layers": [1]},
    "mimo_v2_flash": {
        **SHARED,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "v_head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "afmoe": {**MIXED, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8},
    "laguna": {
        **MIXED,
        "shared_expert_intermediate_size": 40,
        "num_attention_heads_per_layer": [6, 6, 6],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "flint": {**MIXED, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "beam": {**MIXED, "n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "dense", "sparse"]},
}
BESIDE = {  # mixtures without an entry in the table of families
    "glm4_moe": {**SHARED, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "dots1": {**SHARED, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "granitemoe": MIXED,
    "phimoe": MIXED,
    "ernie4_5_moe": {
        **MIXED,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
}
DIFFERING = {**HYBRIDS, **SHARING, **LATENTS, **MIXTURES}
REFUSED = {
    "mamba": {},
    "olmoe": MIXED,
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
        "hybrid_layer_ids": [1, 3, 5],
        "num_key_value_heads": 6,
        "attention_head_dim": 16,
        "mamba_headdim": 24,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
    },
}


def differing_config(model_type: str, **overrides):
    """A config of three blocks, in which keys stand that the type has."""
    known = AutoConfig.for_model(model_type).to_dict()
    values = {**TINY, **{**DIFFERING, **BESIDE, **REFUSED}[model_type], **overrides}
    return AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if k in known or k.endswith("token_id")})


def differing_model(model_type: str, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A random model whose blocks matter as much as its embeddings."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(differing_config(model_type, **overrides)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() in (2, 3) and "layers" in name and "conv" not in name:
            parameter.normal_(0, 0.2)
        elif parameter.dim() == 1 and ("norm" in name or "bias" in name):
            parameter.normal_(0.2 if "norm" in name else 0.0, 0.1)
    return model.to(dtype)
