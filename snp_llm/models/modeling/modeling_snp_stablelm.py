"""StableLM with its own number of heads and its own FFN width in every block; see snp_blocks.py.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Its config ties the head dimension to the number of heads, so the attention projections are replaced one by one.
"""

# mypy: ignore-errors

from torch import nn
from transformers import StableLmConfig, StableLmForCausalLM

from .snp_blocks import BlockConfig, changed_keys


class SnpStableLmConfig(StableLmConfig):
    model_type = "snp_stablelm"


class SnpStableLmForCausalLM(StableLmForCausalLM):
    config_class = SnpStableLmConfig

    def __init__(self, config):
        super().__init__(config)
        d, bias = config.hidden_size, config.use_qkv_bias
        for index, block in enumerate(self.model.layers):
            changed, attention = changed_keys(config, index), block.self_attn
            if "num_attention_heads" in changed or "num_key_value_heads" in changed:
                heads = changed.get("num_attention_heads", config.num_attention_heads)
                groups = changed.get("num_key_value_heads", config.num_key_value_heads)
                attention.num_heads, attention.num_key_value_heads = heads, groups
                attention.num_key_value_groups = heads // groups
                attention.q_proj = nn.Linear(d, heads * attention.head_dim, bias=bias)
                attention.k_proj = nn.Linear(d, groups * attention.head_dim, bias=bias)
                attention.v_proj = nn.Linear(d, groups * attention.head_dim, bias=bias)
                attention.o_proj = nn.Linear(heads * attention.head_dim, d, bias=False)
            if "intermediate_size" in changed:
                block.mlp = type(block.mlp)(BlockConfig(config, changed))
        self.post_init()
