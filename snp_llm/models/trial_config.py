"""Whether a plain config with other numbers in it builds a decoder with other widths, and nothing else that differs.

Config keys say by their names what they are for, not how far they reach: an FFN's may be the experts' as well, and head
counts may fix the size of a head. Built on the meta device, in a second at most, a model shows it.
"""

import json
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from snp_llm.models.modeling_snp import resize_block
from snp_llm.models.registry import auto_class


def as_text(values: dict[str, Any]) -> str:
    """A config's values as text, by which `says` knows models that it has tried."""
    return json.dumps(values, sort_keys=True, default=str)


@lru_cache(maxsize=256)
def says(model_type: str, values: str, changed: str, structure: str, part: str) -> bool:
    """Whether keys of a plain config are the widths of some blocks, and of nothing else.

    Args:
        model_type: of the config.
        values: of the config for the dense model, as `as_text` gives them.
        changed: of the config with other numbers, likewise.
        structure: of the dense model, as text.
        part: which blocks get narrower, and how: `of` is "attention", "ffn" or "experts", `was` what `structure`
            says of it there, `new` the widths by the keys of `structure`; as text.
    """
    wanted = json.loads(part)
    try:
        expected = _skeleton(AutoConfig.for_model(model_type, **json.loads(values)))
        described = json.loads(structure)
        blocks = expected.get_submodule(described["blocks"])
        for kind in described["parts"]:
            here = kind.get(wanted["of"])
            if here is not None and all(here[name] == value for name, value in wanted["was"].items()):
                for index in kind["of"]:
                    resize_block(blocks.get_submodule(str(index)), kind, expected.config, wanted["new"])
        return alike(expected, _skeleton(AutoConfig.for_model(model_type, **json.loads(changed))))
    except Exception:  # whatever the class says of values that do not fit together
        return False


def alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same tensors, and attentions that scale what they compute alike."""
    return _shapes(one) == _shapes(other) and _scales(one) == _scales(other)


def builds(config: PretrainedConfig, dense: PreTrainedModel, prefix: str, blocks: nn.ModuleList) -> bool:
    """Whether transformers makes of a config a model with these blocks and, but for them, as the dense one is.

    Args:
        config: a plain one.
        dense: the dense model.
        prefix: path of its blocks.
        blocks: pruned, to take their place.
    """
    try:
        model = _skeleton(config)
    except Exception:
        return False
    if not alike(model.get_submodule(prefix), blocks):
        return False
    rest = [{k: v for k, v in _shapes(m).items() if not k.startswith(f"{prefix}.")} for m in (model, dense)]
    return rest[0] == rest[1]


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
    return model


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.shape for name, tensor in tensors}


def _scales(module: nn.Module) -> dict[tuple[str, str], float]:
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if isinstance(value, float)
    }
