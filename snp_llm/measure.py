"""What a model costs and how well it predicts: sizes, FLOPs, speed, perplexity. Knows nothing of pruning."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from snp_llm.device import synchronize
from snp_llm.errors import SnpError
from snp_llm.models.blocks import on_device
from snp_llm.models.families import Projection, find_blocks, find_family, find_sites


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
    attended = sum(s.units * s.unit_size for s in find_sites(blocks, family) if s.kind == "attention")
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

    Args:
        model: on `device` for as long as it takes.
        windows: (windows, T), int64.
        batch_size: windows at a time; has no influence on the result beyond rounding.

    Raises:
        SnpError: the likelihood is not finite.
    """
    total = 0.0
    with on_device(model.eval(), torch.device(device)):
        for batch in windows.split(batch_size):
            batch = batch.to(device)
            logits = model(batch, use_cache=False).logits[:, :-1]
            # Window by window in float32: a whole batch of logits in float32 would be the largest tensor of the run.
            for window, target in zip(logits, batch[:, 1:], strict=True):
                total += functional.cross_entropy(window.float(), target, reduction="sum").item()
    return _exp_mean(total, windows.shape[0] * (windows.shape[1] - 1))


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
    max_windows: int | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> tuple[float, int]:
    """`exp` of the mean negative log-likelihood of all tokens but the first, each given a long stretch before it.

    Windows of `seq_len` tokens begin at every multiple of `stride`, up to the first that reaches the end of the text,
    where it is cut. In every window those tokens count that no earlier window held, which are its last `stride`, so
    that each has at least `seq_len - stride` tokens before it as soon as the text has so many. A token without any
    before it, the first of a window when `stride` is `seq_len`, does not count.

    Args:
        model: on `device` for as long as it takes.
        tokens: one text, (tokens,), int64, at least two.
        seq_len: tokens a window.
        stride: at most that.
        max_windows: only the first ones.
        batch_size: windows at a time; has no influence on the result beyond rounding.

    Returns:
        Perplexity and the number of tokens counted.

    Raises:
        SnpError: the likelihood is not finite.
    """
    length, total, counted = len(tokens), 0.0, 0
    starts = range(0, max(1, length - seq_len + stride), stride)[:max_windows]
    full = [start for start in starts if start + seq_len <= length]
    batches = [full[at : at + batch_size] for at in range(0, len(full), batch_size)]
    batches += [[start] for start in starts if start + seq_len > length]  # shorter than all others
    with on_device(model.eval(), torch.device(device)):
        for batch in batches:
            windows = torch.stack([tokens[start : start + seq_len] for start in batch]).to(device)
            logits = model(windows, use_cache=False).logits
            for start, window, row in zip(batch, windows, logits, strict=True):
                new = max(1, seq_len - stride) if start else 1  # the first position that counts
                total += functional.cross_entropy(row[new - 1 : -1].float(), window[new:], reduction="sum").item()
                counted += len(window) - new
    return _exp_mean(total, counted), counted


@torch.no_grad()
def prefill_speed(
    models: Sequence[PreTrainedModel], tokens: Tensor, *, device: torch.device | str = "cpu", repeats: int = 5
) -> list[float]:
    """Tokens a second that each model reads, the models taking turns so that drift of the machine cancels.

    Args:
        models: on `device` one at a time, so that both need not fit.
        tokens: one batch, (batch, T), int64.
        repeats: timed passes of each model, each after a warm-up; the median counts.
    """
    device = torch.device(device)
    tokens = tokens.to(device)
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        for times, model in zip(seconds, models, strict=True):
            with on_device(model.eval(), device):
                model(tokens, use_cache=False)
                synchronize(device)
                start = time.perf_counter()
                model(tokens, use_cache=False)
                synchronize(device)
                times.append(time.perf_counter() - start)
    return [tokens.numel() / statistics.median(times) for times in seconds]
