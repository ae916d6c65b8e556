"""The decoder families, one entry each; docs/adding_a_family.md is the recipe. Tables, and the look-up in them."""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from snp_llm.models.families.family import EVERYWHERE, HERE, READ, VLLM, Family
from snp_llm.models.families.vision import VISION
from snp_llm.models.registry import auto_class, dense_type
from snp_llm.models.text_part import text_config
from snp_llm.runtime.errors import SnpError

# No config key keeps the size of heads when some go.
TIED: dict[str, Any] = {"head_dim_key": None}
ALIBI = "its ALiBi slopes belong to the number of heads"
JOINT_NORM = "a norm over all of them at once would change"
HYBRID: dict[str, Any] = {"kind": "hybrid"}
# Some blocks read the keys and values of an earlier one; both keep all of their heads.
SHARED: dict[str, Any] = {"needs_bos": True, "stays": "attention with keys that blocks share"}
LATENT: dict[str, Any] = {"kind": "MLA", "kv_heads_key": None}
MIXTURE: dict[str, Any] = {"kind": "mixture", "stays": "experts"}
TOWERS: dict[str, Any] = {"kind": "wrapper", "stays": "towers"}
SOME: dict[str, Any] = {"uniform": ("heads", "dense FFN")}  # experts that all tokens share have no key of their own
ALL: dict[str, Any] = {"engines": EVERYWHERE, "head_engines": EVERYWHERE}

