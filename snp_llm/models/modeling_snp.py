"""Models with their own number of heads and their own FFN width in every block; this file travels with them.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

needs nothing but transformers; models that read images as well have an Auto class of their own, which `config.json`
names. It carries the widths under `pruned_layers`, in the schema of transformers' `per_layer_config`: a map from block
index to the config keys that differ there; a convolutional network's are rows and columns by module, under
`pruned_shapes`. All other keys keep their dense values; where there is a `head_dim` it is
explicit, since it must stay what it was when the number of heads changes. What a head or a channel is in the tensors of
a block stands under `pruned_structure`.

The classes have the names of those in transformers with "Snp" in front, and come about when they are asked for:
`SnpLlamaForCausalLM` is `LlamaForCausalLM` with other blocks, and its config, `SnpLlamaConfig`, is a `LlamaConfig`.
"""

# mypy: ignore-errors

import sys
from functools import cache
from typing import Any

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# In the order in which they are looked up: the whole model before its text alone.
AUTO_CLASSES = (
    *("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM"),
    "AutoModelForImageClassification",
)

# Of what is in a model: its body, and that with another head, for fine-tuning.
OTHER_AUTO_CLASSES = (
    *("AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"),
    "AutoModelForQuestionAnswering",
)

DESCRIBE = {}  # how `pruned_structure` is read off a model; known where the package is

# Attributes of attention modules that hold head counts, and channels of all heads together.
QUERY_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
GROUP_SIZES = ("num_key_value_groups", "n_rep")
CHANNELS = ("split_size", "embed_dim", "hidden_size", "all_head_size", "inner_dim")


