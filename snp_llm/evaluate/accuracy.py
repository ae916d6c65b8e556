"""How many images a model classifies rightly, and how many a second. Knows nothing of pruning."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.evaluate.turns import in_turns, timed
from snp_llm.models.offload import on_device
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.signs import UNWATCHED, Signs

TOP5_FROM = 20  # classes, from which on the first five are counted as well

TURNS = 7  # passes of each model that are timed, after one that warms up


@dataclass(frozen=True)
class Accuracy:
    """Shares of images whose class is the first, or among the first five, that a model names; in per cent.

    Attributes:
        top1: of the first.
        top5: of the first five; None for models of few classes.
        images: counted.
    """

    top1: float
    top5: float | None
    images: int


@torch.no_grad()
def accuracy(
    models: Sequence[PreTrainedModel],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    signs: Signs = UNWATCHED,
) -> list[Accuracy]:
    """Accuracy of each model on the same images, which are read once.

    Args:
        models: classifiers; left where they are. All of them fit on the device together.
        batches: pixels, (batch, channels, height, width), and classes, (batch,), int64.
        device: to compute on.
        signs: told how many images are done; how many there are is known at their end.

    Raises:
        SnpError: no images; logits that are not finite.
    """
    device, count = torch.device(device), 0
    right = torch.zeros(len(models), 2, dtype=torch.int64)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(on_device(model.eval(), device))
        for pixels, classes in batches:
            count += len(classes)
            signs.step(f"{count:,} images")
            for model, found in zip(models, right, strict=True):
                logits = model(pixels.to(device, model.dtype)).logits.float().cpu()
                if not torch.isfinite(logits).all():
                    raise SnpError("accuracy: expected finite logits, got NaN or Inf. Try --dtype float32.")
                hits = logits.topk(min(5, logits.shape[1])).indices == classes[:, None]
                found += torch.stack([hits[:, 0].sum(), hits.sum()])
    if not count:
        raise SnpError("accuracy: expected at least one image, got none.")
    few = [len(model.config.id2label or ()) < TOP5_FROM for model in models]
    shares = (100 * right / count).tolist()
    return [Accuracy(one, None if f else five, count) for (one, five), f in zip(shares, few, strict=True)]


@torch.no_grad()
def image_times(
    models: Sequence[PreTrainedModel], pixels: Tensor, *, device: torch.device | str = "cpu"
) -> list[list[float]]:
    """Seconds that each model takes to classify a batch, in every turn, the models taking turns.

    Args:
        models: classifiers; left where they are.
        pixels: one batch, (batch, channels, height, width).
        device: to compute on.
    """
    device = torch.device(device)
    given = pixels.to(device)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(on_device(model.eval(), device))
        passes = [partial(timed, partial(model, given.to(model.dtype)), device) for model in models]
        in_turns(passes, 1)  # warms up
        return in_turns(passes, TURNS)
