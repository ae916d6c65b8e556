"""Compact models as vLLM runs them: its own classes, of which every block is built with the widths of that block.

vLLM's classes read widths off the config while they build a block, and never again. So the config says a block's own
while that block is built, and the dense model's the rest of the time. Whatever vLLM does with a class (batching, the
paged KV cache, quantisation, LoRA) it does with these.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest import mock

from torch import nn
from transformers import PretrainedConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models import opt
from vllm.model_executor.models.utils import make_layers

from snp_llm.engines.vllm_plugin import CLASSES

VLLM = "vllm.model_executor.models"


@cache
def __getattr__(name: str) -> type[nn.Module]:
    """The class for compact models of a name, `SnpLlamaForCausalLM` and others: a class of vLLM's."""
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, stock = CLASSES[name]
    base: type[nn.Module] = getattr(importlib.import_module(f"{VLLM}.{module}"), stock)

    def build(self: nn.Module, *, vllm_config: Any, prefix: str = "") -> None:
        with widths_of_their_own(vllm_config.model_config.hf_config):
            base.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(name, (base,), {"__init__": build, "__module__": __name__})


@contextmanager
def widths_of_their_own(config: PretrainedConfig) -> Iterator[None]:
    """Lets vLLM build every block under a config that says the widths of that block.

    Args:
        config: of a compact model. It is the same again afterwards, but that it names the head dimension.

    Raises:
        ValueError: these widths cannot be split over as many devices as there are; vLLM has no place for them.
    """
    check_widths(config, get_tensor_model_parallel_world_size())
    attention = next(part["attention"] for part in config.pruned_structure["parts"])
    config.head_dim = attention["size"]  # else vLLM takes it for the hidden size over the heads that are left
    if config.model_type == "snp_qwen2":
        config.qkv_bias = True

    def layers(count: int, build: Callable[..., nn.Module], prefix: str) -> Any:
        def build_one(prefix: str) -> nn.Module:
            changed = config.pruned_layers.get(prefix.rpartition(".")[2], {})
            dense = {key: getattr(config, key) for key in changed}
            try:
                vars(config).update(changed)
                return build(prefix=prefix)
            finally:
                vars(config).update(dense)

        return make_layers(count, build_one, prefix)

    users = [module for name, module in [*sys.modules.items()] if name.startswith(VLLM) and _makes_layers(module)]
    with ExitStack() as stack:
        for user in users:
            stack.enter_context(mock.patch.object(user, "make_layers", layers))
        stack.enter_context(mock.patch.object(opt, "OPTAttention", partial(OptAttention, head_dim=attention["size"])))
        yield


def _makes_layers(module: Any) -> bool:
    return module.__name__ != make_layers.__module__ and vars(module).get("make_layers") is make_layers


def check_widths(config: PretrainedConfig, devices: int) -> None:
    """Raises ValueError if vLLM cannot hold these widths.

    Args:
        config: of a compact model.
        devices: over which every block is split (`--tensor-parallel-size`); each must get as many heads, and channels.
    """
    queries: dict[int, tuple[int, str]] = {}
    for part in config.pruned_structure["parts"]:
        attention, ffn = part["attention"], part["ffn"]
        (query_key, key_value_key), (query, key_value) = attention["keys"], attention["heads"]
        for index in map(str, part["of"]):
            changed = config.pruned_layers.get(index, {})
            heads = changed.get(query_key, query)
            shared = changed.get(key_value_key, key_value) if key_value_key else heads
            width = changed.get(ffn["key"], ffn["width"])
            if not heads or not width:
                raise ValueError(
                    f"block {index}: has no {'FFN' if heads else 'attention'}; vLLM has both in every block. Prune the "
                    "model with --depth never, or with --layout uniform."
                )
            if heads % devices or width % devices or (shared % devices and devices % shared):
                raise ValueError(
                    f"block {index}: {heads} query heads, {shared} KV heads and {width} FFN channels do not split "
                    f"evenly over {devices} devices. Serve it with --tensor-parallel-size 1, or prune it with "
                    "--layout uniform."
                )
            known, other = queries.setdefault(shared, (heads, index))
            if known != heads:
                raise ValueError(
                    f"blocks {other} and {index}: {known} and {heads} query heads with {shared} KV heads in both; vLLM "
                    "takes one number of query heads for all blocks with as many KV heads. Prune the model with "
                    "--head-unit kv_group, or with --layout uniform."
                )


class OptAttention(nn.Module):
    """OPT's attention with any number of heads; vLLM's own takes the head dimension for `embed_dim / num_heads`."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        cache_config: Any = None,
        quant_config: Any = None,
        prefix: str = "",
        *,
        head_dim: int,
    ) -> None:
        super().__init__()
        shared: dict[str, Any] = {"bias": bias, "quant_config": quant_config}
        self.qkv_proj = QKVParallelLinear(embed_dim, head_dim, num_heads, **shared, prefix=f"{prefix}.qkv_proj")
        self.out_proj = RowParallelLinear(num_heads * head_dim, embed_dim, **shared, prefix=f"{prefix}.out_proj")
        self.attn = Attention(
            num_heads // get_tensor_model_parallel_world_size(),
            head_dim,
            scale=head_dim**-0.5,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    forward = opt.OPTAttention.forward
