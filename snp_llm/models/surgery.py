"""Take units away from a site, or put zeros in their place. Knows modules, not why these units."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from snp_llm.linalg.units import unit_channels
from snp_llm.models.anatomy import expert_site
from snp_llm.models.experts import Mixture, expert_of, experts_module, find_experts, put_experts
from snp_llm.models.families.decoders import family_of
from snp_llm.models.modeling_snp import BlockConfig, NoHeads, set_counts, set_head_counts
from snp_llm.models.outline import width_keys
from snp_llm.models.projections import Projection, bias_of, projection, weight_of, with_rows, with_weight
from snp_llm.models.site import Shared, Site, norm_of, normed_bias, tap_weights, tensor_or_module


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
    if site.shared is not None or site.norm or site.taps:
        _repair_reader(block, site, kept, weight, bias)
        return
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
            attention = block.get_submodule(site.module)
            block.set_submodule(site.module, NoHeads(attention, name, projection(block, site.consumers[0])))


def _repair_reader(block: nn.Module, site: Site, kept: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Gives a convolution, or a linear layer after one, its repaired weight; a batch norm after it takes up the bias.

    Where units are shared, gone ones keep their columns, of zeros, until `drop_shared` takes them away.
    """
    (path,) = site.consumers
    old = projection(block, path)
    new_bias = bias_of(old)
    if site.taps:
        taps, shift = tap_weights(block, site), bias
        if shift is not None and not site.norm:
            bias = new_bias + (taps.sum(0) @ shift.to(taps)) if new_bias is not None else None
        elif shift is not None:
            bias = normed_bias(block, site) + taps.sum(0) @ shift.to(taps)
        weight = _mixed(taps, weight.to(taps), kept, site)
    if bias is not None and site.norm:
        mean = norm_of(block, site).running_mean
        assert mean is not None
        given = bias.to(mean)
        mean.copy_(-given if new_bias is None else new_bias.to(mean) - given)
    elif bias is not None:
        new_bias = bias.to(old.weight.device, old.weight.dtype)
    weight = weight.to(old.weight.device, old.weight.dtype)
    if site.shared is not None and not site.taps:
        whole = torch.zeros_like(weight_of(old))
        whole[:, unit_channels(kept, site.taps or site.unit_size).to(weight.device)] = weight
        weight = whole
    block.set_submodule(path, with_weight(old, weight, new_bias))


def _mixed(taps: Tensor, mixing: Tensor, kept: Tensor, site: Site) -> Tensor:
    """A consumer's weight on what remains of its channels, mixed for every tap; zero for gone units that are shared.

    Args:
        taps: its weight by tap, (taps, d_out, units).
        mixing: what each channel is of those kept, (units, u).
        kept: units, ascending, (u,), int64.
        site: that it reads.
    """
    shared = site.shared is not None
    weight = taps.new_zeros(taps.shape[1], site.units if shared else len(kept), len(taps))
    columns = kept.to(taps.device) if shared else torch.arange(len(kept), device=taps.device)
    for number, tap in enumerate(taps):  # one at a time: all of them are as large as the layer
        weight[:, columns, number] = tap @ mixing
    return weight.flatten(1)


def drop_shared(block: nn.Module, index: int, shared: Shared, sites: Sequence[Site], kept: Tensor) -> None:
    """Takes gone units, whose columns are zero, away from a block that makes or reads them, in place.

    Args:
        block: pruned.
        index: its number.
        shared: units that blocks share.
        sites: of this block that read them.
        kept: units, ascending, (u,), int64.
    """
    for at, producer in shared.producers:
        if at == index:
            _keep_rows(block, producer.path, producer.kept_rows(kept))
    for site in sites:
        (path,) = site.consumers
        old = projection(block, path)
        columns = unit_channels(kept, site.taps or site.unit_size).to(old.weight.device)
        block.set_submodule(path, with_weight(old, weight_of(old)[:, columns], bias_of(old)))


