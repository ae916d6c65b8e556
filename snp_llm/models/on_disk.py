"""Weights that stay in safetensors files until they are needed, the way transformers offloads to disk.

A module on disk has meta tensors and one of accelerate's hooks, which knows the file; `blocks.on_device` reads it.
"""

import copy
import hashlib
import os
from pathlib import Path
from typing import Any

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn

SAMPLES, PIECE = 256, 65_536  # bytes of each file that its fingerprint is taken from

# By name of a tensor: file, name in that file, dtype; what accelerate's OffloadedWeightsLoader reads.
Index = dict[str, dict[str, Any]]


def is_on_disk(module: nn.Module) -> bool:
    """Whether any of its weights are."""
    return any(parameter.is_meta for parameter in module.parameters())


def disk_index(module: nn.Module) -> Index:
    """Where the weights of a module are that are on disk."""
    index: Index = {}
    for path, part in module.named_modules():
        loader: Any = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                inner, key = loader, name
                while isinstance(inner, PrefixedDataset):
                    inner, key = inner.dataset, inner.prefix + key
                index[f"{path}.{name}" if path else name] = inner.index[key]
    return index


def wait_on_disk(module: nn.Module, index: Index) -> None:
    """Lets a module know where its meta tensors are; it can be run as it is then, slowly, as transformers' can.

    Args:
        module: some or all of its parameters are on the meta device.
        index: has them by name.
    """
    loader = OffloadedWeightsLoader(index=index)
    for path, part in module.named_modules():
        if any(parameter is not None and parameter.is_meta for parameter in part._parameters.values()):
            weights = PrefixedDataset(loader, f"{path}." if path else "")
            add_hook_to_module(part, AlignDevicesHook("cpu", offload=True, weights_map=weights))


def copy_unhooked(block: nn.Module) -> nn.Module:
    """A copy of a block with the tensors that it has now, which nothing will be read into any more."""
    copied: nn.Module = remove_hook_from_module(copy.deepcopy(block), recurse=True)
    for part in copied.modules():
        # Left there with the hook; a module that refers to itself keeps its weights until Python looks for cycles.
        if getattr(part.__dict__.get("forward"), "__func__", None) is type(part).forward:
            del part.__dict__["forward"]
    return copied


def leave_on_disk(module: nn.Module, file: Path) -> None:
    """Replaces a module's weights by meta tensors that are read from a file written before."""
    index = {
        name: {"safetensors_file": str(file), "weight_name": name, "dtype": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in module.named_parameters()
    }
    for part in module.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                part._parameters[name] = nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
    wait_on_disk(module, index)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the files that a model's weights are in: sizes, headers, and `SAMPLES` pieces of each.

    Other training, pruning or conversion changes weights everywhere, so a file of a hundred gigabytes need not be read.
    Of a model in memory, nothing.
    """
    digest = hashlib.sha256()
    for file in sorted({entry["safetensors_file"] for entry in disk_index(model).values()}):
        size = os.path.getsize(file)
        digest.update(f"{os.path.basename(file)} {size} ".encode())
        with open(file, "rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(sample * max(0, size - PIECE) // (SAMPLES - 1))
                digest.update(stream.read(PIECE))
    return digest.hexdigest()
