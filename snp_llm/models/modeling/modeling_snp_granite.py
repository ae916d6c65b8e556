"""Granite with its own number of heads and its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import GraniteConfig, GraniteForCausalLM

from .snp_blocks import rebuild_blocks


class SnpGraniteConfig(GraniteConfig):
    model_type = "snp_granite"


class SnpGraniteForCausalLM(GraniteForCausalLM):
    config_class = SnpGraniteConfig

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
