"""The decoder families, one entry each; docs/adding_a_family.md is the recipe. Tables, and the look-up in them."""

from transformers import PretrainedConfig

from snp_llm.models.families.family import Family
from snp_llm.runtime.errors import SnpError

# Config keys that a mixture of experts has, whatever it is called.
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")

FAMILIES = (
    Family(
        name="OPT",
        model_type="opt",
        blocks="model.decoder.layers",
        attention_out="self_attn.out_proj",
        ffn_in=("fc1",),
        ffn_out="fc2",
        kv_heads_key=None,
        ffn_key="ffn_dim",
        head_dim_key=None,
        engines=("transformers", "vLLM"),
    ),
    Family(name="Llama", model_type="llama", divides_hidden=True, substitute="mistral"),
    Family(name="Mistral", model_type="mistral"),
    # Its config has no head dimension of its own; transformers reads one that is there, other engines may divide.
    Family(name="Qwen2", model_type="qwen2", head_engines=("transformers",)),
    Family(name="Qwen3", model_type="qwen3"),
    Family(name="Gemma", model_type="gemma", needs_bos=True),
    Family(name="Gemma 2", model_type="gemma2", divides_hidden=True, needs_bos=True),
    Family(name="Gemma 3 text", model_type="gemma3_text", divides_hidden=True, needs_bos=True),
    Family(
        name="Phi-3",
        model_type="phi3",
        qkv=("self_attn.qkv_proj",),
        qkv_layout="fused",
        ffn_in=("mlp.gate_up_proj",),
        head_engines=("transformers", "vLLM"),
    ),
    Family(
        name="GPT-2",
        model_type="gpt2",
        blocks="transformer.h",
        attention="attn",
        qkv=("attn.c_attn",),
        qkv_layout="fused",
        attention_out="attn.c_proj",
        ffn_in=("mlp.c_fc",),
        ffn_out="mlp.c_proj",
        heads_key="n_head",
        kv_heads_key=None,
        ffn_key="n_inner",
        head_dim_key=None,
        engines=("transformers", "vLLM"),
    ),
    Family(
        name="GPT-NeoX / Pythia",
        model_type="gpt_neox",
        blocks="gpt_neox.layers",
        attention="attention",
        qkv=("attention.query_key_value",),
        qkv_layout="interleaved",
        attention_out="attention.dense",
        head_dim="head_size",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        kv_heads_key=None,
        head_dim_key=None,
    ),
    Family(name="SmolLM3", model_type="smollm3"),
    Family(name="OLMo 2", model_type="olmo2", joint_norms=("self_attn.q_norm", "self_attn.k_norm")),
    Family(name="Granite", model_type="granite"),
    Family(
        name="StableLM",
        model_type="stablelm",
        joint_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
        head_dim_key=None,
    ),
)


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model, by its config's `model_type`, never by its name.

    Raises:
        SnpError: a mixture of experts, an encoder, an encoder-decoder or an otherwise unsupported architecture.
    """
    for family in FAMILIES:
        if config.model_type in (family.model_type, family.pruned_type):
            return family
    if experts := next((key for key in EXPERT_KEYS if getattr(config, key, None)), None):
        raise SnpError(
            f"model_type {config.model_type!r} is a mixture of experts ({experts} = {getattr(config, experts)}); "
            "expected a dense decoder. Its experts are not FFN units; they cannot be pruned here."
        )
    supported = ", ".join(family.model_type for family in FAMILIES)
    raise SnpError(
        f"model_type {config.model_type!r} is not supported; expected a decoder-only model: {supported}. "
        "docs/adding_a_family.md shows how to add one."
    )
