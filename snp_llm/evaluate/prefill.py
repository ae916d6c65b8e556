"""Tokens a second that models read, block by block and in turns. Knows nothing of pruning."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.evaluate.turns import in_turns, timed
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import capture_calls, run_block, run_without_blocks
from snp_llm.models.calls import move
from snp_llm.models.offload import on_device, rest_on_device
from snp_llm.runtime.signs import unheard

FEWEST_TURNS, MOST_TURNS = 5, 25

ENOUGH = 2.0  # seconds of measuring, after which there are no more turns than the fewest


@torch.no_grad()
def prefill_times(
    models: Sequence[PreTrainedModel],
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    turns: int | None = None,
    on_share: Callable[[float], None] = unheard,
) -> list[list[float]]:
    """Seconds that each model takes to read a batch, in every turn, the models taking turns.

    They are the sums of those of all blocks, of embeddings and of the head, each measured by itself: a model need not
    fit on the device.

    Args:
        models: of supported families; left where they are. One with fewer blocks takes no time in place of the rest.
        tokens: one batch, (batch, T), int64.
        device: to compute on.
        turns: timed passes of each, after a warm-up; None: five, and up to 25 where that takes less than two seconds.
        on_share: told the share of the blocks that is done.
    """
    device = torch.device(device)
    tokens = tokens.to(device)
    blocks = [find_blocks(model.eval()) for model in models]
    captured = [capture_calls(m, b, tokens) for m, b in zip(models, blocks, strict=True)]
    stages, whole = max(map(len, blocks)) + 1, [[] for _ in models]  # type: ignore[var-annotated]

    def measure(runs: Sequence[Callable[[], object]]) -> None:
        nonlocal turns
        passes = [partial(timed, run, device) for run in runs]
        in_turns(passes, 1)  # warms up
        if turns is None:
            once = stages * sum(seconds for (seconds,) in in_turns(passes, 1))
            turns = min(max(FEWEST_TURNS, int(ENOUGH / max(once, 1e-9))), MOST_TURNS)
        for of_model, times in zip(whole, in_turns(passes, turns), strict=True):
            of_model.append(times)

    for index, together in enumerate(zip_longest(*blocks)):
        with ExitStack() as stack:
            for block in filter(None, together):
                stack.enter_context(on_device(block, device))
            measure(
                [
                    partial(run_block, block, hidden.to(device), move(calls[index], device)) if block else lambda: None
                    for block, (hidden, calls) in zip(together, captured, strict=True)
                ]
            )
        on_share((index + 1) / stages)
    with ExitStack() as stack:
        for model, its_blocks in zip(models, blocks, strict=True):
            stack.enter_context(rest_on_device(model, its_blocks, device))
        measure([partial(run_without_blocks, m, b, tokens) for m, b in zip(models, blocks, strict=True)])
    return [[sum(turn) for turn in zip(*of_model, strict=True)] for of_model in whole]
