"""Take units away from a site, or put zeros in their place. Knows modules, not why these units."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from snp_llm.linalg.units import unit_channels
from snp_llm.models.families.decoders import family_of
from snp_llm.models.modeling_snp import BlockConfig, set_head_counts
from snp_llm.models.outline import width_keys
from snp_llm.models.projections import Projection, projection, weight_of, with_rows, with_weight
from snp_llm.models.site import Site, tensor_or_module


def prune_site(block: nn.Module, site: Site, kept: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Removes all units but `kept` from a site, in place, and gives its consumers the repaired weight.

    Where no head is left the attention goes, but for its out-projection, which has no inputs any more.

    Args:
        block: that the site is in.
        site: of this block.
        kept: kept units, ascending, (u,), int64; from every group equally many.
        weight: repaired weight of all consumers, one below the other, on the kept channels in ascending order,
            (d_out, u * unit_size); cast here, once, to the model's dtype.
        bias: repaired biases, (d_out,), or None where the consumers are to keep theirs.
    """
    for producer in site.producers:
        _keep_rows(block, producer.path, producer.kept_rows(kept))
    start = 0
    for path in site.consumers:
        old = projection(block, path)
        here = slice(start, start := start + len(weight_of(old)))
        like = old.weight
        new_bias = old.bias if bias is None else bias[here].to(like.device, like.dtype)
        block.set_submodule(path, with_weight(old, weight[here].to(like.device, like.dtype), new_bias))
    if site.heads is not None and site.module is not None:
        if len(kept):
            _set_head_counts(block.get_submodule(site.module), site, len(kept))
        else:
            name = site.consumers[0].removeprefix(f"{site.module}.")
            block.set_submodule(site.module, NoHeads(name, projection(block, site.consumers[0])))


def pad_site(block: nn.Module, dense: nn.Module, site: Site, kept: Tensor) -> None:
    """Puts a pruned site back into its dense shape, in place, with zeros where units are gone.

    Args:
        block: in which the site is pruned.
        dense: the block as it was.
        site: of the dense block.
        kept: units that the pruned block has, ascending, (u,), int64.
    """
    for producer in site.producers:
        rows = producer.kept_rows(kept)
        small, large = (tensor_or_module(b, producer.path) for b in (block, dense))
        if not isinstance(small, Projection) or not isinstance(large, Projection):  # its values have not changed
            _set(block, producer.path, copy.deepcopy(large))
            continue
        weight, bias = torch.zeros_like(weight_of(large)), None
        weight[rows] = weight_of(small)
        if small.bias is not None:
            bias = small.bias.new_zeros(len(weight)).index_copy(0, rows.to(small.bias.device), small.bias)
        block.set_submodule(producer.path, with_weight(large, weight, bias))
    for path in site.consumers:
        small, large = projection(block, path), projection(dense, path)
        weight = torch.zeros_like(weight_of(large))
        weight[:, unit_channels(kept, site.unit_size)] = weight_of(small)
        block.set_submodule(path, with_weight(large, weight, small.bias))
    if site.heads is not None and site.module is not None:
        _set_head_counts(block.get_submodule(site.module), site, site.units)


class NoHeads(nn.Module):
    """Stands where an attention was whose heads are all gone: what it adds is the bias of its out-projection."""

    def __init__(self, name: str, out: nn.Module) -> None:
        super().__init__()
        self.add_module(name, out)

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
        (out,) = self.children()
        return out(hidden_states[..., :0]), None


class NoBlock(nn.Module):
    """Stands where a block was that has gone: passes the stream on."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


def _keep_rows(block: nn.Module, path: str, rows: Tensor) -> None:
    old = tensor_or_module(block, path)
    if isinstance(old, Tensor):
        _set(block, path, nn.Parameter(old.detach()[rows.to(old.device)].clone(), requires_grad=False))
    else:
        _set(block, path, with_rows(old, rows))


def _set(block: nn.Module, path: str, value: Tensor | nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, value)


def _set_head_counts(attention: nn.Module, site: Site, width: int) -> None:
    old, new = site.heads, site.heads_after(width)
    assert old is not None
    set_head_counts(attention, (old.query, old.key_value), (new.query, new.key_value), new.size)
    if isinstance(config := getattr(attention, "config", None), PretrainedConfig | BlockConfig):
        keys = width_keys(family_of(config), new, None)  # type: ignore[arg-type]
        attention.config = BlockConfig(config, keys)  # type: ignore[assignment]
