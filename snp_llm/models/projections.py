"""The kinds of layer that are cut, each as one matrix, and their rows and columns taken away. Knows no blocks."""

import copy
import warnings

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from snp_llm.runtime.errors import SnpError

Projection = nn.Linear | Conv1D | nn.Conv2d


def projection(block: nn.Module, path: str) -> Projection:
    """The projection at a path of a block.

    Raises:
        SnpError: something else is there.
    """
    module = block.get_submodule(path)
    if not isinstance(module, Projection):
        raise SnpError(f"{path}: expected a plain linear layer, got {type(module).__name__}.")
    return module


def weight_of(module: Projection) -> Tensor:
    """The weight of a projection as a matrix (out, in), whichever way it is stored.

    A convolution's columns are the entries of a patch, channel after channel: (out, in * kernel height * width).
    """
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def bias_of(module: Projection) -> Tensor | None:
    """The bias of a projection, (out,), if it has one."""
    return None if module.bias is None else module.bias.detach()


def inputs_as_rows(module: Projection, inputs: Tensor) -> Tensor:
    """What the matrix of a projection is multiplied with: the inputs themselves or, of a convolution, their patches.

    Args:
        module: the projection.
        inputs: that it gets, (..., in), or (images, channels, height, width).

    Returns:
        (..., in), or (images, positions, in * kernel height * width).
    """
    if not isinstance(module, nn.Conv2d):
        return inputs
    assert not isinstance(module.padding, str)
    patches = nn.functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
    return patches.mT


def outputs_as_rows(module: Projection, outputs: Tensor) -> Tensor:
    """What a projection puts out, position after position, as its inputs are: (..., out)."""
    return outputs.flatten(2).mT if isinstance(module, nn.Conv2d) else outputs


def with_weight(old: Projection, weight: Tensor, bias: Tensor | None) -> Projection:
    """A projection of the old one's kind with a copy of another weight, (out, in), and bias, (out,)."""
    rows, columns = weight.shape
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        if isinstance(old, Conv1D) and weight.numel():  # which does not run on nothing
            new: Projection = Conv1D(rows, columns)
            weight = weight.T
        elif isinstance(old, nn.Conv2d):
            weight = weight.unflatten(1, (-1, *old.kernel_size))
            shape = (old.kernel_size, old.stride, old.padding, old.dilation)
            new = nn.Conv2d(weight.shape[1], rows, *shape, bias=bias is not None, padding_mode=old.padding_mode)  # type: ignore[arg-type]
        else:
            new = nn.Linear(columns, rows, bias=bias is not None)
    new.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.contiguous().clone(), requires_grad=False)
    return new.eval()


def with_rows(old: nn.Module, rows: Tensor) -> nn.Module:
    """A copy of a projection, or of a norm on its output, with only the given output rows, in the order given.

    Of a norm every tensor that has a value a channel is cut: scale, shift, running mean and variance.

    Args:
        old: the module.
        rows: output channels, (k,), int64.
    """
    if isinstance(old, Projection):
        weight, bias = weight_of(old), bias_of(old)
        rows = rows.to(weight.device)
        return with_weight(old, weight[rows], None if bias is None else bias[rows])
    new = copy.deepcopy(old)
    for name, tensor in (*old.named_parameters(recurse=False), *old.named_buffers(recurse=False)):
        if tensor.dim():
            values = tensor.detach()[rows.to(tensor.device)].clone()
            kept = nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
            setattr(new, name, kept)
    for name, count in (("num_features", len(rows)), ("normalized_shape", (len(rows),))):
        if hasattr(new, name):
            setattr(new, name, count)
    return new
