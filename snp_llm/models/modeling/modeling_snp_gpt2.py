"""GPT-2 with its own number of heads and its own FFN width in every block; see snp_blocks.py.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Its config ties the head dimension to the number of heads, so the projections are replaced one by one.
"""

# mypy: ignore-errors

from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from .snp_blocks import changed_keys


class SnpGPT2Config(GPT2Config):
    model_type = "snp_gpt2"


class SnpGPT2LMHeadModel(GPT2LMHeadModel):
    config_class = SnpGPT2Config

    def __init__(self, config):
        super().__init__(config)
        d = config.hidden_size
        for index, block in enumerate(self.transformer.h):
            changed, attention, mlp = changed_keys(config, index), block.attn, block.mlp
            if "n_head" in changed:
                attention.num_heads = changed["n_head"]
                attention.split_size = attention.num_heads * attention.head_dim
                attention.c_attn = Conv1D(3 * attention.split_size, d)
                attention.c_proj = Conv1D(d, attention.split_size)
            if "n_inner" in changed:
                mlp.c_fc, mlp.c_proj = Conv1D(changed["n_inner"], d), Conv1D(d, changed["n_inner"])
        self.post_init()
