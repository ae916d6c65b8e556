"""Gemma 2 with its own number of heads and its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import Gemma2Config, Gemma2ForCausalLM

from .snp_blocks import rebuild_blocks


class SnpGemma2Config(Gemma2Config):
    model_type = "snp_gemma2"


class SnpGemma2ForCausalLM(Gemma2ForCausalLM):
    config_class = SnpGemma2Config

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
