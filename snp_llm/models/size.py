"""What a model takes up: parameters, bytes, FLOPs, activations. Runs nothing."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.experts import of_experts
from snp_llm.models.positions import layer_positions, positions
from snp_llm.models.projections import Projection
from snp_llm.models.site import Site
from snp_llm.models.task import task_of
from snp_llm.models.text_part import text_config, text_modules
from snp_llm.recipe.recipe import Experts

EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")  # config keys

HEADER = 64  # bytes at most of a safetensors file that are of no tensor


@dataclass(frozen=True)
class ModelSize:
    """What a model takes up.

    Attributes:
        parameters: all, tied ones once.
        block_linear: weights of the decoder blocks' linears, of experts only where they are cut: what sparsity is a
            fraction of.
        bytes: of all parameters in their dtypes, tied ones once: the safetensors files less their headers.
        flops: a token at prefill, LM head included, `token_flops`; or an image.
    """

    parameters: int
    block_linear: int
    bytes: int
    flops: float


def model_size(model: PreTrainedModel, seq_len: int, experts: Experts = "never") -> ModelSize:
    """Sizes of a model of a supported family, its experts part of what sparsity counts unless they are never cut; works
    on the meta device too."""
    unique = {id(p): p for p in model.parameters()}.values()
    return ModelSize(
        parameters=sum(p.numel() for p in unique),
        block_linear=sum(counted_weights(block, experts) for block in find_blocks(model)),
        bytes=sum(p.numel() * p.element_size() for p in unique),
        flops=FLOPS[task_of(model.config).name](model, seq_len),
    )


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of a model's safetensors files, at most: tensors, tied ones once, and a header, in which each has its name,
    type, shape and place. Stacked experts may be stored one by one, gate and up apart."""
    found = {id(tensor): (path, tensor) for path, tensor in model.state_dict(keep_vars=True).items()}.values()
    total = sum(tensor.numel() * tensor.element_size() for _, tensor in found)
    for path, tensor in found:
        entry = {path: {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [total, total]}}
        stored_as = 2 * len(tensor) if of_experts(path) and tensor.dim() > 1 else 1
        total += stored_as * len(json.dumps(entry, separators=(",", ":")))
    return total + HEADER


def prefill_flops(model: PreTrainedModel, seq_len: int) -> float:
    """FLOPs of a token of a window of text."""
    return token_flops(text_weights(model), attention_channels(model), mean_positions(seq_len))


def image_flops(model: PreTrainedModel, _positions: int) -> float:
    """FLOPs of an image: two for each weight at each position where it counts, and what positions attend to."""
    counts, weights = layer_positions(model), dict(model.named_modules())
    flops = sum(2.0 * count * weights[path].weight.numel() for path, count in counts.items())
    attended, tokens = attention_channels(model), positions(model)
    return flops + tokens * token_flops(0, attended, tokens)


FLOPS = {"text": prefill_flops, "images": image_flops}


def unit_flops(model: PreTrainedModel, weights: float, attended: float, seq_len: int) -> float:
    """FLOPs of so many weights of a block, and attention channels, in what `ModelSize.flops` is of."""
    return UNIT_FLOPS[task_of(model.config).name](weights, attended, seq_len)


UNIT_FLOPS: dict[str, Callable[[float, float, int], float]] = {
    "text": lambda weights, attended, seq_len: token_flops(weights, attended, mean_positions(seq_len)),
    "images": lambda weights, attended, tokens: tokens * token_flops(weights, attended, tokens),
}


def linear_weights(module: nn.Module) -> int:
    """Weights of all linears in a module, but for those of experts that only some tokens come by."""
    found = (child for path, child in module.named_modules() if not of_experts(path))
    return sum(child.weight.numel() for child in found if isinstance(child, Projection))


def counted_weights(block: nn.Module, experts: Experts) -> int:
    """Weights of a block that sparsity is a fraction of: those of experts only where they may be cut."""
    stacked = (p for name, p in block.named_parameters() if of_experts(name) and p.dim() == 3)
    return linear_weights(block) + sum(p.numel() for p in stacked if experts != "never")


def text_weights(model: PreTrainedModel) -> int:
    """Weights that a token of a text goes through: of all linears, LM head included, and of as many experts as it
    comes by."""
    linear = sum(module.weight.numel() for module in text_modules(model) if isinstance(module, Projection))
    return linear + routed_weights(model)


def routed_weights(model: PreTrainedModel, within: nn.Module | None = None) -> int:
    """Weights of the experts that one token comes by, of those whose weights are one tensor, (experts, ...).

    Args:
        model: its config.
        within: a part of it; None: all blocks.
    """
    config = text_config(model.config)
    each = next((n for key in EXPERTS_A_TOKEN if isinstance(n := getattr(config, key, None), int)), 0)
    tensors = (p for name, p in (within or find_blocks(model)).named_parameters() if of_experts(name) and p.dim() == 3)
    return sum(min(each, len(tensor)) * tensor[0].numel() for tensor in tensors)


def attention_channels(model: PreTrainedModel) -> int:
    """Channels of all blocks' attention, whose scores cost FLOPs that are no weights'."""
    return sum(site.channels for site in find_anatomy(model).sites if site.heads is not None)


def token_flops(weights: float, attended: float, positions: float) -> float:
    """FLOPs of one token in a forward pass: `2 w + 4 a p`.

    Args:
        weights: w, of all linears that it goes through: a product and a sum each.
        attended: a, attention channels: as much for the score of each position, and again for its value.
        positions: p, that it attends to.
    """
    return 2.0 * weights + 4.0 * attended * positions


def mean_positions(seq_len: int) -> float:
    """Positions that a token of a causal window attends to, on average: `(T + 1) / 2`."""
    return (seq_len + 1) / 2


def activation_bytes(model: PreTrainedModel, site: Site, batch: int, seq_len: int) -> int:
    """Bytes that are alive at once inside the attention or FFN of a site, with a batch on its way.

    Args:
        model: its config and dtype.
        site: of a block.
        batch: windows at a time.
        seq_len: tokens a window has.
    """
    hidden, item, tokens = int(text_config(model.config).hidden_size), model.dtype.itemsize, batch * seq_len
    if site.heads is None:
        copies = 2 if site.parameters == 2 * hidden * site.channels else 4  # with a gate: it, up, activation, product
        return tokens * (3 * hidden + copies * site.passes * site.channels) * item
    projections = 2 * site.channels + 2 * site.heads.key_value * site.heads.size
    alive = tokens * (2 * hidden + projections) * item
    if text_config(model.config)._attn_implementation == "eager":  # scores, in the weights' type and in float32
        alive += batch * site.heads.query * seq_len**2 * (2 * item + 4)
    return alive
