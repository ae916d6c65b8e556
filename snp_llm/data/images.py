"""Pixels out of images, for calibration and for evaluation. Knows image processors, no models and no datasets."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snp_llm.data.pictures import NOISE, Pictures, class_names, labels_of, open_pictures
from snp_llm.runtime.errors import SnpError, reason, shown

AT_ONCE = 256  # images that are decoded before they become pixels

SHUFFLED = 1_000  # of a stream, from which its images are drawn

MODES = {1: "L", 3: "RGB"}  # what an image is turned into, by the channels of a model


@dataclass(frozen=True)
class Form:
    """What a model takes.

    Attributes:
        processor: makes pixels of images.
        channels: of an image.
        size: height and width, or None where any will do.
        labels: number of each class, by its name.
        classes: how many there are.
        dtype: of the pixels.
        numbers: of each class of a dataset that names its classes as the model does, in the dataset's order; empty
            where labels are the model's own numbers.
    """

    processor: Any
    channels: int
    size: tuple[int, int] | None
    labels: dict[str, int]
    classes: int
    dtype: torch.dtype
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Images:
    """Equally large images, ready for a model.

    Attributes:
        tokens: pixels, (images, channels, height, width); what a model is called with, as the tokens of a text are.
        description: where they are from, how many, and how large, for people.
        digest: SHA-256 of the pixels.
        origin: dataset and split.
    """

    tokens: Tensor
    description: str
    digest: str
    origin: str


def calibration_images(form: Form, pictures: Pictures, *, num_samples: int, seed: int) -> Images:
    """A seeded draw of images; fewer, said in the description, where there are no more.

    Args:
        form: that the model takes.
        pictures: to draw from; `noise` draws standard normal pixels, the paper's white noise.
        num_samples: images that are wanted.
        seed: of the draw.

    Raises:
        SnpError: no such images, or some that cannot be read.
    """
    if pictures.name == NOISE:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(num_samples, *_shape(form), generator=generator)
        return images_of(drawn.to(form.dtype), "white noise")
    rows, label = open_pictures(pictures, "calibration")
    if isinstance(rows, Sequence):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
        chosen: Iterable[Any] = (rows[i] for i in order)
    else:
        chosen = islice(rows.shuffle(seed=seed, buffer_size=SHUFFLED), num_samples)
    pixels = [pixels for pixels, _ in _batches(chosen, form, pictures, AT_ONCE, labelled=False)]
    if not pixels:
        raise SnpError(f"images {pictures.name}: expected at least one image, got none.")
    drawn = torch.cat(pixels)
    short = f" ({num_samples} asked for, there are no more)" if len(drawn) < num_samples else ""
    return images_of(drawn, label, short)


def given_images(form: Form, data: Any, columns: Pictures, *, num_samples: int, seed: int) -> Images:
    """A seeded draw of images from data in memory, as `calibration_images` draws from datasets.

    Args:
        form: that the model takes.
        data: pixels as the processor makes them, (images, channels, height, width); or a sequence, or an iterable of
            which the first are taken, of Pillow's images, of files, or of records with a column of either.
        columns: names of those of a record.
        num_samples: images that are wanted.
        seed: of the draw.

    Raises:
        SnpError: nothing of that kind.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(data, Tensor):
        if data.dim() != 4 or not data.is_floating_point() or not len(data):
            raise SnpError(
                "data: expected pixels, (images, channels, height, width), floating point, got "
                f"{data.dtype} of shape {tuple(data.shape)}."
            )
        chosen = data[torch.randperm(len(data), generator=generator)[:num_samples]].cpu()
        return images_of(_as_form(chosen, form, columns), columns.name)
    if isinstance(data, Sequence):
        data = (data[i] for i in torch.randperm(len(data), generator=generator)[:num_samples].tolist())
    rows = (row if isinstance(row, dict) else {columns.image: row} for row in islice(data, num_samples))
    pixels = [found for found, _ in _batches(rows, form, columns, AT_ONCE, labelled=False)]
    if not pixels:
        raise SnpError("data: expected at least one image, got none.")
    return images_of(torch.cat(pixels), columns.name)


def images_of(pixels: Tensor, origin: str, remark: str = "") -> Images:
    """Images of pixels, (images, channels, height, width)."""
    count, _, height, width = pixels.shape
    description = f"{origin}, {count} images of {height} x {width} pixels{remark}"
    digest = hashlib.sha256(pixels.float().numpy().tobytes()).hexdigest()
    return Images(pixels, description, digest, origin)