def pad_site(block: nn.Module, dense: nn.Module, site: Site, kept: Tensor) -> None:
    """Puts a pruned site back into its dense shape, in place, with zeros where units are gone.

    Args:
        block: in which the site is pruned.
        dense: the block as it was.
        site: of the dense block.
        kept: units that the pruned block has, ascending, (u,), int64.
    """
    if site.shared is not None:
        return  # gone units have their columns, of zeros
    for producer in site.producers:
        rows = producer.kept_rows(kept)
        small, large = (tensor_or_module(b, producer.path) for b in (block, dense))
        if not isinstance(small, Projection) or not isinstance(large, Projection):
            _set(block, producer.path, _with_values(large, small, rows))
            continue
        weight, bias = weight_of(small).new_zeros(len(weight_of(large)), weight_of(small).shape[1]), None
        weight[rows] = weight_of(small)
        if small.bias is not None:
            bias = small.bias.new_zeros(len(weight)).index_copy(0, rows.to(small.bias.device), small.bias)
        block.set_submodule(producer.path, with_weight(large, weight, bias))
    for path in site.consumers:
        small, large = projection(block, path), projection(dense, path)
        weight = weight_of(small).new_zeros(len(weight_of(small)), weight_of(large).shape[1])
        weight[:, unit_channels(kept, site.taps or site.unit_size)] = weight_of(small)
        block.set_submodule(path, with_weight(large, weight, small.bias))
    if site.heads is not None and site.module is not None:
        _set_head_counts(block.get_submodule(site.module), site, site.units)


def narrow_experts(block: nn.Module, site: Site, kept: Tensor) -> None:
    """Removes all channels of a block's experts but those kept, in place, without a repair.

    Args:
        block: that they are in.
        site: of these experts.
        kept: channels of each in a column, ascending, (u, experts), int64.
    """
    mixture = find_experts(block)
    assert mixture is not None
    inner, experts = expert_site(site), []
    for number in range(mixture.count):
        expert = expert_of(block, mixture, number)
        W = weight_of(expert.outward)
        prune_site(expert, inner, kept[:, number], W[:, kept[:, number].to(W.device)], None)
        experts.append(expert)
    put_experts(block, mixture, experts)


def drop_experts(block: nn.Module, mixture: Mixture, kept: Tensor) -> None:
    """Removes all experts of a block but those kept, with their rows of the router, in place.

    Args:
        block: that they are in.
        mixture: what it has now.
        kept: experts, ascending, (u,), int64.
    """
    module = experts_module(block, mixture)
    stacked = {f"{mixture.module}.{name}": 0 for name, _ in module.named_parameters()}
    for path, dimension in {**stacked, **dict(mixture.rows)}.items():
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        old = getattr(owner, name)
        new = old.detach().index_select(dimension, kept.to(old.device)).clone()
        setattr(owner, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
    for part in block.get_submodule(mixture.module.rpartition(".")[0]).modules():
        set_counts(part, ("experts", "out_features"), mixture.count, len(kept))


def pad_experts(block: nn.Module, dense: nn.Module, site: Site, kept: Tensor) -> None:
    """Puts pruned experts back into their dense width, in place, with zeros where channels are gone.

    Args:
        block: in which they are pruned.
        dense: the block as it was.
        site: of the dense block's experts.
        kept: channels of each in a column, ascending, (u, experts), int64.
    """
    assert site.mixture is not None
    inner, experts = expert_site(site), []
    narrow = find_experts(block)
    assert narrow is not None
    for number in range(site.mixture.count):
        expert, large = expert_of(block, narrow, number), expert_of(dense, site.mixture, number)
        pad_site(expert, large, inner, kept[:, number])
        experts.append(expert)
    put_experts(block, narrow, experts)


class NoBlock(nn.Module):
    """Stands where a block was that has gone: passes the stream on."""

    def forward(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


def _with_values(large: Tensor | nn.Module, small: Tensor | nn.Module, rows: Tensor) -> Tensor | nn.Module:
    """A copy of a norm, or of a tensor with a value a channel, that has a smaller one's values in its kept rows."""
    new = copy.deepcopy(large)
    pairs = [(new, small)]
    if isinstance(new, nn.Module) and isinstance(small, nn.Module):
        values = dict(small.named_parameters()) | dict(small.named_buffers())
        pairs = [(t, values[name]) for name, t in (*new.named_parameters(), *new.named_buffers())]
    for into, values_of in pairs:
        if isinstance(into, Tensor) and isinstance(values_of, Tensor) and into.dim():
            into.data[rows.to(into.device)] = values_of.detach().to(into)
    return new


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
