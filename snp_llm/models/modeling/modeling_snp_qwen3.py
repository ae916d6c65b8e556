"""Qwen3 with its own number of heads and its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import Qwen3Config, Qwen3ForCausalLM

from .snp_blocks import rebuild_blocks


class SnpQwen3Config(Qwen3Config):
    model_type = "snp_qwen3"


class SnpQwen3ForCausalLM(Qwen3ForCausalLM):
    config_class = SnpQwen3Config

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
