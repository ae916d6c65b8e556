"""Slice projections so that whole units are gone. Knows modules, not why these units."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snp_llm.linalg.units import unit_channels
from snp_llm.models.anatomy import Projection, Site, linear, row_units, weight_of
from snp_llm.models.families.family import Family
from snp_llm.models.modeling_snp import BlockConfig


def slice_linear(old: Projection, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Projection:
    """A new projection with only the given output rows and input columns, in the order given."""
    weight = weight_of(old)
    bias = None if old.bias is None else old.bias.detach()
    if rows is not None:
        rows = rows.to(weight.device)
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns.to(weight.device)]
    return _like(old, weight, bias)


def prune_site(block: nn.Module, family: Family, site: Site, kept: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Removes all units but `kept` from a site, in place, and gives its out-projection the repaired weight.

    Args:
        block: the decoder block.
        family: its family.
        site: of this block.
        kept: kept units, ascending, (u,), int64; from every group equally many.
        weight: repaired out-projection weight on the kept channels in ascending order, (d_out, u * unit_size); cast
            here, once, to the model's dtype.
        bias: repaired bias, (d_out,), or None where the projection has none.
    """
    for path, rows in zip(site.in_projections, kept_rows(block, family, site, kept), strict=True):
        block.set_submodule(path, slice_linear(linear(block, path), rows=rows))
    old = linear(block, site.out_projection)
    like = old.weight
    new_bias = None if bias is None else bias.to(like.device, like.dtype)
    block.set_submodule(site.out_projection, _like(old, weight.to(like.device, like.dtype), new_bias))
    if site.kind == "attention":
        _set_head_counts(block.get_submodule(family.attention), family, site, len(kept))


def pad_site(block: nn.Module, dense: nn.Module, family: Family, site: Site, kept: Tensor) -> None:
    """Puts a pruned site back into its dense shape, in place, with zeros where units are gone.

    Args:
        block: in which the site is pruned.
        dense: the block as it was.
        family: theirs.
        site: of the dense block.
        kept: units that the pruned block has, ascending, (u,), int64.
    """
    for path, rows in zip(site.in_projections, kept_rows(dense, family, site, kept), strict=True):
        small, large = linear(block, path), linear(dense, path)
        weight = torch.zeros_like(weight_of(large))
        weight[rows] = weight_of(small)
        bias = (
            None
            if large.bias is None
            else torch.zeros_like(large.bias).index_copy(0, rows.to(large.bias.device), small.bias)
        )
        block.set_submodule(path, _like(large, weight, bias))
    small, large = linear(block, site.out_projection), linear(dense, site.out_projection)
    weight = torch.zeros_like(weight_of(large))
    weight[:, unit_channels(kept, site.unit_size)] = weight_of(small)
    block.set_submodule(site.out_projection, _like(large, weight, small.bias))
    if site.kind == "attention":
        _set_head_counts(block.get_submodule(family.attention), family, site, site.units)


def kept_rows(block: nn.Module, family: Family, site: Site, kept: Tensor) -> list[Tensor]:
    """For every in-projection of a site, the rows that stay, ascending."""
    return [
        (torch.isin(units, kept.cpu()) | (units < 0)).nonzero().squeeze(1) for units in row_units(block, family, site)
    ]


def _set_head_counts(attention: nn.Module, family: Family, site: Site, width: int) -> None:
    """Whatever the attention module keeps of its head counts; its scaling stays, since the head dimension does."""
    heads = site.heads_after(width)
    counts = {
        "num_heads": heads.query,
        "num_key_value_heads": heads.key_value,
        "num_key_value_groups": heads.query // heads.key_value,
        "split_size": heads.query * heads.size,
    }
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count)
    # Some (Phi-3) read their config on every call.
    keys = {family.heads_key: heads.query, **({family.kv_heads_key: heads.key_value} if family.kv_heads_key else {})}
    attention.config = BlockConfig(attention.config, keys)  # type: ignore[assignment]


def _like(old: Projection, weight: Tensor, bias: Tensor | None) -> Projection:
    """A projection of the old one's kind with a copy of another weight, (out, in)."""
    rows, columns = weight.shape
    with torch.device("meta"):
        if isinstance(old, Conv1D):
            new: Projection = Conv1D(rows, columns)
            weight = weight.T
        else:
            new = nn.Linear(columns, rows, bias=bias is not None)
    new.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.contiguous().clone(), requires_grad=False)
    return new.eval()
