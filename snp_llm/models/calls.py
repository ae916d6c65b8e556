"""What a block is called with and what it gives back. Knows no blocks."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.models.carried import OWN, Carried
from snp_llm.models.text_part import text_model
from snp_llm.runtime.errors import SnpError


@dataclass(frozen=True)
class BlockCall:
    """All arguments that the model passed to a block besides the hidden states.

    Attributes:
        args, kwargs: as they were.
        carried: those that are part of the stream, where there are any.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    carried: Carried | None = None


def call_of(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockCall:
    """A block's arguments, by name where some may be part of the stream."""
    names = [*signature(type(block).forward).parameters][2:]  # after itself and the hidden states
    if OWN not in names:
        return BlockCall(args, kwargs)
    return BlockCall((), {**dict(zip(names, args, strict=False)), **kwargs})


def through(block: Callable[..., Any], state: Tensor, call: BlockCall) -> Tensor:
    """The stream after a block, from that before it and its other arguments, all where the block is."""
    if call.carried is None:
        return first_tensor(block(state, *call.args, **call.kwargs))
    hidden, given = call.carried.arguments(state)
    return call.carried.after(state, first_tensor(block(hidden, *call.args, **{**call.kwargs, **given})), given)


@dataclass(frozen=True)
class PerWindow:
    """An argument of a block that a batch has once for every window, here that of one; such as slopes of ALiBi."""

    tensor: Tensor

    def of(self, windows: int) -> Tensor:
        """That of a batch of windows which are alike in it."""
        if len(self.tensor) == 1:
            return self.tensor.expand(windows, *self.tensor.shape[1:])
        return self.tensor.repeat(windows, *(1,) * (self.tensor.dim() - 1))


def move(value: Any, device: torch.device) -> Any:
    """The same nested structure with its tensors on `device`."""
    later = device.type == "cuda"  # from pinned memory; the device takes copies in their turn
    return _changed(value, lambda leaf: leaf.to(device, non_blocking=later) if isinstance(leaf, Tensor) else leaf)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The same nested structure with its floating-point tensors in one dtype."""

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return _changed(value, cast)


def for_windows(call: BlockCall, windows: int) -> BlockCall:
    """A block's arguments for a batch of so many windows."""
    changed: BlockCall = _changed(call, lambda leaf: leaf.of(windows) if isinstance(leaf, PerWindow) else leaf)
    return changed


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A nested structure with each of its leaves changed."""
    if isinstance(value, BlockCall):
        return replace(value, args=_changed(value.args, change), kwargs=_changed(value.kwargs, change))
    if isinstance(value, dict):
        return {k: _changed(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_changed(v, change) for v in value)
    return change(value)


def marked(one: Any, two: Any) -> Any:
    """A window's arguments, in any structure, with those marked which two windows have two of.

    Args:
        one: for one window.
        two: for that and another one.

    Raises:
        SnpError: an argument is not the same for both windows.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        doubled = one.dim() > 0 and two.shape == (2 * len(one), *one.shape[1:])
        if not torch.equal(PerWindow(one).of(2) if doubled else one, two):
            raise SnpError(
                f"blocks get other arguments for other tokens, of shape {tuple(one.shape)}; expected what depends on "
                "positions alone. Such models are not supported."
            )
        return PerWindow(one) if doubled else one
    if isinstance(one, dict):
        return {key: marked(value, two[key]) for key, value in one.items()}
    if isinstance(one, list | tuple) and not hasattr(one, "_fields"):
        return type(one)(marked(*pair) for pair in zip(one, two, strict=True))
    return one


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """What a model is called with so that its blocks keep no cache."""
    takers = (model, model.base_model, text_model(model))  # some hand it on among other arguments
    return {"use_cache": False} if any("use_cache" in signature(m.forward).parameters for m in takers) else {}


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """What a model is called with to go on from a cache, by the name that its version of transformers has for it."""
    known = signature(getattr(model, "_orig_mod", model).forward).parameters  # of a compiled one that of the model
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}


def first_tensor(output: Any) -> Tensor:
    """The hidden states in a module's output, which is a tensor or a tuple that starts with it."""
    return output if isinstance(output, Tensor) else output[0]


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """`output` with its hidden states replaced and other tensors (attention weights), which nobody reads, dropped."""
    if isinstance(output, Tensor):
        return tensor
    kind: type = list if isinstance(output, list) else tuple
    dropped = (isinstance(value, Tensor) and not isinstance(value, nn.Parameter) for value in output[1:])
    return kind((tensor, *(None if gone else value for value, gone in zip(output[1:], dropped, strict=True))))
