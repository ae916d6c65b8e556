"""Slice linears so that whole units are gone. Knows modules, not why these units."""

import torch
from torch import Tensor, nn

from snp_llm.linalg.units import unit_channels
from snp_llm.models.families import Family, Site, linear


def slice_linear(old: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Linear:
    """A new linear with only the given output rows and input columns, in the order given."""
    weight = old.weight.detach()
    bias = None if old.bias is None else old.bias.detach()
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    return _linear(weight, bias)


def prune_site(block: nn.Module, family: Family, site: Site, kept: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Removes all units but `kept` from a site, in place, and gives its out-projection the repaired weight.

    Args:
        block: the decoder block.
        family: its family.
        site: of this block.
        kept: kept units, ascending, (u,), int64.
        weight: repaired out-projection weight on the kept channels in ascending order, (d_out, u * unit_size); cast
            here, once, to the model's dtype.
        bias: repaired bias, (d_out,), or None where the linear has none.
    """
    channels = unit_channels(kept, site.unit_size)
    for path in site.in_projections:
        block.set_submodule(path, slice_linear(linear(block, path), rows=channels))
    old = linear(block, site.out_projection)
    like = old.weight
    new_bias = None if bias is None else bias.to(like.device, like.dtype)
    block.set_submodule(site.out_projection, _linear(weight.to(like.device, like.dtype), new_bias))
    if site.kind == "attention":
        setattr(block.get_submodule(family.attention), family.head_count, len(kept))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    new.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.contiguous().clone(), requires_grad=False)
    return new.eval()
