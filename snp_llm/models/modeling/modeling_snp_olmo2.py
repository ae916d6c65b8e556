"""OLMo 2 with its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import Olmo2Config, Olmo2ForCausalLM

from .snp_blocks import rebuild_blocks


class SnpOlmo2Config(Olmo2Config):
    model_type = "snp_olmo2"


class SnpOlmo2ForCausalLM(Olmo2ForCausalLM):
    config_class = SnpOlmo2Config

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
