"""Tokens a second that models read, block by block and in turns. Knows nothing of pruning."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import capture_calls, on_device, rest_on_device, run_block, run_without_blocks
from snp_llm.models.calls import move
from snp_llm.runtime.device import synchronize


@torch.no_grad()
def prefill_speed(
    models: Sequence[PreTrainedModel], tokens: Tensor, *, device: torch.device | str = "cpu", repeats: int = 5
) -> list[float]:
    """Tokens a second that each model reads, the models taking turns so that drift of the machine cancels.

    The time is the sum of those of all blocks, of embeddings and of the head, each measured by itself: a model need not
    fit on the device.

    Args:
        models: of supported families; left where they are. One with fewer blocks takes no time in place of the rest.
        tokens: one batch, (batch, T), int64.
        device: to compute on.
        repeats: timed passes of each, after a warm-up; the median counts.
    """
    device = torch.device(device)
    tokens = tokens.to(device)
    blocks = [find_blocks(model.eval()) for model in models]
    captured = [capture_calls(m, b, tokens) for m, b in zip(models, blocks, strict=True)]
    seconds = [0.0 for _ in models]

    def take_turns(passes: Sequence[Callable[[], object]]) -> None:
        times: list[list[float]] = [[] for _ in passes]
        for _ in range(1 + repeats):
            for its_times, run in zip(times, passes, strict=True):
                synchronize(device)
                start = time.perf_counter()
                run()
                synchronize(device)
                its_times.append(time.perf_counter() - start)
        for at, its_times in enumerate(times):
            seconds[at] += statistics.median(its_times[1:])  # the first warms up

    for index, together in enumerate(zip_longest(*blocks)):
        with ExitStack() as stack:
            for block in filter(None, together):
                stack.enter_context(on_device(block, device))
            take_turns(
                [
                    partial(run_block, block, hidden.to(device), move(calls[index], device)) if block else lambda: None
                    for block, (hidden, calls) in zip(together, captured, strict=True)
                ]
            )
    with ExitStack() as stack:
        for model, its_blocks in zip(models, blocks, strict=True):
            stack.enter_context(rest_on_device(model, its_blocks, device))
        take_turns([partial(run_without_blocks, m, b, tokens) for m, b in zip(models, blocks, strict=True)])
    return [tokens.numel() / its_seconds for its_seconds in seconds]