FAMILIES = (
    Family("OPT", "opt", **TIED, engines=VLLM),
    Family("Llama", "llama", **ALL, divides_hidden=True, substitute="mistral"),
    Family("Mistral", "mistral", **ALL),
    # Its config has no head dimension of its own; transformers reads one that is there, other engines may divide.
    Family("Qwen2", "qwen2", engines=EVERYWHERE),
    Family("Qwen3", "qwen3", **ALL),
    Family("Gemma", "gemma", **ALL, needs_bos=True),
    Family("Gemma 2", "gemma2", **ALL, divides_hidden=True, needs_bos=True),
    Family("Gemma 3 text", "gemma3_text", **ALL, divides_hidden=True, needs_bos=True),
    Family("Phi-3", "phi3", engines=EVERYWHERE, head_engines=VLLM),
    Family("GPT-2", "gpt2", **TIED, engines=VLLM),
    Family("GPT-NeoX / Pythia", "gpt_neox", **TIED, engines=("transformers", "llama.cpp")),  # off in vLLM 0.32
    Family("SmolLM3", "smollm3", **ALL),
    Family("OLMo 2", "olmo2", **ALL, heads_stay=JOINT_NORM),
    Family("Granite", "granite", **ALL),
    Family("StableLM", "stablelm", **TIED, engines=EVERYWHERE),
    Family("Apertus", "apertus"),
    Family("Apertus 1.5 text", "apertus1p5_text"),
    Family("Arcee", "arcee", divides_hidden=True),
    Family("BioGPT", "biogpt", **TIED),
    Family("BLOOM", "bloom", **TIED, heads_stay=ALIBI),
    Family("CodeGen", "codegen", **TIED),
    Family("Cohere", "cohere"),
    Family("Cohere 2", "cohere2"),
    Family("Cohere Compass text", "cohere_compass_text"),
    Family("CTRL", "ctrl", **TIED),
    Family("CWM", "cwm", divides_hidden=True),
    Family("ERNIE 4.5", "ernie4_5", engines=VLLM, head_engines=VLLM),
    Family("EXAONE", "exaone", divides_hidden=True),
    Family("EXAONE 4", "exaone4"),
    Family("Falcon", "falcon", **TIED),
    Family("Gemma 3n text", "gemma3n_text", **SHARED, divides_hidden=True, uniform=()),  # its config lists FFN widths
    Family("Gemma 4 text", "gemma4_text", **SHARED, uniform=("FFN",)),
    Family("Gemma 4 unified text", "gemma4_unified_text", **SHARED, uniform=("FFN",)),
    Family("GLM", "glm"),
    Family("GLM-4", "glm4", engines=VLLM),
    Family("GPT-BigCode", "gpt_bigcode", **TIED),
    Family("GPT-J", "gptj", **TIED),
    Family("GPT-Neo", "gpt_neo", **TIED),
    Family("GPT-NeoX Japanese", "gpt_neox_japanese", **TIED),
    Family("Granite with sliding windows", "granite_swa"),
    Family("Helium", "helium", **TIED),  # its out-projection is as wide as the model
    Family("HunYuan dense", "hunyuan_v1_dense", **ALL),
    Family("HyperCLOVA X", "hyperclovax", divides_hidden=True),
    Family("InternLM 3", "internlm3", divides_hidden=True),
    Family("IQuest-Coder", "iquestcoder", divides_hidden=True),
    Family("Jais 2", "jais2", divides_hidden=True),
    Family("Ministral", "ministral"),
    Family("Ministral 3", "ministral3"),
    Family("ModernBERT decoder", "modernbert-decoder", **TIED),
    Family("Moshi", "moshi", divides_hidden=True),
    Family("MPT", "mpt", **TIED, heads_stay=ALIBI),
    Family("NanoChat", "nanochat"),
    Family("Nemotron", "nemotron"),
    Family("OLMo", "olmo", engines=EVERYWHERE, head_engines=VLLM),
    Family("OLMo 3", "olmo3", **ALL, heads_stay=JOINT_NORM),
    Family("OpenAI GPT", "openai-gpt", **TIED),
    Family("Persimmon", "persimmon", **TIED),
    Family("Phi", "phi"),
    Family("Seed-OSS", "seed_oss", **ALL),
    Family("StarCoder 2", "starcoder2", engines=EVERYWHERE),
    Family("VaultGemma", "vaultgemma", divides_hidden=True, needs_bos=True),
    Family("XGLM", "xglm", **TIED),
    Family("Bailing hybrid", "bailing_hybrid", **HYBRID, **SOME, kv_heads_key=None, stays="linear attention, experts"),
    Family("Bamba", "bamba", **HYBRID, stays="Mamba 2 mixers"),
    Family("Falcon-H1", "falcon_h1", **HYBRID, **ALL, stays="Mamba 2 mixers"),
    Family("Granite 4 hybrid", "granitemoehybrid", **HYBRID, engines=VLLM, stays="Mamba 2 mixers, experts"),
    Family("Jamba", "jamba", **HYBRID, uniform=("heads",), stays="Mamba mixers, experts"),
    Family("Kimi Linear", "kimi_linear", **HYBRID, **SOME, kv_heads_key=None, stays="linear attention, experts"),
    Family("LFM2", "lfm2", **HYBRID, engines=("transformers", "llama.cpp"), stays="short convolutions"),
    Family("LFM3", "lfm3", **HYBRID, stays="short convolutions"),
    Family("MiniMax", "minimax", **HYBRID, uniform=(), stays="lightning attention, experts"),
    Family("Nemotron-H", "nemotron_h", **HYBRID, engines=VLLM, head_engines=VLLM, stays="Mamba 2 mixers, experts"),
    Family("OLMo hybrid", "olmo_hybrid", **HYBRID, uniform=("FFN",), heads_stay=JOINT_NORM, stays="gated delta nets"),
    Family("Qwen3-Next", "qwen3_next", **HYBRID, stays="gated delta nets, experts"),
    Family("Qwen3.5 text", "qwen3_5_text", **HYBRID, stays="gated delta nets"),
    Family("RecurrentGemma", "recurrent_gemma", **HYBRID, uniform=("FFN",), stays="recurrences"),
    Family("A.X K1", "axk1", **LATENT, **SOME, stays="experts"),
    Family("DeepSeek-V2", "deepseek_v2", **LATENT, **SOME, stays="experts"),
    Family("DeepSeek-V3", "deepseek_v3", **LATENT, **SOME, stays="experts"),
    Family("GLM-4 MoE Lite", "glm4_moe_lite", **LATENT, **SOME, stays="experts"),
    Family("MiniCPM3", "minicpm3", **LATENT),
    Family("Sarvam MLA", "sarvam_mla", **LATENT, **SOME, stays="experts"),
    Family("Youtu", "youtu", **LATENT),
    Family("AFMoE", "afmoe", **MIXTURE, **SOME),
    Family("Beam", "beam", **MIXTURE),
    Family("Flint", "flint", **MIXTURE),
    Family("GPT-OSS", "gpt_oss", **MIXTURE, uniform=("heads",)),
    Family("Laguna", "laguna", **MIXTURE, uniform=("FFN",)),  # its config lists the heads of every block
    Family("Llama 4 text", "llama4_text", **MIXTURE, **SOME),
    Family("MiMo-V2 Flash", "mimo_v2_flash", **MIXTURE, uniform=("FFN",)),
    Family("Mixtral", "mixtral", **MIXTURE, uniform=("heads",)),
    Family("Qwen2 MoE", "qwen2_moe", **MIXTURE),
    Family("Qwen3 MoE", "qwen3_moe", **MIXTURE),
)

