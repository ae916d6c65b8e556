"""Where the text model is in one that reads images or sounds as well, and in its config. Knows no type by its name."""

from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """What a config says of the model that writes text: a part of it, or all where there is nothing else."""
    found: PretrainedConfig = config.get_text_config(decoder=True)
    return found


def text_model(model: PreTrainedModel) -> nn.Module:
    """The part of a model that texts go through, whether its head is in it or not; all where there is nothing else."""
    return model if text_config(model.config) is model.config else model.get_decoder()


def text_modules(model: PreTrainedModel) -> set[nn.Module]:
    """All modules that texts go through, those of the head included; not towers, nor what projects their features."""
    head = model.get_output_embeddings()
    return {*text_model(model).modules(), *(() if head is None else head.modules())}


def parts_of(config: PretrainedConfig) -> dict[str, PretrainedConfig]:
    """The configs inside a config by their keys: of the text model, of towers."""
    return {key: value for key, value in vars(config).items() if isinstance(value, PretrainedConfig)}


def text_values(config: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Those of a config's nested values that are its text model's, to be read and written.

    Args:
        config: of a whole model.
        values: as its `to_dict` nests them.
    """
    text = text_config(config)
    while config is not text:
        inner = {key: part for key, part in parts_of(config).items() if text_config(part) is text}
        if not inner:
            break
        ((key, config),) = inner.items()
        values = values[key]
    return values
