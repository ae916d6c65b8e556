"""OPT with its own number of heads and its own FFN width in every block.

This file travels with a pruned model and needs nothing but transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

`config.json` carries the widths under `pruned_layers`, in the schema of transformers' `per_layer_config`: a map from
block index to the config keys that differ there. All other keys keep their dense values; in particular the head
dimension stays `hidden_size / num_attention_heads`.
"""

# mypy: ignore-errors

from torch import nn
from transformers import OPTConfig, OPTForCausalLM


class SnpOPTConfig(OPTConfig):
    model_type = "snp_opt"


class SnpOPTForCausalLM(OPTForCausalLM):
    config_class = SnpOPTConfig

    def __init__(self, config):
        super().__init__(config)
        overrides = getattr(config, "pruned_layers", None) or {}
        head_dim = config.hidden_size // config.num_attention_heads
        for index, block in enumerate(self.model.decoder.layers):
            override = overrides.get(str(index), overrides.get(index, {}))
            heads = override.get("num_attention_heads", config.num_attention_heads)
            ffn_dim = override.get("ffn_dim", config.ffn_dim)
            attention, d, bias = block.self_attn, config.hidden_size, config.enable_bias
            if heads != config.num_attention_heads:
                attention.num_heads = heads
                attention.q_proj = nn.Linear(d, heads * head_dim, bias=bias)
                attention.k_proj = nn.Linear(d, heads * head_dim, bias=bias)
                attention.v_proj = nn.Linear(d, heads * head_dim, bias=bias)
                attention.out_proj = nn.Linear(heads * head_dim, d, bias=bias)
            if ffn_dim != config.ffn_dim:
                block.fc1 = nn.Linear(d, ffn_dim, bias=bias)
                block.fc2 = nn.Linear(ffn_dim, d, bias=bias)
        self.post_init()
