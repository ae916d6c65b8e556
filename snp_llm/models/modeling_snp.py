"""Models with their own number of heads and their own FFN width in every block; this file travels with them.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

needs nothing but transformers. `config.json` carries the widths under `pruned_layers`, in the schema of transformers'
`per_layer_config`: a map from block index to the config keys that differ there. All other keys keep their dense values;
where there is a `head_dim` it is explicit, since it must stay what it was when the number of heads changes.

The classes have the names of those in transformers with "Snp" in front, and come about when they are asked for:
`SnpLlamaForCausalLM` is `LlamaForCausalLM` with other blocks, and its config, `SnpLlamaConfig`, is a `LlamaConfig`.
"""

# mypy: ignore-errors

from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Families whose config ties the head dimension to the number of heads, so that a block's attention cannot be built from
# it. By config key: the projections whose outputs it counts, and the one whose inputs it counts.
TIED = {
    "opt": {
        "num_attention_heads": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
        "ffn_dim": (("fc1",), "fc2"),
    },
    "gpt2": {"n_head": (("attn.c_attn",), "attn.c_proj"), "n_inner": (("mlp.c_fc",), "mlp.c_proj")},
    "gpt_neox": {
        "num_attention_heads": (("attention.query_key_value",), "attention.dense"),
        "intermediate_size": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
    },
    "stablelm": {
        "num_attention_heads": (("self_attn.q_proj",), "self_attn.o_proj"),
        "num_key_value_heads": (("self_attn.k_proj", "self_attn.v_proj"), None),
        "intermediate_size": (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    },
}
# By config key: the attributes of attention modules that grow with it.
COUNTS = {
    "num_attention_heads": ("num_heads",),
    "n_head": ("num_heads", "split_size"),
    "num_key_value_heads": ("num_key_value_heads",),
}


class BlockConfig:
    """A model's config as one block sees it: a few keys changed, all else read through, also when it changes later.

    A copy would keep the attention implementation of the day on which it was made.
    """

    def __init__(self, config: Any, changed: dict[str, Any]) -> None:
        self.__dict__.update(_config=config, **changed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for by copy and pickle before there is a config
            raise AttributeError(name)
        return getattr(self._config, name)


class Pruned:
    """What a pruned model's class has before the class of transformers that it derives from."""

    def __init__(self, config):
        super().__init__(config)
        tied = TIED.get(config.model_type.removeprefix("snp_"))
        overrides = getattr(config, "pruned_layers", None) or {}
        blocks = next(module for module in self.modules() if isinstance(module, nn.ModuleList))
        for index, block in enumerate(blocks):
            changed = overrides.get(str(index), overrides.get(index, {}))
            if tied:
                resize_block(block, tied, config, changed)
            elif changed:
                view = BlockConfig(config, changed)
                block.self_attn = type(block.self_attn)(view, index)
                block.mlp = type(block.mlp)(view)
        self.post_init()


def resize_block(block: nn.Module, tied: dict[str, tuple], config: PretrainedConfig, changed: dict[str, int]) -> None:
    """Replaces the projections of a block by ones of other widths, and the head counts of its attention, in place."""
    for key, width in changed.items():
        dense, (inwards, outwards) = getattr(config, key), tied[key]
        module = block.get_submodule(inwards[0].rpartition(".")[0])
        for path in inwards:
            resize(block, path, outputs=(width, dense))
        if outwards:
            resize(block, outwards, inputs=(width, dense))
        for name in COUNTS.get(key, ()):
            if hasattr(module, name):
                setattr(module, name, getattr(module, name) * width // dense)
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = module.num_heads // module.num_key_value_heads


def resize(block: nn.Module, path: str, outputs: tuple[int, int] = (1, 1), inputs: tuple[int, int] = (1, 1)) -> None:
    """Replaces a projection of a block, in place, by one with fractions (new, old) of its outputs and inputs."""
    old = block.get_submodule(path)
    rows, columns = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
    rows, columns = rows * outputs[0] // outputs[1], columns * inputs[0] // inputs[1]
    new = Conv1D(rows, columns) if isinstance(old, Conv1D) else nn.Linear(columns, rows, bias=old.bias is not None)
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, new)


@cache
def __getattr__(name: str) -> type:
    """The class of a config or a model, by its name: "Snp" and that of a class of transformers."""
    base = getattr(transformers, name.removeprefix("Snp"), None) if name.startswith("Snp") else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        return type(name, (base,), {"model_type": f"snp_{base.model_type}", "_auto_class": "AutoConfig"})
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        if name == "SnpGPTNeoXForCausalLM" and transformers.__version__.startswith("4."):
            # It calls the head by another name, and would leave it random.
            raise ImportError("GPT-NeoX with widths of its own in every block: expected transformers 5")
        config_class = __getattr__(f"Snp{base.config_class.__name__}")
        return type(name, (Pruned, base), {"config_class": config_class, "_auto_class": "AutoModelForCausalLM"})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
