"""Gemma 3 with its own number of heads and its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from .snp_blocks import rebuild_blocks


class SnpGemma3TextConfig(Gemma3TextConfig):
    model_type = "snp_gemma3_text"


class SnpGemma3ForCausalLM(Gemma3ForCausalLM):
    config_class = SnpGemma3TextConfig

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
