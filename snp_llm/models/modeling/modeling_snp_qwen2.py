"""Qwen2 with its own number of heads and its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import Qwen2Config, Qwen2ForCausalLM

from .snp_blocks import rebuild_blocks


class SnpQwen2Config(Qwen2Config):
    model_type = "snp_qwen2"


class SnpQwen2ForCausalLM(Qwen2ForCausalLM):
    config_class = SnpQwen2Config

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
