"""SmolLM3 with its own number of heads and its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import SmolLM3Config, SmolLM3ForCausalLM

from .snp_blocks import rebuild_blocks


class SnpSmolLM3Config(SmolLM3Config):
    model_type = "snp_smollm3"


class SnpSmolLM3ForCausalLM(SmolLM3ForCausalLM):
    config_class = SnpSmolLM3Config

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
