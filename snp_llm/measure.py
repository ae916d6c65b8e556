"""What a model costs and how well it predicts: sizes, FLOPs, speed, perplexity. Knows nothing of pruning."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from snp_llm import ranks
from snp_llm.device import synchronize
from snp_llm.errors import SnpError
from snp_llm.models.blocks import (
    capture_calls,
    logits_of,
    move,
    on_device,
    rest_on_device,
    run_block,
    run_without_blocks,
)
from snp_llm.models.families import Projection, find_blocks, find_family, find_sites

HIDDEN_BYTES = 2**29  # of hidden states that are held while perplexity is measured


@dataclass(frozen=True)
class ModelSize:
    """What a model takes up.

    Attributes:
        parameters: all, tied ones once.
        block_linear: weights of the decoder blocks' linears, which is what sparsity is a fraction of.
        bytes: of all parameters in their dtypes, tied ones once: the safetensors files less their headers.
        flops: a token at prefill: two for every weight of a linear, LM head included, and four for every attention
            channel and position attended to, of which a causal window of T tokens has (T + 1) / 2 on average.
    """

    parameters: int
    block_linear: int
    bytes: int
    flops: float


def model_size(model: PreTrainedModel, seq_len: int) -> ModelSize:
    """Sizes of a model of a supported family; works on the meta device too."""
    family = find_family(model.config)
    blocks = find_blocks(model, family)
    unique = {id(p): p for p in model.parameters()}.values()
    linear = sum(_weights(block) for block in blocks)
    attended = sum(s.channels for s in find_sites(blocks, family) if s.kind == "attention")
    return ModelSize(
        parameters=sum(p.numel() for p in unique),
        block_linear=linear,
        bytes=sum(p.numel() * p.element_size() for p in unique),
        flops=2.0 * _weights(model) + 4.0 * attended * (seq_len + 1) / 2,
    )


def _weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, Projection))


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: Tensor, *, batch_size: int = 8, device: torch.device | str = "cpu"
) -> float:
    """`exp` of the mean negative log-likelihood of tokens 2..T of every window.

    Blocks are run one at a time, so that a model need fit neither on the device nor, where its weights are on disk,
    into host memory. Ranks share the windows.

    Args:
        model: of a supported family; left where it is.
        windows: (windows, T), int64.
        batch_size: windows at a time; has no influence on the result beyond rounding.
        device: to compute on.

    Raises:
        SnpError: the likelihood is not finite.
    """
    total = torch.zeros((), dtype=torch.float64)
    mine = ranks.share(len(windows))
    for logits, tokens in _logits(model, windows[mine.start : mine.stop], batch_size, torch.device(device)):
        # In float32 window by window: a whole batch of logits in float32 would be the largest tensor of the run.
        total += functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="sum").item()
    ranks.add_up([total])
    return _exp_mean(total.item(), windows.shape[0] * (windows.shape[1] - 1))


def _exp_mean(total: float, count: int) -> float:
    mean = total / count
    if not math.isfinite(mean):
        raise SnpError(f"perplexity: expected a finite log-likelihood, got {mean}. Try --dtype float32.")
    return math.exp(min(mean, 700.0))


@torch.no_grad()
def strided_perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    seq_len: int,
    stride: int,
    bos: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> tuple[float, int]:
    """`exp` of the mean negative log-likelihood of all tokens but the first, each given a long stretch before it.

    Windows of `seq_len` tokens begin at every multiple of `stride`, up to the first that reaches the end of the text,
    where it is cut. In every window those tokens count that no earlier window held, which are its last `stride`, so
    that each has at least `seq_len - stride` tokens before it as soon as the text has so many. A token without any
    before it, the first of a window when `stride` is `seq_len`, does not count. With `bos` that id stands before every
    window, which then holds one token of text less, and the first token of the text counts too.

    Args:
        model: of a supported family; left where it is.
        tokens: one text, (tokens,), int64, at least two.
        seq_len: tokens a window.
        stride: at most the tokens of text in a window.
        bos: what every window starts with; None: with text.
        max_windows: only the first ones.
        batch_size: windows at a time; has no influence on the result beyond rounding.

    Returns:
        Perplexity and the number of tokens counted.

    Raises:
        SnpError: the likelihood is not finite.
    """
    length, total, counted = len(tokens), 0.0, 0
    room = seq_len if bos is None else seq_len - 1
    starts = range(0, max(1, length - room + stride), stride)[:max_windows]
    full = [start for start in starts if start + room <= length]
    for begins in (full, starts[len(full) :]):  # the last may be shorter than all others
        if not begins:
            continue
        windows = torch.stack([tokens[start : start + room] for start in begins])
        if bos is not None:
            windows = torch.cat([torch.full((len(begins), 1), bos), windows], dim=1)
        passes = _logits(model, windows, batch_size, torch.device(device))
        for start, (logits, window) in zip(begins, passes, strict=True):
            new = max(1, seq_len - stride) if start else 1  # the first position that counts
            total += functional.cross_entropy(logits[0, new - 1 : -1].float(), window[0, new:], reduction="sum").item()
            counted += window.shape[1] - new
    return _exp_mean(total, counted), counted


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
    return torch.cat([logits for logits, _ in _logits(model, tokens, len(tokens), torch.device("cpu"), blocks)])


def _logits(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int,
    device: torch.device,
    others: nn.ModuleList | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Window by window, logits (1, T, vocabulary) and tokens (1, T), on the device."""
    model.eval()
    blocks = model.get_submodule(find_family(model.config).blocks)  # whatever they are made of
    assert isinstance(blocks, nn.ModuleList)
    bytes_a_token = model.config.hidden_size * model.dtype.itemsize
    at_once = max(batch_size, HIDDEN_BYTES // (windows.shape[1] * bytes_a_token))
    for chunk in windows.split(at_once):
        with rest_on_device(model, blocks, device):
            calls = capture_calls(model, blocks, chunk[:1])[1]
            hidden = torch.cat([capture_calls(model, blocks, batch)[0].cpu() for batch in chunk.split(batch_size)])
        for block, call in zip(others or blocks, calls, strict=True):
            with on_device(block, device):
                for batch in hidden.split(batch_size):
                    batch.copy_(run_block(block, batch, call))
        with rest_on_device(model, blocks, device):
            for tokens, states in zip(chunk.split(1), hidden.split(1), strict=True):
                tokens = tokens.to(device)
                yield logits_of(model, blocks, tokens, states.to(device)), tokens


@torch.no_grad()
def prefill_speed(
    models: Sequence[PreTrainedModel], tokens: Tensor, *, device: torch.device | str = "cpu", repeats: int = 5
) -> list[float]:
    """Tokens a second that each model reads, the models taking turns so that drift of the machine cancels.

    The time is the sum of those of all blocks, of embeddings and of the head, each measured by itself: a model need not
    fit on the device.

    Args:
        models: of supported families, with equally many blocks; left where they are.
        tokens: one batch, (batch, T), int64.
        device: to compute on.
        repeats: timed passes of each, after a warm-up; the median counts.
    """
    device = torch.device(device)
    tokens = tokens.to(device)
    blocks = [find_blocks(model.eval(), find_family(model.config)) for model in models]
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

    for index, together in enumerate(zip(*blocks, strict=True)):
        with ExitStack() as stack:
            for block in together:
                stack.enter_context(on_device(block, device))
            take_turns(
                [
                    partial(run_block, block, hidden.to(device), move(calls[index], device))
                    for block, (hidden, calls) in zip(together, captured, strict=True)
                ]
            )
    with ExitStack() as stack:
        for model, its_blocks in zip(models, blocks, strict=True):
            stack.enter_context(rest_on_device(model, its_blocks, device))
        take_turns([partial(run_without_blocks, m, b, tokens) for m, b in zip(models, blocks, strict=True)])
    return [tokens.numel() / its_seconds for its_seconds in seconds]
