"""The experts of a block, whose weights are stacked in one tensor each, one by one and together again.

Which tensors are theirs, which rows of these are a channel's, and what of the router belongs to an expert. Knows no
numbers in them and chooses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from snp_llm.models.modeling_snp import set_counts

INWARD, OUTWARD = ("gate_up_proj", "up_proj"), "down_proj"  # stacked tensors: with and without a gate, and back
EACH = ("top_k", "num_experts_per_tok", "topk")  # attributes: experts that a token comes by
GROUPS = ("num_group", "n_group", "num_expert_group")  # attributes: groups of experts that routers choose among first


@dataclass(frozen=True)
class Mixture:
    """Experts of a block that only some tokens come by, all of one width.

    Attributes:
        module: path of the module that holds them.
        inward: name of the stacked in-projection.
        count: E, of experts.
        channels: of each.
        outputs: d_out, channels that they put out.
        each: experts that a token comes by.
        transposed: whether weights are stored (in, out) and not (out, in).
        gated: whether gate and up are in one projection.
        interleaved: whether their rows take turns; else all of the gate's come first.
        scaled: whether tokens arrive multiplied by the router's weights, every expert getting all of them.
        rows: of the router, by path: tensors with an entry for each expert, and their dimension for it.
        groups: of experts that the router chooses among first; 1 where there are none.
    """

    module: str
    inward: str
    count: int
    channels: int
    outputs: int
    each: int
    transposed: bool
    gated: bool
    interleaved: bool
    scaled: bool
    rows: tuple[tuple[str, int], ...]
    groups: int = 1

    @property
    def stacked(self) -> dict[str, tuple[int, int]]:
        """By path of every stacked tensor: its dimension of channels, and how many entries a channel has there."""
        times, into = 2 if self.gated else 1, 2 if self.transposed else 1
        return {
            f"{self.module}.{self.inward}": (into, times),
            f"{self.module}.{self.inward}_bias": (1, times),
            f"{self.module}.{OUTWARD}": (3 - into, 1),
        }


class Expert(nn.Module):
    """One expert, its projections views of the stacked tensors; what arrives at `outward` is weighted by the router."""

    def __init__(self, inward: nn.Linear, outward: nn.Linear) -> None:
        super().__init__()
        self.inward, self.outward = inward, outward


def of_experts(path: str) -> bool:
    """Whether what is at a path of a model belongs to experts that only some tokens come by."""
    return "experts" in path.split(".")


def find_experts(block: nn.Module) -> Mixture | None:
    """The experts of a block that are stacked, or None where there are none that are known."""
    for path, module in block.named_modules():
        inward = next((name for name in INWARD if _stack(module, name) is not None), None)
        if of_experts(path) and inward is not None and (down := _stack(module, OUTWARD)) is not None:
            return _read(block, path, module, inward, down)
    return None


def _stack(module: nn.Module, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return found if found is not None and found.dim() == 3 else None


def _read(block: nn.Module, path: str, module: nn.Module, inward: str, down: Tensor) -> Mixture | None:
    rows = module._parameters[inward]
    assert rows is not None
    count, gated = len(down), inward == INWARD[0]
    looks_so = rows.shape[1] == down.shape[2] and rows.shape[2] != down.shape[1]
    transposed = bool(getattr(module, "is_transposed", looks_so))
    into, out = rows.shape[2 if transposed else 1], down.shape[2 if transposed else 1]
    channels = down.shape[1 if transposed else 2]
    outer = block.get_submodule(path.rpartition(".")[0])
    around = [m for name, m in outer.named_modules() if not of_experts(name) and not name.startswith("shared")]
    each = next((n for name in EACH for m in around if isinstance(n := getattr(m, name, None), int)), 0)
    scaled = type(module).forward.__code__.co_argcount == 2 and not hasattr(module, "is_transposed")
    if into != (2 if gated else 1) * channels or getattr(module, "has_post_expert_norm", False):
        return None
    if each == 0 or (scaled and each > 1):
        return None
    return Mixture(
        path,
        inward,
        count,
        channels,
        out,
        each,
        transposed,
        gated,
        interleaved=not getattr(module, "is_concatenated", True),
        scaled=scaled,
        rows=_router_rows(outer, path.rpartition(".")[0], count),
        groups=next((n for name in GROUPS for m in around if isinstance(n := getattr(m, name, None), int) and n), 1),
    )


def _router_rows(outer: nn.Module, path: str, count: int) -> tuple[tuple[str, int], ...]:
    """Tensors around the experts with an entry for each, not theirs and not those of experts that all tokens share."""
    tensors = (*outer.named_parameters(), *outer.named_buffers())
    return tuple(
        (f"{path}.{name}" if path else name, tensor.shape.index(count))
        for name, tensor in tensors
        if count in tensor.shape and not of_experts(name) and not name.startswith("shared")
    )


def experts_module(block: nn.Module, mixture: Mixture) -> nn.Module:
    """The module that holds the stacked tensors."""
    return block.get_submodule(mixture.module)


def expert_of(block: nn.Module, mixture: Mixture, number: int) -> Expert:
    """One expert of a block; its weights are views until they are replaced."""
    module = experts_module(block, mixture)

    def linear(name: str, *, biased: bool) -> nn.Linear:
        weight = module.get_parameter(name).detach()[number]
        weight = weight.mT if mixture.transposed else weight
        with torch.device("meta"):
            new = nn.Linear(weight.shape[1], len(weight), bias=biased and f"{name}_bias" in module._parameters)
        new.weight = nn.Parameter(weight, requires_grad=False)
        if new.bias is not None:
            new.bias = nn.Parameter(module.get_parameter(f"{name}_bias").detach()[number], requires_grad=False)
        return new

    # What a bias of the out-projection adds, weighted by the router, is the same whatever channels go.
    return Expert(linear(mixture.inward, biased=True), linear(OUTWARD, biased=False))


def put_experts(block: nn.Module, mixture: Mixture, experts: Sequence[Expert]) -> None:
    """Gives a block experts of another width, as many as it has, in place; biases on what they put out stay."""
    module = experts_module(block, mixture)

    def put(name: str, tensors: list[Tensor]) -> None:
        old = module.get_parameter(name)
        stacked = torch.stack(tensors).to(old.device, old.dtype).contiguous()
        setattr(module, name, nn.Parameter(stacked, requires_grad=old.requires_grad))

    for name, projections in (
        (mixture.inward, [expert.inward for expert in experts]),
        (OUTWARD, [expert.outward for expert in experts]),
    ):
        put(name, [p.weight.mT if mixture.transposed else p.weight for p in projections])
        if f"{name}_bias" in module._parameters and name != OUTWARD:
            put(f"{name}_bias", [p.bias for p in projections])
    set_counts(module, ("intermediate", "expert_dim"), mixture.channels, experts[0].outward.in_features)


def activated(block: nn.Module, mixture: Mixture, expert: Expert, inputs: Tensor) -> Tensor:
    """What arrives at an expert's out-projection, before the router weighs it: (tokens, d) to (tokens, channels)."""
    module: Any = experts_module(block, mixture)
    projected = expert.inward(inputs)
    if not mixture.gated:
        found: Tensor = module.act_fn(projected)
        return found
    if hasattr(module, "_apply_gate"):
        found = module._apply_gate(projected)
        return found
    gate, up = projected.chunk(2, dim=-1)
    found = module.act_fn(gate) * up
    return found


