"""How a model calls its blocks for one window, in a form that holds for any number of them. Knows no blocks inside."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.models.blocks import capture_calls
from snp_llm.models.calls import BlockCall, marked


def capture_window(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
    """What `capture_calls` gives for one window, with arguments that hold for batches of any size.

    Args:
        model: on whatever device it is.
        blocks: its decoder blocks.
        tokens: one window, (1, T), int64.

    Raises:
        SnpError: blocks get something else for other tokens.
    """
    first, calls = capture_calls(model, blocks, tokens)
    _, both = capture_calls(model, blocks, torch.cat([tokens, tokens.roll(1, 1)]))
    return first, [
        replace(one, args=marked(one.args, two.args), kwargs=marked(one.kwargs, two.kwargs))
        for one, two in zip(calls, both, strict=True)
    ]
