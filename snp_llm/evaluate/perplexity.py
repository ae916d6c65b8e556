"""Perplexity, over whole windows and with a stride. Knows nothing of pruning."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from snp_llm.models.logits import logits_by_window
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.signs import unheard


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    on_share: Callable[[float], None] = unheard,
) -> float:
    """`exp` of the mean negative log-likelihood of tokens 2..T of every window.

    Blocks are run one at a time, so that a model need fit neither on the device nor, where its weights are on disk,
    into host memory. Ranks share the windows.

    Args:
        model: of a supported family; left where it is.
        windows: (windows, T), int64.
        batch_size: windows at a time; has no influence on the result beyond rounding.
        device: to compute on.
        on_share: told the share of the work that is done, in [0, 1].

    Raises:
        SnpError: the likelihood is not finite.
    """
    total = torch.zeros((), dtype=torch.float64)
    mine = ranks.share(len(windows))
    own, place = windows[mine.start : mine.stop], torch.device(device)
    for logits, tokens in logits_by_window(model, own, batch_size, place, on_share=on_share):
        # In float32 window by window: a whole batch of logits in float32 would be the largest tensor of the run.
        total += functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum").item()
    ranks.add_up([total])
    return exp_mean(total.item(), windows.shape[0] * (windows.shape[1] - 1))


def exp_mean(total: float, count: int) -> float:
    """`exp` of a mean negative log-likelihood, from its sum and the number of tokens.

    Raises:
        SnpError: it is not finite.
    """
    mean = total / count
    if not math.isfinite(mean):
        raise SnpError(f"perplexity: expected a finite log-likelihood, got {mean}. Try --dtype float32.")
    return math.exp(min(mean, 700.0))


@dataclass(frozen=True)
class Sliding:
    """How a text is cut into windows that overlap.

    Attributes:
        seq_len: tokens a window.
        stride: from the begin of one to that of the next, at most the tokens of text in a window.
        bos: what every window starts with; None: with text.
        max_windows: only the first ones.
    """

    seq_len: int
    stride: int
    bos: int | None = None
    max_windows: int | None = None


@torch.no_grad()
def strided_perplexity(
    model: PreTrainedModel,
    text: Tensor,
    sliding: Sliding,
    *,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    on_share: Callable[[float], None] = unheard,
) -> tuple[float, int]:
    """`exp` of the mean negative log-likelihood of all tokens but the first, each given a long stretch before it.

    Windows of `seq_len` tokens begin at every multiple of `stride`, up to the first that reaches the end of the text,
    where it is cut. In every window those tokens count that no earlier window held, which are its last `stride`, so
    that each has at least `seq_len - stride` tokens before it as soon as the text has so many. A token without any
    before it, the first of a window when `stride` is `seq_len`, does not count. With `bos` that id stands before every
    window, which then holds one token of text less, and the first token of the text counts too.

    Args:
        model: of a supported family; left where it is.
        text: token ids, (tokens,), int64, at least two.
        sliding: windows.
        batch_size: windows at a time; has no influence on the result beyond rounding.
        device: to compute on.
        on_share: told the share of the work that is done, in [0, 1].

    Returns:
        Perplexity and the number of tokens counted.

    Raises:
        SnpError: the likelihood is not finite.
    """
    seq_len, stride, bos = sliding.seq_len, sliding.stride, sliding.bos
    length, total, counted = len(text), 0.0, 0
    room = seq_len if bos is None else seq_len - 1
    starts = range(0, max(1, length - room + stride), stride)[: sliding.max_windows]
    full = [start for start in starts if start + room <= length]
    for begins in (full, starts[len(full) :]):  # the last may be shorter than all others
        if not begins:
            continue
        told = on_share if begins is full else unheard
        windows = torch.stack([text[start : start + room] for start in begins])
        if bos is not None:
            windows = torch.cat([torch.full((len(begins), 1), bos), windows], dim=1)
        passes = logits_by_window(model, windows, batch_size, torch.device(device), on_share=told)
        for start, (logits, window) in zip(begins, passes, strict=True):
            new = max(1, seq_len - stride) if start else 1  # the first position that counts
            total += functional.cross_entropy(logits[0, new - 1 : -1].float(), window[0, new:], reduction="sum").item()
            counted += window.shape[1] - new
    return exp_mean(total, counted), counted