def labelled_batches(
    form: Form, pictures: Pictures, *, batch_size: int, most: int | None = None
) -> tuple[Iterator[tuple[Tensor, Tensor]], str]:
    """All images of a split in their order, or the first `most`, as pixels and classes, and where they are from.

    Raises:
        SnpError: no such images, some that cannot be read, no labels, or labels that are none of the model's classes.
    """
    rows, label = open_pictures(pictures, "evaluation")
    names = class_names(rows, pictures)
    if names and all(name in form.labels for name in names):
        form = replace(form, numbers=tuple(form.labels[name] for name in names))
    for number, known in enumerate(labels_of(rows, pictures)):
        _class({pictures.label: known}, number, form, pictures)
    return _batches(islice(iter(rows), most), form, pictures, batch_size, labelled=True), label


def _batches(
    rows: Iterable[Any], form: Form, pictures: Pictures, batch_size: int, *, labelled: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels, (batch, channels, height, width), and classes, (batch,), int64; no classes where none are wanted."""
    numbered = enumerate(rows)
    while batch := [*islice(numbered, batch_size)]:
        images = [_decoded(row, number, form, pictures) for number, row in batch]
        classes = [_class(row, number, form, pictures) for number, row in batch] if labelled else []
        yield _pixels(images, form, pictures), torch.tensor(classes, dtype=torch.int64)


def _decoded(row: dict[str, Any], number: int, form: Form, pictures: Pictures) -> Any:
    """An image in the channels of the model: a grey one has the same in all three."""
    from PIL import Image

    if pictures.image not in row:
        raise SnpError(
            f"images {pictures.name}: expected a column {pictures.image!r} of images, it has {', '.join(row)}. Name it "
            "with --image-column."
        )
    value, where = row[pictures.image], f"images {pictures.name}, number {number:,}"
    try:
        if isinstance(value, dict) and value.get("bytes"):
            import io

            value = Image.open(io.BytesIO(value["bytes"]))
        elif isinstance(value, Path | str):
            where = f"images {pictures.name}, {Path(value).name}"
            value = Image.open(value)
        if value.mode[0] in "IF":
            raise ValueError(f"its values have more than 8 bits, mode {value.mode}")
        return value.convert(MODES[form.channels])
    except Exception as error:  # whatever Pillow says of what is no image
        raise SnpError(f"{where}: expected an image, cannot be read ({reason(error)}).") from error


def _class(row: dict[str, Any], number: int, form: Form, pictures: Pictures) -> int:
    label = row.get(pictures.label)
    where = f"images {pictures.name}, number {number:,}"
    if label is None:
        raise SnpError(
            f"{where}: expected a label, in a column {pictures.label!r} or as the folder that the image is in; it has "
            "none. Name the column with --label-column."
        )
    found = form.labels.get(label, int(label) if label.isdecimal() else -1) if isinstance(label, str) else label
    if form.numbers and isinstance(found, int) and not isinstance(label, str | bool):
        found = form.numbers[found] if 0 <= found < len(form.numbers) else -1
    if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < form.classes:
        raise SnpError(f"{where}: expected one of the model's {form.classes:,} classes as a label, got {shown(label)}.")
    return found


def _pixels(images: list[Any], form: Form, pictures: Pictures) -> Tensor:
    try:
        pixels: Tensor = form.processor(images=images, return_tensors="pt")["pixel_values"]
    except Exception as error:  # whatever a processor says of images that are not as it wants them
        raise SnpError(f"images {pictures.name}: the processor does not take them ({reason(error)}).") from error
    return _as_form(pixels, form, pictures)


def _as_form(pixels: Tensor, form: Form, pictures: Pictures) -> Tensor:
    """Pixels in the type of a model, if they are of a size that it takes."""
    got = tuple(pixels.shape[1:])
    if got[0] != form.channels or (form.size is not None and got[1:] != form.size):
        size = "any size" if form.size is None else " x ".join(map(str, form.size))
        raise SnpError(
            f"images {pictures.name}: the model's processor makes {got[0]} x {got[1]} x {got[2]} pixels of them; "
            f"expected {form.channels} channels of {size}. The preprocessor_config.json is another model's."
        )
    return pixels.to(form.dtype)


def _shape(form: Form) -> tuple[int, ...]:
    """Channels, height and width of what the processor makes."""
    from PIL import Image

    return tuple(_pixels([Image.new(MODES[form.channels], (256, 256))], form, Pictures(NOISE)).shape[1:])
