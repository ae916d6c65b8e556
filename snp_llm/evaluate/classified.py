"""Several classifiers of images by one protocol: accuracy, size, speed, side by side. Knows nothing of pruning."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from snp_llm import checkpoint
from snp_llm.checkpoint.skeleton import check_reader, load_skeleton
from snp_llm.data.images import labelled_batches
from snp_llm.data.pictures import Pictures, check_pictures
from snp_llm.evaluate.accuracy import accuracy, image_times
from snp_llm.evaluate.material import SPEED_IMAGES, form_of
from snp_llm.models.size import model_size
from snp_llm.models.task import IMAGES, task_of
from snp_llm.recipe.checks import flag
from snp_llm.recipe.commands import EvaluationRecipe
from snp_llm.runtime.device import compute_device
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.signs import Watch


@dataclass(frozen=True)
class Classified:
    """What came out for one model.

    Attributes:
        model: as it was named.
        top1, top5: per cent of images classified rightly at the first guess, or with five; None for few classes.
        text: the images, for people.
        parameters: all.
        bytes: of its weight files, or of the weights where there is no folder of safetensors.
        flops: of an image.
        speed: images a second.
    """

    model: str
    top1: float
    top5: float | None
    text: str
    parameters: int
    bytes: int
    flops: float
    speed: float


def classify(recipe: EvaluationRecipe, watch: Watch) -> list[Classified]:
    """Evaluates every model of a recipe, with one in memory at a time.

    Args:
        recipe: all settings.
        watch: opens the signs of a piece of work by what it is.

    Raises:
        SnpError: a model or images that cannot be used; a setting that only texts have.
    """
    for name in ("tasks", "stride", "seq_len"):
        if getattr(recipe, name) is not None:
            raise SnpError(f"{flag(name)}: expected models of texts; {recipe.models[0]} is one of images.")
    if recipe.dataset is None:
        raise SnpError("--dataset: expected labelled images: a folder, a .parquet file or a hub id; got none.")
    pictures = Pictures(recipe.dataset, recipe.split, recipe.image_column, recipe.label_column)
    check_pictures(pictures, "evaluation")
    for name in recipe.models:
        config = load_skeleton(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code).config
        if task_of(config) is not IMAGES:
            raise SnpError(f"model {name}: expected one of images, as {recipe.models[0]} is; it is one of texts.")
        check_reader(name, config)
    device, results = compute_device(recipe.device), []
    for name in recipe.models:
        model, processor = checkpoint.load(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
        form, size = form_of(model.config, processor, model.dtype), max(recipe.batch_size, SPEED_IMAGES)
        batches, label = labelled_batches(form, pictures, batch_size=size, most=recipe.max_windows)
        with watch(f"{name}: accuracy") as signs:
            (found,) = accuracy([model], batches, device, signs)
        batches, _ = labelled_batches(form, pictures, batch_size=SPEED_IMAGES, most=SPEED_IMAGES)
        pixels = next(iter(batches))[0]
        with watch(f"{name}: speed"):
            (times,) = image_times([model], pixels, device=device)
        sizes = model_size(model, 1)
        stored = checkpoint.folder_bytes(Path(name)) or sizes.bytes
        text = f"{label}, {found.images:,} images"
        speed = len(pixels) / statistics.median(times)
        results.append(Classified(name, found.top1, found.top5, text, sizes.parameters, stored, sizes.flops, speed))
    return results