class NoHeads(nn.Module):
    """Stands where an attention was whose heads are all gone: what it adds is the bias of its out-projection.

    The cache is told how many tokens came by, which a model may ask of any block.
    """

    def __init__(self, attention: nn.Module, name: str, out: nn.Module) -> None:
        super().__init__()
        self.layer_idx = getattr(attention, "layer_idx", None)
        self.add_module(name, out)

    def forward(self, hidden_states, *args, **kwargs):
        (out,) = self.children()
        cache = next((value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")), None)
        if cache is not None and self.layer_idx is not None:
            token = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(token, token, self.layer_idx)
        return out(hidden_states[..., :0]), None


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
        shapes = getattr(config, "pruned_shapes", None)
        if shapes is not None:
            for path, (rows, columns) in shapes.items():
                resize(self, path, rows=rows, columns=columns)
            self.post_init()
            return
        structure = getattr(config, "pruned_structure", None)
        if structure is None:  # a folder of an earlier version, read by a later one
            structure = config.pruned_structure = DESCRIBE["model"](self)
        path, body = structure["blocks"], f"{self.base_model_prefix}."
        if self.base_model is self and path.startswith(body):  # the body alone, without what is around it
            path = path.removeprefix(body)
        blocks, overrides = self.get_submodule(path), getattr(config, "pruned_layers", None) or {}
        for part in structure["parts"]:
            for index in part["of"]:
                changed = overrides.get(str(index), overrides.get(index))
                if changed:
                    resize_block(blocks[index], part, config, changed)
        self.post_init()

    def initialize_weights(self):
        """Computes what no file holds, as of a class of transformers' own.

        Of code that it takes for foreign, transformers passes over modules without tensors, some of which, such as
        Falcon-H1's model, compute what their children hold; that would stay whatever was in memory.
        """
        self.is_custom_code = self.is_remote_code = lambda: False
        try:
            super().initialize_weights()
        finally:
            del self.is_custom_code, self.is_remote_code

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        stock = cls.__mro__[cls.__mro__.index(Pruned) + 1]  # it looks for an answer in the file of its class
        return stock._can_set_attn_implementation()


def resize_block(block: nn.Module, part: dict[str, Any], config: PretrainedConfig, changed: dict[str, int]) -> None:
    """Gives a block the widths that differ from the config's, in place.

    Args:
        block: as the config says.
        part: of `pruned_structure`: where attention, FFN and experts of such a block are, and how many rows a head or a
            channel has in every projection.
        config: the model's.
        changed: widths by config key.
    """
    ffn, attention, experts = part.get("ffn"), part.get("attention"), part.get("experts")
    if experts:
        pairs = zip(experts["keys"], experts["widths"], strict=True)
        resize_experts(block, experts, *(changed.get(key, old) for key, old in pairs))
    if ffn and ffn["key"] in changed:
        width = changed[ffn["key"]]
        for path, rows in ffn["rows"].items():
            resize(block, path, rows=rows * width)
        resize(block, ffn["out"], columns=width)
    if attention and any(key in changed for key in attention["keys"]):
        size, module = attention["size"], block.get_submodule(attention["module"])
        (query_key, key_value_key), (query, key_value) = attention["keys"], attention["heads"]
        queries = changed.get(query_key, query)
        if not queries:
            resize(block, attention["out"], columns=0)
            name, out = attention["out"].removeprefix(f"{attention['module']}."), block.get_submodule(attention["out"])
            block.set_submodule(attention["module"], NoHeads(module, name, out))
            return
        shared = queries if query == key_value else key_value  # where the config has no key for it
        keys = changed.get(key_value_key, key_value) if key_value_key else shared
        for path, (per_query, per_key) in attention["rows"].items():
            resize(block, path, rows=per_query * queries + per_key * keys)
        resize(block, attention["out"], columns=size * queries)
        set_head_counts(module, (query, key_value), (queries, keys), size)
        if hasattr(module, "config"):  # some read it on every call
            module.config = BlockConfig(module.config, changed)


def resize_experts(block: nn.Module, facts: dict[str, Any], channels: int, count: int) -> None:
    """Gives a block so many experts of so many channels each, in place; values do not matter.

    Args:
        block: as the config says.
        facts: of `pruned_structure`: stacked tensors with the dimension of channels and entries of each there, and the
            router's with that of experts.
        channels, count: that there are now.
    """
    old_channels, old_count = facts["widths"]
    module = block.get_submodule(facts["module"])
    for path, (dimension, times) in facts["channels"].items():
        if getattr(module, path.rpartition(".")[2], None) is not None:
            resize_along(block, path, {0: count, dimension: times * channels})
    if channels != old_channels:
        set_counts(module, ("intermediate", "expert_dim"), old_channels, channels)
    if count != old_count:
        beside = [path for path, _ in module.named_parameters() if path not in facts["channels"]]
        for path in (f"{facts['module']}.{name}" for name in beside if name.endswith("down_proj_bias")):
            resize_along(block, path, {0: count})
        for path, dimension in facts["rows"].items():
            resize_along(block, path, {dimension: count})
        outer = block.get_submodule(facts["module"].rpartition(".")[0])
        for part in outer.modules():
            set_counts(part, ("experts", "out_features"), old_count, count)


def set_counts(module: nn.Module, words: tuple[str, ...], old: int, new: int) -> None:
    """Whatever numbers a module keeps under names with such a word, where they are the old one."""
    for name, value in list(vars(module).items()):
        if type(value) is int and value == old and any(word in name for word in words) and "per_tok" not in name:
            setattr(module, name, new)


def resize_along(block: nn.Module, path: str, sizes: dict[int, int]) -> None:
    """Gives a tensor of a block so many entries in some of its dimensions, in place; values do not matter."""
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    old = getattr(owner, name)
    new = old.new_empty([sizes.get(dimension, size) for dimension, size in enumerate(old.shape)])
    setattr(owner, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)


def set_head_counts(attention: nn.Module, old: tuple[int, int], new: tuple[int, int], size: int) -> None:
    """Whatever an attention module keeps of its head counts; its scaling stays, since the head dimension does.

    Args:
        attention: the module.
        old: query and key-value heads that it had.
        new: that it has now.
        size: channels of a head.
    """
    for names, count in (
        (QUERY_COUNTS, new[0]),
        (KEY_VALUE_COUNTS, new[1]),
        (GROUP_SIZES, new[0] // new[1]),
    ):
        for name in names:
            if isinstance(getattr(attention, name, None), int):
                setattr(attention, name, count)
    for name in CHANNELS:
        if getattr(attention, name, None) == old[0] * size:
            setattr(attention, name, new[0] * size)


def resize(block: nn.Module, path: str, rows: int | None = None, columns: int | None = None) -> None:
    """Gives a projection of a block, or another tensor, so many rows or columns, in place; values do not matter."""
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    old = getattr(owner, name)
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(old.new_empty(rows, *old.shape[1:]), requires_grad=False))
    elif isinstance(old, nn.Conv2d):
        height, width = rows or old.weight.shape[0], columns or old.weight.shape[1]
        old.weight = nn.Parameter(old.weight.new_empty(height, width, *old.kernel_size), old.weight.requires_grad)
        old.out_channels, old.in_channels = height, width
        if old.bias is not None:
            old.bias = nn.Parameter(old.bias.new_empty(height), requires_grad=old.bias.requires_grad)
    elif isinstance(old, nn.Linear | Conv1D):
        turned = isinstance(old, Conv1D)
        shape = old.weight.shape[::-1] if turned else old.weight.shape
        height = shape[0] if rows is None else rows
        width = shape[1] if columns is None else columns
        if turned and not height * width:  # it does not run on nothing
            new = nn.Linear(1, 1, bias=old.bias is not None)
            new.weight, new.bias = old.weight, old.bias
            owner.set_submodule(name, old := new)
            turned = False
        new = old.weight.new_empty((width, height) if turned else (height, width))
        old.weight = nn.Parameter(new, requires_grad=old.weight.requires_grad)
        old.nx, old.nf = width, height  # of a Conv1D; a Linear has the other two
        old.in_features, old.out_features = width, height
        if old.bias is not None:
            old.bias = nn.Parameter(old.bias.new_empty(height), requires_grad=old.bias.requires_grad)
    else:  # a norm with values for every head, or channel
        for key, tensor in list(old.named_parameters(recurse=False)):
            setattr(old, key, nn.Parameter(tensor.new_empty(rows, *tensor.shape[1:]), requires_grad=False))
        for key, tensor in list(old.named_buffers(recurse=False)):
            if tensor.dim():
                setattr(old, key, tensor.new_empty(rows, *tensor.shape[1:]))
        if hasattr(old, "num_features"):
            old.num_features = rows


def auto_classes(model_type: str) -> list[str]:
    """The Auto classes that make a whole model of a type; the first is the one to load it with.

    Some types have a class for their text alone as well, which the causal Auto class would load without the towers.
    """
    known = {auto: getattr(transformers, auto, None) for auto in AUTO_CLASSES}
    names = {auto: kind._model_mapping._model_mapping.get(model_type) for auto, kind in known.items() if kind}
    whole = next((name for name in names.values() if name is not None), None)
    return [auto for auto, name in names.items() if name == whole is not None]


def other_auto_classes(model_type: str) -> dict[str, str]:
    """Names of the classes for a type's body, and for that with other heads, by Auto class."""
    known = {auto: getattr(transformers, auto, None) for auto in OTHER_AUTO_CLASSES}
    names = {auto: kind._model_mapping._model_mapping.get(model_type) for auto, kind in known.items() if kind}
    return {auto: name for auto, name in names.items() if isinstance(name, str)}


def known_to_peft(model_type: str) -> None:
    """Tells peft, where it is in use, that a pruned model's projections have the names that its dense type's have."""
    constants = sys.modules.get("peft.utils.constants")
    for name, known in vars(constants).items() if constants else ():
        dense = model_type.removeprefix("snp_")
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(known, dict) and dense in known:
            known.setdefault(model_type, known[dense])


def to_dict(config):
    """What `PretrainedConfig.to_dict` gives; peft asks for it when it looks for what to adapt."""
    known_to_peft(config.model_type)
    return super(type(config), config).to_dict()


@cache
def __getattr__(name: str) -> type:
    """The class of a config or a model, by its name: "Snp" and that of a class of transformers.

    Types that share a model's class have one each, "Under" and the name of their config behind it.
    """
    stock, _, config = name.removeprefix("Snp").partition("Under")
    base = getattr(transformers, stock, None) if name.startswith("Snp") else None
    if isinstance(base, type) and issubclass(base, PretrainedConfig):
        own = {"model_type": f"snp_{base.model_type}", "_auto_class": "AutoConfig", "to_dict": to_dict}
        return type(name, (base,), own)
    if isinstance(base, type) and issubclass(base, PreTrainedModel):
        if name == "SnpGPTNeoXForCausalLM" and transformers.__version__.startswith("4."):
            # It calls the head by another name, and would leave it random.
            raise ImportError("GPT-NeoX with widths of its own in every block: expected transformers 5")
        config_class = __getattr__(f"Snp{config or base.config_class.__name__}")
        dense_type = config_class.model_type.removeprefix("snp_")
        others = {other: auto for auto, other in reversed(other_auto_classes(dense_type).items())}
        auto = others.get(stock) or next(iter(auto_classes(dense_type)), "AutoModelForCausalLM")
        return type(name, (Pruned, base), {"config_class": config_class, "_auto_class": auto})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
