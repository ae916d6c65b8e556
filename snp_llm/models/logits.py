"""Logits of a model whose blocks are run one at a time, wherever its weights are."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import capture_calls, logits_of, on_device, rest_on_device, run_block
from snp_llm.models.text_part import text_config
from snp_llm.models.window import capture_window

HIDDEN_BYTES = 2**29  # of hidden states that are held while perplexity is measured


@torch.no_grad()
def logits_block_by_block(model: PreTrainedModel, tokens: Tensor, blocks: nn.ModuleList | None = None) -> Tensor:
    """Logits of windows on the CPU; one block is in memory at a time.

    Args:
        model: of a supported family.
        tokens: (windows, T), int64.
        blocks: to run in the place of the model's own.

    Returns:
        (windows, T, vocabulary).
    """
    return torch.cat(
        [logits for logits, _ in logits_by_window(model, tokens, len(tokens), torch.device("cpu"), blocks)]
    )


def logits_by_window(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    device: torch.device,
    others: nn.ModuleList | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Window by window, logits (1, T, vocabulary) and tokens (1, T), on the device."""
    model.eval()
    blocks = find_blocks(model)
    bytes_a_token = text_config(model.config).hidden_size * model.dtype.itemsize
    at_once = max(batch_size, HIDDEN_BYTES // (windows.shape[1] * bytes_a_token))
    for chunk in windows.split(at_once):
        with rest_on_device(model, blocks, device):
            calls = capture_window(model, blocks, chunk[:1])[1]
            hidden = torch.cat([capture_calls(model, blocks, batch)[0].cpu() for batch in chunk.split(batch_size)])
        for block, call in zip(others or blocks, calls, strict=True):
            with on_device(block, device):
                for batch in hidden.split(batch_size):
                    batch.copy_(run_block(block, batch, call))
        with rest_on_device(model, blocks, device):
            for tokens, states in zip(chunk.split(1), hidden.split(1), strict=True):
                tokens = tokens.to(device)
                yield logits_of(model, blocks, tokens, states.to(device)), tokens
