"""Intra-Fusion (arXiv 2310.10054): units are not dropped but fused into those that stay, by optimal transport.

Without images: of every group of units the largest by sum of absolute weights are where all of them are moved to, at
least cost, a cost being the distance of two units' normalised weights in all layers that make or read them. Rows that
arrive at one place are averaged, columns that read them are added up. `pip install pot` solves the transport.

Zeros stand where units have gone, so that what comes out has the dense shapes; it costs what its widths say.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.models.anatomy import Anatomy, find_anatomy
from snp_llm.models.projections import Projection
from snp_llm.models.site import tensor_or_module
from snp_llm.pruning.widths.coupled import coupled_costs


def fused(model: PreTrainedModel, widths: Sequence[int], *, merged: bool) -> PreTrainedModel:
    """A copy of a convolutional network in which units are fused.

    Args:
        model: dense.
        widths: units that each site keeps.
        merged: whether batch norms are merged into the layers before them, as published; else their scales and shifts
            are fused beside these layers, and their statistics have to be estimated again.
    """
    model = copy.deepcopy(model)
    anatomy = find_anatomy(model)
    if merged:
        for block in anatomy.blocks:
            merge_norms(block)
    for numbers in coupled_costs(anatomy, "weights").sites:
        width, units = widths[numbers[0]], anatomy.sites[numbers[0]].units
        if width < units:
            fuse(anatomy, numbers, width)
    return model


@torch.no_grad()
def merge_norms(block: nn.Module) -> None:
    """Moves the scale and shift of each batch norm into the convolution before it; what is left does nothing."""
    before: nn.Conv2d | None = None
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            before = module
        elif isinstance(module, nn.BatchNorm2d) and before is not None:
            assert module.running_mean is not None and module.running_var is not None
            scale = module.weight / (module.running_var + module.eps).sqrt()
            before.weight.mul_(scale[:, None, None, None])
            bias = 0 if before.bias is None else before.bias
            before.bias = nn.Parameter(module.bias + scale * (bias - module.running_mean), requires_grad=False)
            module.running_mean.zero_()
            module.running_var.fill_(1 - module.eps)
            module.weight.fill_(1)
            module.bias.zero_()


@torch.no_grad()
def fuse(anatomy: Anatomy, numbers: Sequence[int], width: int) -> None:
    """Fuses the units that the sites of these numbers read into so many, in place."""
    import ot

    first = anatomy.sites[numbers[0]]
    producers = first.shared.producers if first.shared else [(first.block, p) for p in first.producers]
    made = [tensor_or_module(anatomy.blocks[block], producer.path) for block, producer in producers]
    rows = [module for module in made if isinstance(module, Projection)]
    readers = [anatomy.blocks[(site := anatomy.sites[n]).block].get_submodule(site.consumers[0]) for n in numbers]
    columns = [by_unit(reader, first.units) for reader in readers]
    weights = torch.cat([*(row.weight.flatten(1) for row in rows), *(c.transpose(0, 1).flatten(1) for c in columns)], 1)
    importance = torch.stack([row.weight.abs().flatten(1).sum(1) for row in rows]).sum(0)
    kept = importance.argsort(descending=True)[:width].sort().values
    weights = nn.functional.normalize(weights, dim=1)
    cost = torch.cdist(weights, weights[kept], p=1).double().numpy()
    masses = [torch.full((n,), 1 / n, dtype=torch.float64).numpy() for n in cost.shape]
    plan = torch.from_numpy(ot.emd(*masses, cost, numItermax=10**6)).to(weights)
    averages, shares = torch.zeros(first.units, first.units), torch.zeros(first.units, first.units)
    averages[kept], shares[:, kept] = (plan / plan.sum(0)).T, plan / plan.sum(1, keepdim=True)
    for module in made:
        for tensor in (module.weight, module.bias):
            if tensor is not None:
                tensor.copy_((averages @ tensor.flatten(1) if tensor.dim() > 1 else averages @ tensor).view_as(tensor))
    for reader, weight in zip(readers, columns, strict=True):
        reader.weight.copy_(torch.einsum("ouk,uv->ovk", weight, shares).reshape(reader.weight.shape))


def by_unit(reader: nn.Module, units: int) -> Tensor:
    """A reader's weight, (outputs, units, columns of a unit)."""
    weight: Tensor = reader.weight
    return weight.reshape(len(weight), units, -1)
