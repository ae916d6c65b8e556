"""Logits of a model whose blocks are run one at a time, wherever its weights are."""

import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.models.anatomy import embedding_rows, find_blocks
from snp_llm.models.blocks import capture_calls, logits_of, run_block
from snp_llm.models.calls import BlockCall
from snp_llm.models.offload import on_device, rest_on_device
from snp_llm.models.text_part import text_config
from snp_llm.models.window import capture_window
from snp_llm.runtime.batches import BatchSize, in_batches
from snp_llm.runtime.device import free_bytes, has_room, ran_out, where_it_fits
from snp_llm.runtime.signs import unheard

HIDDEN_BYTES = 2**29  # of hidden states that are held in host memory while perplexity is measured

DEVICE_SHARE = 0.5  # of what is free on a GPU, that hidden states may take there

CPU = torch.device("cpu")

log = logging.getLogger(__name__)


@torch.no_grad()
def logits_block_by_block(
    model: PreTrainedModel, tokens: Tensor, blocks: nn.ModuleList | None = None, device: torch.device = CPU
) -> Tensor:
    """Logits of windows, on the CPU; one block is in memory at a time.

    Args:
        model: of a supported family.
        tokens: (windows, T), int64.
        blocks: to run in the place of the model's own.
        device: to compute on.

    Returns:
        (windows, T, vocabulary).
    """
    return torch.cat([logits.cpu() for logits, _ in logits_by_window(model, tokens, len(tokens), device, blocks)])


def logits_by_window(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    device: torch.device,
    others: nn.ModuleList | None = None,
    on_share: Callable[[float], None] = unheard,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Window by window, logits (1, T, vocabulary) and tokens (1, T), on the device or, where that lacks room, the CPU.

    Hidden states stay on a GPU if there is room for them, so that weights are read once; else they wait on the CPU.

    Args:
        model: of a supported family.
        windows: (windows, T), int64.
        batch_size: windows at a time.
        device: to compute on.
        others: blocks to run in the place of the model's own.
        on_share: told the share of the work that is done.
    """
    model.eval()
    blocks, length = find_blocks(model), windows.shape[1]
    window_bytes = length * text_config(model.config).hidden_size * model.dtype.itemsize
    room = DEVICE_SHARE * (free_bytes(device) - max(_coming(block, device) for block in blocks))
    waiting = device if device.type == "cuda" and room >= batch_size * window_bytes else CPU
    at_once = max(batch_size, int(HIDDEN_BYTES if waiting is CPU else room) // window_bytes)
    batch, done = BatchSize(batch_size), 0.0
    # Of a window, in blocks: the head is one more, or several where the vocabulary is large.
    head = embedding_rows(model) * text_config(model.config).hidden_size / max(1, _parameters(blocks) / len(blocks))
    whole = len(windows) * (len(blocks) + head)
    # Logits and what is computed from them, in float32, beside the head.
    wanted = length * embedding_rows(model) * (model.dtype.itemsize + 2 * 4)
    wanted += _coming(model, device) - _coming(blocks, device)

    def embedded(chunk: Tensor, place: torch.device) -> tuple[Tensor, list[BlockCall]]:
        with rest_on_device(model, blocks, place):
            first, calls = capture_window(model, blocks, chunk[:1])
            where = CPU if place.type == "cpu" else waiting
            hidden = torch.empty(len(chunk), *first.shape[1:], dtype=first.dtype, device=where)
            for at in range(0, len(chunk), batch_size):  # batches kept until all are there would be as much again
                hidden[at : at + batch_size] = capture_calls(model, blocks, chunk[at : at + batch_size])[0]
        return hidden, calls

    def some(chunk: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # whose hidden states are gone before the next come
        nonlocal done
        hidden, calls = where_it_fits("embeddings", device, partial(embedded, chunk))
        for block, call in zip(others or blocks, calls, strict=True):
            with on_device(block, device):
                _advance(block, hidden, call, batch)
            done += len(chunk)
            on_share(done / whole)
        left = [*zip(chunk.split(1), hidden.split(1), strict=True)]
        if has_room(device, wanted):
            try:
                yield from through_head(left, device)
            except RuntimeError as error:
                if device.type == "cpu" or not ran_out(error):
                    raise
        if left:
            log.info("no room on %s for logits of a window; computed on the CPU", device)
            yield from through_head(left, CPU)

    def through_head(left: list[tuple[Tensor, Tensor]], place: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal done
        with rest_on_device(model, blocks, place):
            while left:
                tokens, states = (tensor.to(place) for tensor in left[0])
                logits = logits_of(model, blocks, tokens, states)
                left.pop(0)
                yield logits, tokens
                del logits  # before the next are made
                done += head
                on_share(min(1.0, done / whole))

    for chunk in windows.split(at_once):
        yield from some(chunk)


def _parameters(blocks: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in blocks.parameters())


def _coming(module: nn.Module, device: torch.device) -> int:
    """Bytes of a module's parameters that are not on a device yet."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.device.type != device.type)


def _advance(block: nn.Module, hidden: Tensor, call: BlockCall, batch: BatchSize) -> None:
    """Hidden states before a block, (windows, T, d), become those after it."""
    for at, output in in_batches(len(hidden), batch, lambda at: run_block(block, hidden[at], call)):
        hidden[at] = output
