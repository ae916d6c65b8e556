"""The decoder families, one entry each; docs/adding_a_family.md is the recipe. Tables, and the look-up in them."""

from dataclasses import replace

from transformers import PretrainedConfig

from snp_llm.models.families.family import Family
from snp_llm.models.registry import auto_class, dense_type
from snp_llm.models.text_part import text_config

FAMILIES = (
    Family(
        name="OPT",
        model_type="opt",
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
    Family(name="Phi-3", model_type="phi3", head_engines=("transformers", "vLLM")),
    Family(
        name="GPT-2",
        model_type="gpt2",
        heads_key="n_head",
        kv_heads_key=None,
        ffn_key="n_inner",
        head_dim_key=None,
        engines=("transformers", "vLLM"),
    ),
    Family(name="GPT-NeoX / Pythia", model_type="gpt_neox", kv_heads_key=None, head_dim_key=None),
    Family(name="SmolLM3", model_type="smollm3"),
    Family(name="OLMo 2", model_type="olmo2"),
    Family(name="Granite", model_type="granite"),
    Family(name="StableLM", model_type="stablelm", head_dim_key=None),
)

# Config keys that a type without an entry may have, the first of each that is there counts.
HEADS_KEYS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
KV_HEADS_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
FFN_KEYS = (
    "intermediate_size",
    "intermediate_size_mlp",
    "shared_intermediate_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
    "inner_dim",
    "d_ff",
    "dff",
)


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model's text, by its config's `model_type`, never by its name.

    What loads it in other widths was looked up for models of text alone; with towers it is transformers.

    Raises:
        SnpError: no model that transformers lets write text has the config's type.
    """
    auto_class(config)
    text = text_config(config)
    family = family_of(text)
    return family if text is config else replace(family, engines=("transformers",), head_engines=("transformers",))


def family_of(config: PretrainedConfig) -> Family:
    """The family of a text model, or of a part of one, by its own config.

    A type without an entry gets one from its config's keys; whether its blocks are known shows in its modules.
    """
    model_type = dense_type(config)
    for family in FAMILIES:
        if model_type == family.model_type:
            return family
    keys = config.to_dict()

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in keys), None)

    return Family(
        name=model_type,
        model_type=model_type,
        heads_key=first(HEADS_KEYS) or HEADS_KEYS[0],
        kv_heads_key=first(KV_HEADS_KEYS),
        ffn_key=first(FFN_KEYS),
        head_dim_key="head_dim" if "head_dim" in keys else None,
        engines=("transformers",),
        head_engines=("transformers",),
        checked=False,
    )
