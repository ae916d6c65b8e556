"""Small configs of every type in the table of families: two blocks, grouped heads where there are such, and windows
shorter than the texts of the tests. A type that is new to the table needs a line here, and no other for its tests.
"""

from collections.abc import Iterable

import pytest

TINY = {
    "vocab_size": 2048,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
MULTI_HEAD = {**TINY, "intermediate_size": 64}
GROUPED = {**MULTI_HEAD, "num_key_value_heads": 3}
WIDE_HEADS = {**GROUPED, "head_dim": 16}  # six heads of 16 of a hidden size of 48
TWO_KINDS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OWN_EMBEDDINGS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 2048}  # in every block
SHARED_KEYS = {  # blocks 4 and 5 read those of 2 and 3
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

FAMILY_CONFIGS = {
    "opt": {**TINY, "word_embed_proj_dim": 48, "ffn_dim": 64, "dropout": 0.0},
    "llama": GROUPED,
    "mistral": {**WIDE_HEADS, "sliding_window": 8},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": WIDE_HEADS,
    "gemma": {**WIDE_HEADS, "num_key_value_heads": 1},
    "gemma2": {**WIDE_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 24},
    "gemma3_text": {**WIDE_HEADS, **TWO_KINDS, "num_key_value_heads": 1, "query_pre_attn_scalar": 24},
    "phi3": {**GROUPED, "sliding_window": 8},
    "gpt2": {**TINY, **NO_DROPOUT},
    "gpt_neox": {**MULTI_HEAD, "rotary_pct": 0.5},
    "smollm3": {**GROUPED, "no_rope_layer_interval": 2},
    "olmo2": GROUPED,
    "granite": {**GROUPED, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "apertus": GROUPED,
    "apertus1p5_text": GROUPED,
    "arcee": GROUPED,
    "beam": {**WIDE_HEADS, **TWO_KINDS, "mlp_layer_types": ["dense", "dense"]},
    "biogpt": MULTI_HEAD,
    "bloom": TINY,
    "codegen": {**TINY, **NO_DROPOUT, "hidden_size": 64, "num_attention_heads": 8, "n_inner": 64, "rotary_dim": 4},
    "cohere": GROUPED,
    "cohere2": {**WIDE_HEADS, **TWO_KINDS},
    "cohere_compass_text": {
        **WIDE_HEADS,
        **TWO_KINDS,
        "rope_parameters": dict.fromkeys(TWO_KINDS["layer_types"], ROPE),
    },
    "ctrl": {**TINY, "dff": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "cwm": {**WIDE_HEADS, **TWO_KINDS},
    "ernie4_5": WIDE_HEADS,
    "exaone": WIDE_HEADS,
    "exaone4": {**GROUPED, **TWO_KINDS},
    "falcon": {**TINY, "ffn_hidden_size": 64, "num_kv_heads": 3, "new_decoder_architecture": True},
    "flint": {**WIDE_HEADS, **TWO_KINDS},
    "gemma3n_text": {**WIDE_HEADS, **TWO_KINDS, **OWN_EMBEDDINGS, "num_kv_shared_layers": 0, "laurel_rank": 4},
    "gemma4_text": {**WIDE_HEADS, **TWO_KINDS, "hidden_size_per_layer_input": 0, "global_head_dim": 32},
    "gemma4_unified_text": {**WIDE_HEADS, **TWO_KINDS, "global_head_dim": 32},
    "glm": WIDE_HEADS,
    "glm4": WIDE_HEADS,
    "gpt_bigcode": {**TINY, **NO_DROPOUT, "n_inner": 64},
    "gpt_neo": {**MULTI_HEAD, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox_japanese": {**TINY, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gptj": {**TINY, **NO_DROPOUT, "n_inner": 64, "rotary_dim": 4},
    "granite_swa": {**GROUPED, **TWO_KINDS},
    "helium": {**GROUPED, "head_dim": 8},
    "hunyuan_v1_dense": WIDE_HEADS,
    "hyperclovax": {**GROUPED, "head_dim": 8},
    "internlm3": WIDE_HEADS,
    "iquestcoder": WIDE_HEADS,
    "jais2": WIDE_HEADS,
    "laguna": {
        **WIDE_HEADS,
        **TWO_KINDS,
        "mlp_layer_types": ["dense", "dense"],
        "num_attention_heads_per_layer": [6, 6],
    },
    "ministral": {**WIDE_HEADS, **TWO_KINDS},
    "ministral3": WIDE_HEADS,
    "modernbert-decoder": {**MULTI_HEAD, **TWO_KINDS},
    "moshi": {**TINY, "ffn_dim": 128, "num_key_value_heads": 3, "head_dim": 16},
    "mpt": TINY,
    "nanochat": GROUPED,
    "nemotron": WIDE_HEADS,
    "olmo": GROUPED,
    "olmo3": {**GROUPED, **TWO_KINDS},
    "openai-gpt": {**TINY, **NO_DROPOUT},
    "persimmon": MULTI_HEAD,
    "phi": GROUPED,
    "seed_oss": WIDE_HEADS,
    "starcoder2": GROUPED,
    "vaultgemma": {**WIDE_HEADS, **TWO_KINDS, "query_pre_attn_scalar": 24},
    "xglm": {**TINY, "ffn_dim": 64},
}

# What a type's config can say besides, by "type:what".
VARIANTS = {
    "falcon:multi-query": {**FAMILY_CONFIGS["falcon"], "new_decoder_architecture": False},
    "falcon:heads": {
        **FAMILY_CONFIGS["falcon"],
        "new_decoder_architecture": False,
        "multi_query": False,
        "num_kv_heads": 6,
    },
    "falcon:alibi": {**FAMILY_CONFIGS["falcon"], "new_decoder_architecture": False, "alibi": True},
    "gpt_bigcode:heads": {**FAMILY_CONFIGS["gpt_bigcode"], "multi_query": False},
    "gpt-sw3": {**TINY, **NO_DROPOUT},
    "cohere:norms": {**GROUPED, "use_qk_norm": True},
    "persimmon:plain": {**MULTI_HEAD, "qk_layernorm": False},
    "phi:norms": {**GROUPED, "qk_layernorm": True},
    "olmo:clipped": {**GROUPED, "clip_qkv": 0.5},
}

MORE = ("gemma3n_text",)  # blocks add more to the stream than their sites put out

IN_FLOAT32 = ("xglm",)  # transformers runs it in no wider type

SAMPLE = ("opt", "gpt2", "gemma3_text", "falcon")  # as unlike as can be; Llamas are all over the other tests


# Those whose configs are written so that transformers 4 reads them, too.
IN_BOTH = (
    *("opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox"),
    *("smollm3", "olmo2", "granite", "stablelm"),
)


def every_family(*without: str, among: Iterable[str] = FAMILY_CONFIGS, variants: bool = False) -> pytest.MarkDecorator:
    """Parametrizes a test with `model_type`: a sample of the types, and all the others where they are asked for."""
    names = [name for name in (*among, *(VARIANTS if variants else ())) if name not in without]
    marked = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]
    return pytest.mark.parametrize("model_type", marked)
