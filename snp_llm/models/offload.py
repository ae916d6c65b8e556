"""Weights that stay in safetensors files until they are needed, the way transformers offloads to disk.

A module on disk has meta tensors and one of accelerate's hooks, which knows the file; `on_device` reads it.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.runtime.files import checksum

# By name of a tensor: file, name in that file, dtype; what accelerate's OffloadedWeightsLoader reads.
Index = dict[str, dict[str, Any]]


def disk_index(module: nn.Module) -> Index:
    """Where the weights of a module are that are on disk."""
    index: Index = {}
    for path, part in module.named_modules():
        loader: Any = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                inner, key = _innermost(loader, name)
                if key in inner.index:
                    index[f"{path}.{name}" if path else name] = inner.index[key]
    return index


def complete_index(model: nn.Module) -> None:
    """Says where tied weights are that a checkpoint holds under one of their names alone."""
    known: dict[int, dict[str, Any]] = {}
    unknown: list[tuple[Index, str, nn.Parameter]] = []
    for part in model.modules():
        loader: Any = getattr(getattr(part, "_hf_hook", None), "weights_map", None)
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                inner, key = _innermost(loader, name)
                if key in inner.index:
                    known[id(parameter)] = inner.index[key]
                else:
                    unknown.append((inner.index, key, parameter))
    for index, key, parameter in unknown:
        if id(parameter) in known:  # else the checkpoint lacks it
            index[key] = known[id(parameter)]


def other_shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Names of the weights on disk whose shape in the file is not that in the model, and both shapes."""
    by_file: dict[str, list[tuple[str, str]]] = {}
    for name, entry in disk_index(model).items():
        by_file.setdefault(entry["safetensors_file"], []).append((name, entry["weight_name"]))
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), []
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for name, key in names:
                shape, expected = tuple(tensors.get_slice(key).get_shape()), tuple(parameters[name].shape)
                if shape != expected:
                    found.append((name, shape, expected))
    return found


def in_two_files(model: nn.Module) -> list[str]:
    """Names of tensors that two of a model's files hold with different values, of which readers take either one."""
    first: dict[str, str] = {}
    found = []
    for file in sorted({entry["safetensors_file"] for entry in disk_index(model).values()}):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no mapping
                if first.setdefault(key, file) != file:
                    with safe_open(first[key], framework="pt") as others:
                        found += [] if torch.equal(tensors.get_tensor(key), others.get_tensor(key)) else [key]
    return found


def read_tensor(entry: dict[str, Any], like: Tensor) -> Tensor:
    """A weight on disk, in the dtype that it has in the model.

    Args:
        entry: of the index.
        like: what stands for it in the model.
    """
    with safe_open(entry["safetensors_file"], framework="pt") as tensors:
        read: Tensor = tensors.get_tensor(entry["weight_name"])
    return read.to(like.dtype)


def _innermost(loader: Any, name: str) -> tuple[OffloadedWeightsLoader, str]:
    """What a module's hook reads from in the end, and a tensor's name there."""
    while isinstance(loader, PrefixedDataset):
        loader, name = loader.dataset, loader.prefix + name
    return loader, name


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


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Has a module on the compute device, as long as the context lasts; weights that wait on disk are read for it."""
    with _present([*module.modules()], device):
        yield


@contextmanager
def rest_on_device(model: PreTrainedModel, blocks: nn.ModuleList, device: torch.device) -> Iterator[None]:
    """Has everything but the blocks (embeddings, last norm, head) on a device, as long as the context lasts."""
    inside = set(blocks.modules())
    with _present([module for module in model.modules() if module not in inside], device):
        yield


@contextmanager
def _present(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Puts what the modules themselves hold on a device and afterwards back.

    Weights on disk are the meta tensors that accelerate's hooks know how to read. They are put in place of the meta
    tensors for a while, with the hooks, which would read them anew for every batch, asleep. Objects are exchanged, not
    moved, so that a tensor in two places (tied embeddings) stays one, and one copy of it is on the device.
    """
    hooks = [(module, hook) for module in modules if isinstance(hook := getattr(module, "_hf_hook", None), ModelHook)]
    replaced: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    here: dict[int, Tensor] = {}

    def present(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        hook: Any = getattr(module, "_hf_hook", None)
        value = hook.weights_map[name].to(device) if tensor.is_meta else tensor.detach().to(device)
        return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value

    try:
        for module in modules:
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.device != device:
                        if id(tensor) not in here:
                            here[id(tensor)] = present(module, name, tensor)
                        replaced.append((held, name, tensor))  # type: ignore[arg-type]
                        held[name] = here[id(tensor)]  # type: ignore[assignment]
        for module, _ in hooks:
            module._hf_hook = ModelHook()
        yield
    finally:
        for module, hook in hooks:
            module._hf_hook = hook
        for held, name, tensor in replaced:
            held[name] = tensor


@contextmanager
def same_tensors(model: nn.Module) -> Iterator[None]:
    """Leaves a model on disk that runs in this context the tensors that it had: hooks that read them put new meta
    tensors in their place, so that tied ones come apart."""
    held = [(module._parameters, {**module._parameters}) for module in model.modules()]
    try:
        yield
    finally:
        for now, before in held:
            now.update(before)


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


def read_buffers(module: nn.Module, file: Path) -> None:
    """Gives a module the buffers that a file written before has of it, such as a batch norm's statistics."""
    with safe_open(file, framework="pt") as tensors:
        names = {*tensors.keys()}
        for name, buffer in module.named_buffers():
            if name in names:
                buffer.copy_(tensors.get_tensor(name))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the files that a model's weights are in; of a model in memory, nothing."""
    digest = hashlib.sha256()
    for name in sorted({entry["safetensors_file"] for entry in disk_index(model).values()}):
        file = Path(name)
        digest.update(f"{file.name} {checksum(file)} ".encode())
    return digest.hexdigest()
