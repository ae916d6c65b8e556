"""Blocks with widths of their own, for the modelling files beside this one; it travels with a pruned model.

`config.json` carries the widths under `pruned_layers`, in the schema of transformers' `per_layer_config`: a map from
block index to the config keys that differ there. All other keys keep their dense values; `head_dim` is explicit, since
it must stay what it was when the number of heads changes.
"""

from typing import Any


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


def changed_keys(config: Any, index: int) -> dict[str, Any]:
    """The config keys that differ in a block."""
    overrides = getattr(config, "pruned_layers", None) or {}
    return overrides.get(str(index), overrides.get(index, {}))


def rebuild_blocks(blocks: Any, config: Any) -> None:
    """Builds attention and FFN of every block anew from the config that holds there, in place.

    For families in which both modules take all their shapes from the config.
    """
    for index, block in enumerate(blocks):
        if changed := changed_keys(config, index):
            view = BlockConfig(config, changed)
            block.self_attn = type(block.self_attn)(view, index)
            block.mlp = type(block.mlp)(view)
