"""GPT-NeoX (Pythia) with its own number of heads and its own FFN width in every block; see snp_blocks.py.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Its config ties the head dimension to the number of heads, so the attention projections are replaced one by one.
"""

# mypy: ignore-errors

from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, __version__

from .snp_blocks import BlockConfig, changed_keys


class SnpGPTNeoXConfig(GPTNeoXConfig):
    model_type = "snp_gpt_neox"


class SnpGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    config_class = SnpGPTNeoXConfig

    def __init__(self, config):
        super().__init__(config)
        if __version__.startswith("4."):  # calls the head by another name, and would leave it random
            raise ImportError("GPT-NeoX with widths of its own in every block: expected transformers 5")
        for index, block in enumerate(self.gpt_neox.layers):
            changed, attention = changed_keys(config, index), block.attention
            if "num_attention_heads" in changed:
                width = changed["num_attention_heads"] * attention.head_size
                attention.query_key_value = nn.Linear(config.hidden_size, 3 * width, bias=config.attention_bias)
                attention.dense = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
            if "intermediate_size" in changed:
                block.mlp = type(block.mlp)(BlockConfig(config, changed))
        self.post_init()
