"""How far a pruned model is from the dense one on a text: perplexity, divergence, agreement, and questions answered."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from snp_llm.models.logits import logits_by_window

OPTIONS = 4  # of a question, one of them real
CONTEXT, CONTINUATION = 48, 16  # tokens of a question and of each option


@dataclass(frozen=True)
class Quality:
    """Of one model on one text.

    Attributes:
        perplexity: `exp` of the mean negative log-likelihood of tokens 2..T of every window.
        kl: mean over the same places of the divergence of the model's next token from the dense one's, in nats.
        agreement: share of these places where both find the same token the likeliest.
    """

    perplexity: float
    kl: float
    agreement: float


@torch.no_grad()
def dense_logits(model: PreTrainedModel, windows: Tensor, batch_size: int, device: torch.device) -> list[Tensor]:
    """Logits of each window without its last place, (T - 1, vocabulary), on the CPU in the model's dtype."""
    return [logits[0, :-1].cpu() for logits, _ in logits_by_window(model, windows, batch_size, device)]


@torch.no_grad()
def quality(
    model: PreTrainedModel, dense: list[Tensor], windows: Tensor, batch_size: int, device: torch.device
) -> Quality:
    """Perplexity of a model and its distance from the dense one.

    Args:
        model: dense or pruned.
        dense: `dense_logits` of the same windows.
        windows: (windows, T), int64.
        batch_size: windows at a time.
        device: to compute on.
    """
    loss, divergence, agreed = 0.0, 0.0, 0
    passes = logits_by_window(model, windows, batch_size, device)
    for expected, (logits, tokens) in zip(dense, passes, strict=True):
        found = functional.log_softmax(logits[0, :-1].float(), dim=-1)
        wanted = functional.log_softmax(expected.to(found.device).float(), dim=-1)
        loss += functional.nll_loss(found, tokens[0, 1:], reduction="sum").item()
        divergence += functional.kl_div(found, wanted, log_target=True, reduction="sum").item()
        agreed += int((found.argmax(-1) == wanted.argmax(-1)).sum())
    count = windows.shape[0] * (windows.shape[1] - 1)
    return Quality(math.exp(min(loss / count, 700.0)), divergence / count, agreed / count)


@dataclass(frozen=True)
class Questions:
    """Which of four continuations is real.

    Attributes:
        tokens: context and option, (questions, 4, CONTEXT + CONTINUATION), int64.
        answers: the real option of each, (questions,), int64.
    """

    tokens: Tensor
    answers: Tensor


def make_questions(text: Tensor, count: int, seed: int = 0) -> Questions:
    """Questions out of a text; the wrong options are what stands a little further on, in most cases in one document.

    Args:
        text: token ids, (tokens,), int64.
        count: questions, spread over the text; fewer where it is short.
        seed: of the options' order.
    """
    length = CONTEXT + OPTIONS * CONTINUATION
    starts = torch.arange(0, len(text) - length + 1, max(length, (len(text) - length) // max(1, count)))[:count]
    order = torch.argsort(torch.rand(len(starts), OPTIONS, generator=torch.Generator().manual_seed(seed)), dim=1)
    rows = []
    for start, places in zip(starts.tolist(), order, strict=True):
        context = text[start : start + CONTEXT]
        parts = text[start + CONTEXT : start + length].reshape(OPTIONS, CONTINUATION)[places]
        rows.append(torch.cat([context.expand(OPTIONS, -1), parts], dim=1))
    return Questions(torch.stack(rows), (order == 0).nonzero()[:, 1])


@torch.no_grad()
def answered(model: PreTrainedModel, questions: Questions, batch_size: int, device: torch.device) -> float:
    """Share of the questions whose real continuation is the likeliest to the model."""
    sequences = questions.tokens.flatten(0, 1)
    scores = [
        -functional.cross_entropy(logits[0, CONTEXT - 1 : -1].float(), tokens[0, CONTEXT:]).item()
        for logits, tokens in logits_by_window(model, sequences, OPTIONS * batch_size, device)
    ]
    chosen = torch.tensor(scores).reshape(-1, OPTIONS).argmax(1)
    return float((chosen == questions.answers).double().mean())
