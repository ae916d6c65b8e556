"""What a model is for, writing text or classifying images, and what follows from it for its loss and its words.

Whatever differs between the two is chosen by this one name: here, in `evaluate/material.py` (what models are calibrated
on and measured by), and in tables of what loads, times or counts them. Everything else asks neither.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm.models.registry import auto_class
from snp_llm.models.text_part import text_model
from snp_llm.runtime.device import in_float64

# Summed over what it is a loss of, from logits and the inputs that they are of: token ids (windows, T), or pixels.
Loss = Callable[[Tensor, Tensor], Tensor]

USUAL_SIZE = 224  # pixels, of images for models that take any


@dataclass(frozen=True)
class Task:
    """What a model is for.

    Attributes:
        name: "text" or "images"; by it other rooms know what is theirs.
        reader: the Auto class of what makes inputs of texts or images.
        item: what a training is counted in, in the singular.
        work: what FLOPs are of.
        windows: what calibration is counted in, in the plural.
        smallest: runs a model on the smallest of its inputs, with a whole mask or none, for the sake of its shapes.
        loss: summed negative log-likelihood, from logits and the inputs that they are of.
        losses: how many likelihoods that is a sum of.
    """

    name: str
    reader: str
    item: str
    work: str
    windows: str
    smallest: Callable[[PreTrainedModel, bool], object]
    loss: Loss
    losses: Callable[[Tensor], int]


def two_tokens(model: PreTrainedModel, masked: bool) -> object:
    """What a model's text part makes of two tokens of which nothing is known but their shape."""
    mask = torch.zeros(1, 1, 2, 2, dtype=model.dtype, device="meta") if masked else None
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    return text_model(model)(tokens, attention_mask=mask, use_cache=False)


def one_image(model: PreTrainedModel, _masked: bool) -> object:
    """What a model makes of an image of which nothing is known but its shape."""
    return model(torch.zeros(1, *image_shape(model.config), dtype=model.dtype, device="meta"))


def image_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of an image; 224 x 224 where the config leaves that to the processor."""
    size = getattr(config, "image_size", None) or USUAL_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def next_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed negative log-likelihood of tokens 2..T, from logits (windows, T, vocabulary) and tokens (windows, T)."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")


def drawn_labels(logits: Tensor, pixels: Tensor) -> Tensor:
    """Summed negative log-likelihood of labels drawn from the model's own softmax, of logits (images, classes).

    The second moment of its gradient is the Fisher information, which no label is needed for. Labels of images that a
    model was trained on are fitted: their gradients vanish, and with them what they say of any site. The draw follows
    from the image, so that it is the same in whatever batch the image comes.
    """
    chances = functional.softmax(in_float64(logits.detach()), -1).cumsum(-1)
    seeds = in_float64(pixels.detach()).flatten(1).sum(1).mul(1e3).long().tolist()
    drawn = torch.tensor([torch.rand((), generator=torch.Generator().manual_seed(s % 2**63)).item() for s in seeds])
    labels = torch.searchsorted(chances, drawn.to(chances)[:, None]).squeeze(1).clamp(max=logits.shape[-1] - 1)
    return functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


TEXT = Task(
    name="text",
    reader="AutoTokenizer",
    item="token",
    work="a token",
    windows="windows",
    smallest=two_tokens,
    loss=next_tokens,
    losses=lambda tokens: tokens.numel(),
)
IMAGES = Task(
    name="images",
    reader="AutoImageProcessor",
    item="image",
    work="an image",
    windows="images",
    smallest=one_image,
    loss=drawn_labels,
    losses=len,
)

BY_CLASS = {"AutoModelForImageClassification": IMAGES}  # all others write text


def task_of(config: PretrainedConfig) -> Task:
    """What a model of a config is for.

    Raises:
        SnpError: from `auto_class`.
    """
    return BY_CLASS.get(auto_class(config).__name__, TEXT)
