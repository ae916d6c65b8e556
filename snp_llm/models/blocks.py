"""Capture and run one decoder block at a time. Knows how blocks are called, not what is inside them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from snp_llm.models.calls import BlockCall, call_of, for_windows, in_dtype, move, through, without_cache
from snp_llm.models.carried import lay_out, like
from snp_llm.models.experts import Arrived, Mixture, watch_arrivals
from snp_llm.models.offload import rest_on_device
from snp_llm.models.segments import Segments
from snp_llm.models.task import Loss, task_of
from snp_llm.runtime.errors import SnpError, shown

T = TypeVar("T")


class _Reached(Exception):  # noqa: N818 - not an error
    """Ends a block's forward pass once the module of interest has been reached."""


@torch.no_grad()
def capture_calls(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """Hidden states before the first block, and every block's own arguments, for one batch.

    Each block is replaced by the identity for one forward pass, which therefore costs embeddings and masks only; every
    block's arguments are recorded separately, since families exist in which blocks get different ones.

    Args:
        model: on whatever device it is.
        blocks: its decoder blocks.
        tokens: (batch, T), int64.

    Returns:
        Hidden states (batch, T, d), with what else is carried along in further channels, and one call per block, on the
        model's device.
    """
    if isinstance(blocks, Segments):
        return tokens, [BlockCall((), {}) for _ in blocks]
    seen: list[tuple[int, Tensor, BlockCall]] = []

    def note(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((index, hidden, call_of(blocks[index], args, kwargs)))
        return hidden

    def run() -> None:
        seen.clear()
        model.base_model(tokens.to(device), **without_cache(model))

    home = next(model.get_input_embeddings().parameters()).device
    device = torch.device("cpu") if home.type == "meta" else home  # weights on disk are read into host memory
    with rest_on_device(model, blocks, device):
        _run_past(blocks, note, run)
    if (order := [index for index, _, _ in seen]) != [*range(len(blocks))]:
        raise SnpError(
            f"{type(model).__name__}: expected blocks that run once each, one after the other, got blocks "
            f"{', '.join(map(str, order))}. What cutting one changes is not known; this model is not supported."
        )
    calls = [call for _, _, call in seen]
    state, laid_out = lay_out(blocks, seen[0][1], [call.kwargs for call in calls])
    return state, [replace(call, carried=of) for call, of in zip(calls, laid_out, strict=True)]


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """A block's output hidden states, (batch, T, d), computed where the block is."""
    device = next((p.device for p in block.parameters()), hidden.device)  # a block that has gone has none
    return through(block, move(hidden, device), move(for_windows(call, len(hidden)), device))


def run_with(block: nn.Module, weights: dict[str, Tensor], hidden: Tensor, call: BlockCall) -> Tensor:
    """A block's output hidden states with other weights in place of its own, for gradients of these.

    Args:
        block: left as it was.
        weights: by the names of its parameters, of their shapes, where the block is.
        hidden: its input, (batch, T, d), in the dtype of the weights.
        call: its other arguments, which are taken in that dtype too.

    Returns:
        (batch, T, d).
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return functional_call(block, weights, args, kwargs)

    arguments = in_dtype(move(for_windows(call, len(hidden)), hidden.device), hidden.dtype)
    return through(run, hidden, arguments)


@torch.no_grad()
def run_without_blocks(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> None:
    """Embeddings, last norm and head, for whoever wants to know how long they take."""
    _run_past(blocks, _pass_on, lambda: model(tokens, **without_cache(model)))


def logits_of(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor) -> Tensor:
    """Logits from what the last block puts out: the last norm and the head.

    Args:
        model: its embeddings, last norm and head are where `hidden` is.
        blocks: its decoder blocks; none is run.
        tokens: (batch, T), int64, on the same device.
        hidden: output of the last block, (batch, T, d).

    Returns:
        (batch, T, vocabulary).
    """

    if isinstance(blocks, Segments):
        return hidden

    def put(index: int, given: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return like(hidden, given) if index == len(blocks) - 1 else given

    logits: Tensor = _run_past(blocks, put, lambda: model(tokens, **without_cache(model))).logits
    return logits


def loss_gradient(
    model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor, hidden: Tensor, loss_of: Loss | None = None
) -> Tensor:
    """Gradient of a loss with respect to what the last block puts out.

    Args:
        model: its embeddings, last norm and head are where `hidden` is.
        blocks: its decoder blocks; none is run.
        tokens: (batch, T), int64, on the same device.
        hidden: output of the last block, (batch, T, d).
        loss_of: the loss of one window; None: the task's summed negative log-likelihood.

    Returns:
        (batch, T, d), in the dtype of `hidden`.

    Raises:
        SnpError: what should be the loss is no number that the logits have a gradient of.
    """
    gradients, loss_of = [], loss_of or task_of(model.config).loss
    for window, states in zip(tokens.split(1), hidden.split(1), strict=True):  # one at a time: logits are large
        leaf = states.detach().requires_grad_()
        with torch.enable_grad():
            loss = loss_of(logits_of(model, blocks, window, leaf), window)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise SnpError(
                    f"loss: expected a tensor of one number, computed from the logits, got {shown(loss)[:60]}."
                )
            gradients.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(gradients)


def input_gradient(
    block: nn.Module,
    hidden: Tensor,
    call: BlockCall,
    gradient: Tensor,
    watchers: dict[nn.Module, Callable[[Tensor], None]],
) -> Tensor:
    """Gradient at a block's input from that at its output; each watcher sees the gradient at its module's output.

    The block runs forward once more for it, so that only one block's activations are ever held.

    Args:
        block: its parameters do not require gradients.
        hidden: its input, (batch, T, d).
        call: its other arguments.
        gradient: of the loss at its output, (batch, T, d), where the block is.
        watchers: by module inside the block.

    Returns:
        (batch, T, d), where the block is.
    """
    device = gradient.device
    leaf = hidden.detach().to(device).requires_grad_()

    def hook(watch: Callable[[Tensor], None], output: Tensor) -> None:
        output.register_hook(watch)

    with torch.enable_grad(), watch_outputs({module: partial(hook, watch) for module, watch in watchers.items()}):
        output = through(block, leaf, move(for_windows(call, len(leaf)), device))
        return torch.autograd.grad(output, leaf, gradient)[0]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient, as long as the context lasts."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def input_of(module: nn.Module, block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The input tensor that `module` gets inside the block; nothing after that point is computed."""
    (inputs,) = inputs_of([module], block, hidden, call)
    assert inputs is not None
    return inputs


def inputs_of(modules: Sequence[nn.Module], block: nn.Module, hidden: Tensor, call: BlockCall) -> list[Tensor | None]:
    """The input tensor that each of the modules gets inside the block; nothing is computed after the last of them.

    None for a module that is not run, as an expert that no token comes by.
    """
    seen: dict[nn.Module, Tensor] = {}

    def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module] = inputs[0]
        if len(seen) == len(modules):
            raise _Reached

    with _attached(module.register_forward_pre_hook(stop) for module in modules), suppress(_Reached):
        run_block(block, hidden, call)
    return [seen.get(module) for module in modules]


def arrived_at(mixture: Mixture, block: nn.Module, hidden: Tensor, call: BlockCall) -> Arrived:
    """What arrives at the experts of a block; nothing after that point is computed."""
    seen: list[Arrived] = []

    def stop(came: Arrived) -> None:
        seen.append(came)
        raise _Reached

    with watch_arrivals(block, mixture, stop), suppress(_Reached):
        run_block(block, hidden, call)
    return seen[0]


def output_of(module: nn.Module, block: nn.Module, hidden: Tensor, call: BlockCall) -> Any:
    """What `module` returns inside the block, in its own structure; nothing after that point is computed."""
    result: list[Any] = []

    def stop(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
        result.append(output)
        raise _Reached

    with module.register_forward_hook(stop), suppress(_Reached):
        run_block(block, hidden, call)
    return result[0]


def watch_inputs(watchers: dict[nn.Module, Callable[[Tensor], None]]) -> AbstractContextManager[None]:
    """Shows each module's input tensor to its watcher, as long as the context lasts."""
    return _attached(
        module.register_forward_pre_hook(lambda _module, inputs, watch=watch: watch(inputs[0]))
        for module, watch in watchers.items()
    )


def watch_outputs(watchers: dict[nn.Module, Callable[[Tensor], None]]) -> AbstractContextManager[None]:
    """Shows each module's output tensor to its watcher, as long as the context lasts."""
    return _attached(
        module.register_forward_hook(lambda _module, _inputs, output, watch=watch: watch(output))
        for module, watch in watchers.items()
    )


def fixed_output(module: nn.Module, output: Any) -> AbstractContextManager[None]:
    """Lets `module` return `output` without computing anything, as long as the context lasts."""
    return _replaced_forwards({module: lambda *_args, **_kwargs: output})


@contextmanager
def _attached(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


@contextmanager
def _replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    before: dict[nn.Module, Any] = {m: m.__dict__.get("forward") for m in forwards}  # accelerate puts its own there
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _pass_on(_index: int, hidden: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden


def _run_past(blocks: nn.ModuleList, forward: Callable[..., Tensor], run: Callable[[], T]) -> T:
    """Runs a model with another forward in place of its blocks', which gets the block's index before its arguments.

    Blocks put out a tensor or a tuple that begins with it. Only the model knows which it expects: what breaks, or
    takes the first window for all, with the one gets the other.
    """

    def given(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(hidden.shape)
        if hidden.shape != shapes[0]:
            raise ValueError(f"hidden states have the shape {[*hidden.shape]} after {[*shapes[0]]}")
        return forward(index, hidden, *args, **kwargs)

    def in_tuple(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return given(*args, **kwargs), None

    failed: list[Exception] = []
    try:
        for form in (given, in_tuple):
            shapes: list[torch.Size] = []
            try:
                with _replaced_forwards({block: partial(form, index) for index, block in enumerate(blocks)}):
                    return run()
            except (ValueError, IndexError, TypeError, AttributeError) as error:
                failed.append(error)
        raise failed[0]
    finally:
        failed.clear()  # or what their frames hold of a device stays until Python looks for cycles
