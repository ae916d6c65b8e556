"""Compact models made known to vLLM, which calls `register` in each of its processes where this package is installed.

What it imports takes no time where no such model is served.
"""

MODELS = "snp_llm.engines.vllm_models"

# Compact models' classes, and the class of vLLM's that computes what each does: by the name of its module, and its own.
CLASSES = {
    "SnpLlamaForCausalLM": ("llama", "LlamaForCausalLM"),
    "SnpMistralForCausalLM": ("mistral", "MistralForCausalLM"),
    "SnpMinistral3ForCausalLM": ("mistral", "MistralForCausalLM"),
    "SnpQwen2ForCausalLM": ("llama", "LlamaForCausalLM"),  # its own has no place for a head dimension
    "SnpQwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM"),
    "SnpPhi3ForCausalLM": ("phi3", "Phi3ForCausalLM"),
    "SnpGraniteForCausalLM": ("granite", "GraniteForCausalLM"),
    "SnpGemmaForCausalLM": ("gemma", "GemmaForCausalLM"),
    "SnpErnie4_5ForCausalLM": ("ernie45", "Ernie4_5ForCausalLM"),
    "SnpExaone4ForCausalLM": ("exaone4", "Exaone4ForCausalLM"),
    "SnpGlm4ForCausalLM": ("glm4", "Glm4ForCausalLM"),
    "SnpNemotronForCausalLM": ("nemotron", "NemotronForCausalLM"),
    "SnpApertusForCausalLM": ("apertus", "ApertusForCausalLM"),
    "SnpCohereForCausalLM": ("commandr", "CohereForCausalLM"),
    "SnpOPTForCausalLM": ("opt", "OPTForCausalLM"),
}


def register() -> None:
    """Registers the classes of compact models with vLLM; the entry point `vllm.general_plugins`."""
    from vllm import ModelRegistry

    import snp_llm.models.registry  # noqa: F401, lets transformers read the configs

    for name in CLASSES:
        ModelRegistry.register_model(name, f"{MODELS}:{name}")