# They read images as well; their text models are what is pruned.
WRAPPERS = (
    Family("Aya Vision", "aya_vision", **TOWERS),
    Family("Gemma 3", "gemma3", **TOWERS),
    Family("Gemma 3n", "gemma3n", kind="wrapper", uniform=(), stays=f"towers, {SHARED['stays']}"),
    Family("Gemma 4", "gemma4", kind="wrapper", uniform=("FFN",), stays=f"towers, {SHARED['stays']}"),
    Family("GOT-OCR2", "got_ocr2", **TOWERS),
    Family("Idefics3", "idefics3", **TOWERS),
    Family("InternVL", "internvl", **TOWERS),
    Family("Llama 4", "llama4", kind="wrapper", **SOME, stays="towers, experts"),
    Family("Llava", "llava", **TOWERS),
    Family("Llava-Next", "llava_next", **TOWERS),
    Family("Llava-OneVision", "llava_onevision", **TOWERS),
    Family("Mistral 3", "mistral3", **TOWERS),
    Family("PaliGemma", "paligemma", **TOWERS),
    Family("Qwen2.5-VL", "qwen2_5_vl", **TOWERS, uniform=("FFN",)),
    Family("Qwen3-VL", "qwen3_vl", **TOWERS),
    Family("Qwen3.5", "qwen3_5", kind="wrapper", stays="towers, gated delta nets"),
    Family("SmolVLM", "smolvlm", **TOWERS),
    Family("VipLlava", "vipllava", **TOWERS),
)

# Config keys that a type may have, the first of each that is there counts.
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
# Keys of the width of experts that only some tokens come by, and of how many there are.
EXPERT_KEYS = (
    ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "intermediate_size"),
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
)
# Keys that make the FFN's width another number than its key says, and the value with which it is that number.
FFN_AS_SAID = {"block_auto_adjust_ff_dim": False}


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model's text, by its config's `model_type`, never by its name.

    What loads it in other widths was looked up for models of text alone; with towers it is transformers.

    Raises:
        SnpError: no model that transformers lets write text or classify images has the config's type; it classifies
            images by a tower of two.
    """
    text = text_config(config)
    if auto_class(config).__name__ == "AutoModelForImageClassification" and text is not config:
        raise SnpError(
            f"model_type {config.model_type!r} is not supported: it classifies images by the tower of a model of two, "
            "in whose config it is only a part; expected one whose own config says what its blocks are, such as a ViT."
        )
    family = family_of(text)
    return family if text is config else replace(family, engines=HERE, head_engines=HERE)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a text model, or of a part of one, by its own config.

    A type without an entry gets one from its config's keys, and so does one whose blocks may differ; whether blocks are
    known shows in modules.
    """
    model_type, keys = dense_type(config), config.to_dict()
    known = next((family for family in (*FAMILIES, *VISION) if family.model_type == model_type), None)
    family = known or Family(model_type, model_type, checked=False)
    if not family.alike:
        family = replace(
            family, kv_heads_key=READ, ffn_key=READ, head_dim_key="head_dim" if "head_dim" in keys else None
        )
    names = {"heads_key": HEADS_KEYS, "kv_heads_key": KV_HEADS_KEYS, "ffn_key": FFN_KEYS}
    found: dict[str, Any] = {
        field: next((name for name in usual if name in keys), HEADS_KEYS[0] if usual is HEADS_KEYS else None)
        for field, usual in names.items()
        if getattr(family, field) == READ
    }
    if keys.get("qk_layernorm"):  # as wide as the hidden size shared by all heads, whatever their size
        found["head_dim_key"] = None
    return replace(family, **found, heads_stay=family.heads_stay or (ALIBI if keys.get("alibi") else ""))