@dataclass(frozen=True)
class Arrived:
    """What arrives at the experts of a block, for some windows.

    Attributes:
        inputs: of all experts, (tokens, d).
        chosen: experts that each token comes by, (tokens, k), int64.
        weights: that the router gives them, (tokens, k).
    """

    inputs: Tensor
    chosen: Tensor
    weights: Tensor

    def at(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that come by one expert, (t,), int64, what they bring, (t, d), and their weights, (t, 1)."""
        tokens, place = (self.chosen == number).nonzero(as_tuple=True)
        return tokens, self.inputs[tokens], self.weights[tokens, place][:, None]


def arrived(mixture: Mixture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arrived:
    """What arrives, from the arguments that the module of experts is called with."""
    values = [*args, *kwargs.values()]
    if not mixture.scaled:
        inputs, chosen, weights = values[:3]
        return Arrived(inputs.flatten(0, -2), chosen.flatten(0, -2), weights.flatten(0, -2))
    each = values[0].view(mixture.count, -1, values[0].shape[-1])
    chosen = each.abs().amax(-1).argmax(0)  # of a token all but one get zeros
    inputs = each[chosen, torch.arange(len(chosen), device=chosen.device)]
    return Arrived(inputs, chosen[:, None], torch.ones_like(inputs[:, :1]))


def put_out(mixture: Mixture, output: Tensor) -> Tensor:
    """What the module of experts puts out, or its gradient, token by token, (tokens, d_out)."""
    output = output.detach().reshape(-1, output.shape[-1])
    return output.view(mixture.count, -1, output.shape[-1])[0] if mixture.scaled else output


def watch_arrivals(block: nn.Module, mixture: Mixture, watch: Callable[[Arrived], None]) -> RemovableHandle:
    """Shows what arrives at the experts to a watcher, whenever the block runs, as long as the context lasts."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch(arrived(mixture, args, kwargs))

    return experts_module(block, mixture).register_forward_pre_hook(hook, with_kwargs=True)


def put_together(block: nn.Module, mixture: Mixture, came: Arrived) -> Tensor:
    """What the experts put out for tokens, one expert after the other, (tokens, d_out): what the module computes."""
    module = experts_module(block, mixture)
    bias = module._parameters.get(f"{OUTWARD}_bias")
    total = came.inputs.new_zeros(len(came.inputs), mixture.outputs)
    for number in range(mixture.count):
        tokens, inputs, weights = came.at(number)
        expert = expert_of(block, mixture, number)
        output = expert.outward(activated(block, mixture, expert, inputs) * weights)
        total.index_add_(0, tokens, output if bias is None else output + weights * bias[number])
    return total
