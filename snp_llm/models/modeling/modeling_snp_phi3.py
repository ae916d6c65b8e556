"""Phi-3 with its own number of heads and its own FFN width in every block; see snp_blocks.py.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

# mypy: ignore-errors

from transformers import Phi3Config, Phi3ForCausalLM

from .snp_blocks import rebuild_blocks


class SnpPhi3Config(Phi3Config):
    model_type = "snp_phi3"


class SnpPhi3ForCausalLM(Phi3ForCausalLM):
    config_class = SnpPhi3Config

    def __init__(self, config):
        super().__init__(config)
        rebuild_blocks(self.model.layers, config)
        self.post_init()
