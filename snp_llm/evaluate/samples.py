"""A few images and what two models say of them, small enough to stand in a report. Knows nothing of pruning."""

import base64
import io
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.functional import softmax
from transformers import PreTrainedModel

from snp_llm.models.offload import on_device

LOOKED_AT = 64  # images, from which those to be shown are taken

LARGEST = 112  # pixels that a picture is high or wide at most

Sample = dict[str, str | float]


@torch.no_grad()
def samples(
    models: Sequence[PreTrainedModel], pixels: Tensor, classes: Tensor, count: int, device: torch.device
) -> list[Sample]:
    """Some images: half of them those that the two models differ most about, then the first ones.

    Args:
        models: dense and pruned.
        pixels: of the images, (images, channels, height, width).
        classes: theirs, (images,), int64.
        count: of those that are wanted; fewer where there are no more.
        device: to compute on.

    Returns:
        Of each the `picture` as a PNG in base64, its own class as `label`, and of either model the class of largest
        probability (`dense`, `pruned`) with that probability (`dense_chance`, `pruned_chance`).
    """
    with ExitStack() as stack:
        chances = []
        for model in models:
            stack.enter_context(on_device(model.eval(), device))
            chances.append(softmax(model(pixels.to(device, model.dtype)).logits.float(), -1).cpu())
    apart = (chances[0] - chances[1]).abs().sum(1).argsort(descending=True, stable=True)[: count // 2].tolist()
    chosen = [*apart, *(i for i in range(len(pixels)) if i not in apart)][:count]
    names = {int(number): str(name) for number, name in (models[0].config.id2label or {}).items()}
    found = []
    for i in chosen:
        said: Sample = {"picture": picture(pixels[i]), "label": names[int(classes[i])]}
        for name, of_model in zip(("dense", "pruned"), chances, strict=True):
            best = int(of_model[i].argmax())
            said |= {name: names[best], f"{name}_chance": round(float(of_model[i, best]), 4)}
        found.append(said)
    return found


def picture(pixels: Tensor) -> str:
    """An image as a PNG in base64: as the model gets it, from its darkest value to its brightest.

    Args:
        pixels: (channels, height, width), of one or three channels.
    """
    from PIL import Image

    low, high = pixels.float().aminmax()
    values = ((pixels.float() - low) / (high - low).clamp_min(1e-6) * 255).round().byte()
    image = Image.fromarray(values[0].numpy() if len(values) == 1 else values.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((LARGEST, LARGEST))
    into = io.BytesIO()
    image.save(into, "PNG", optimize=True)
    return base64.b64encode(into.getvalue()).decode()
