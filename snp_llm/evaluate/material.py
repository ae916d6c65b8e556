"""What models are calibrated on and measured by: texts and perplexity, or images and accuracy.

The one place, beside `models/task.py`, that tells the two apart. Prunes nothing.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm.data.given import ORIGIN, given_windows
from snp_llm.data.images import Form, calibration_images, given_images, labelled_batches
from snp_llm.data.pictures import NOISE, Pictures, check_pictures
from snp_llm.data.sources import Dataset, Purpose, both_of, check_dataset
from snp_llm.data.windows import Windows, evaluation_windows, mixed_windows
from snp_llm.evaluate.accuracy import accuracy, image_times
from snp_llm.evaluate.continuations import continuations
from snp_llm.evaluate.perplexity import perplexity
from snp_llm.evaluate.prefill import prefill_times
from snp_llm.evaluate.samples import LOOKED_AT, Sample, samples
from snp_llm.evaluate.turns import Speeds, speeds_of
from snp_llm.models.anatomy import find_anatomy
from snp_llm.models.positions import positions, site_positions
from snp_llm.models.segments import Segments, find_segments
from snp_llm.models.task import task_of
from snp_llm.models.text import LONGEST_DEFAULT_WINDOW, check_tokens, resolve_bos, window_length
from snp_llm.models.text_part import text_config
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe, usual_text
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.errors import shown as as_shown
from snp_llm.runtime.signs import Watch

log = logging.getLogger(__name__)

LONGEST_COMPARISON = 128  # tokens on which the reloaded model is compared

UNNAMED = "none named"  # in place of images, where no pruning is meant

SPEED_IMAGES = 32  # that are classified at a time where their number a second is measured

Figures = dict[str, float | None]

NAMES = {2: ("dense", "pruned"), 3: ("dense", "pruned", "recovered")}  # of models, by how many are measured


@dataclass(frozen=True)
class Evaluation:
    """A way to say how good models are.

    Attributes:
        measure: figures of each of some models by their names, and what they were measured on, for people.
        shown: what a report shows of two models besides figures: sentences that they continue, or images.
    """

    measure: Callable[[Sequence[PreTrainedModel], torch.device, Watch], tuple[list[Figures], str]]
    shown: Callable[[Sequence[PreTrainedModel], torch.device], list[Sample]]


@dataclass(frozen=True)
class Material:
    """What models of a kind are calibrated on and measured by.

    Attributes:
        settings: those of a recipe that depend on a model and on what reads its inputs, which may not be there yet.
        check: refuses, before anything is loaded, what a recipe names for a purpose and is not there.
        calibration: what a recipe draws for a model, and so many more of it.
        given: likewise out of data in memory.
        evaluation: what a recipe measures by; what is wrong with that is said now.
        remark: says what is to be known of so many windows before they are pruned on.
        compared: of what was drawn, that on which the reloaded model is compared.
        speed: tokens or images a second of a dense and a pruned model, from what was drawn.
    """

    settings: Callable[[Recipe, PreTrainedModel, Any], dict[str, Any]]
    check: Callable[[Recipe, Purpose], None]
    calibration: Callable[[Any, ResolvedRecipe, PreTrainedModel, int], Windows]
    given: Callable[[Any, Any, ResolvedRecipe, PreTrainedModel, int], Windows]
    evaluation: Callable[[Any, ResolvedRecipe, PreTrainedModel], Evaluation]
    remark: Callable[[PreTrainedModel, int, ResolvedRecipe], None]
    compared: Callable[[Windows], Tensor]
    speed: Callable[[Sequence[PreTrainedModel], Windows, torch.device, Watch], Speeds]


def text_settings(recipe: Recipe, model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Texts, window length, and where BOS stands for a tokenizer."""
    longest = int(getattr(text_config(model.config), "max_position_embeddings", LONGEST_DEFAULT_WINDOW))
    return {
        "calibration": recipe.calibration or usual_text(recipe.model),
        "eval_dataset": recipe.eval_dataset or usual_text(recipe.model),
        "seq_len": window_length(recipe.seq_len, longest),
        "bos": recipe.bos if tokenizer is None else resolve_bos(recipe.bos, model, tokenizer),
    }


def check_text(recipe: Recipe, purpose: Purpose) -> None:
    """Raises SnpError for a text that is not there."""
    usual = usual_text(recipe.model)
    if purpose == "calibration":
        check_dataset(Dataset(recipe.calibration or usual, recipe.calibration_split, recipe.text_column), purpose)
    else:
        check_dataset(Dataset(recipe.eval_dataset or usual, recipe.eval_split, recipe.text_column), purpose)


def text_windows(tokenizer: Any, recipe: ResolvedRecipe, model: PreTrainedModel, more: int) -> Windows:
    """The calibration windows of a recipe, and `more` after them, checked against the model's vocabulary."""
    windows = mixed_windows(
        tokenizer,
        Dataset(recipe.calibration, recipe.calibration_split, recipe.text_column),
        num_samples=recipe.num_samples + more,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        bos=resolve_bos(recipe.bos, model, tokenizer),
    )
    check_tokens(windows, model)
    return windows


def text_given(tokenizer: Any, data: Any, recipe: ResolvedRecipe, model: PreTrainedModel, more: int) -> Windows:
    """Calibration windows out of data in memory, and `more` after them, checked against the model's vocabulary."""
    windows = given_windows(
        tokenizer,
        data,
        column=recipe.text_column,
        num_samples=recipe.num_samples + more,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        bos=recipe.bos,
    )
    check_tokens(windows, model)
    return windows


def by_perplexity(tokenizer: Any, recipe: ResolvedRecipe, model: PreTrainedModel) -> Evaluation:
    """Perplexity on the evaluation text of a recipe."""
    dataset = Dataset(recipe.eval_dataset, recipe.eval_split, recipe.text_column)
    windows = evaluation_windows(tokenizer, dataset, seq_len=recipe.seq_len, bos=recipe.bos)
    check_tokens(windows, model)
    if same := both_of(Dataset(recipe.calibration, recipe.calibration_split), dataset):
        log.warning("%s is calibrated on and measured by: perplexity of another text will rise by more", as_shown(same))

    def measure(models: Sequence[PreTrainedModel], device: torch.device, watch: Watch) -> tuple[list[Figures], str]:
        found: list[Figures] = []
        for name, model in zip(NAMES[len(models)], models, strict=True):
            with watch(f"perplexity of the {name} model") as signs:
                value = perplexity(
                    model, windows.tokens, batch_size=recipe.batch_size, device=device, on_share=signs.share
                )
                found.append({"perplexity": value})
        return found, windows.description

    def shown(models: Sequence[PreTrainedModel], device: torch.device) -> list[Sample]:
        return continuations(models, tokenizer, windows.tokens, recipe.shown_texts, device)

    return Evaluation(measure, shown)


def image_settings(recipe: Recipe, model: PreTrainedModel, _processor: Any) -> dict[str, Any]:
    """Images, and in place of a window's length the positions of an image in the narrowest place.

    Raises:
        SnpError: no images are named; a budget that only texts have.
    """
    if recipe.perplexity_increase is not None:
        raise SnpError("--max-perplexity-increase: expected a model of texts; one of images has no perplexity.")
    if recipe.target_latency is not None:
        raise SnpError("--target-latency: is not measured for models of images. Use --target-flops.")
    convolutional = find_segments(model) is not None
    if convolutional and recipe.refine_steps:
        raise SnpError("--refine: expected none for a convolutional network, whose blocks have no stream to follow.")
    return {
        "calibration": recipe.calibration or UNNAMED,
        "eval_dataset": recipe.eval_dataset or recipe.calibration or UNNAMED,
        "seq_len": positions(model),
        # What a convolution is to put out is not known from a stream that blocks add to.
        "reference": "self" if convolutional else recipe.reference,
    }


def check_images(recipe: Recipe, purpose: Purpose) -> None:
    """Raises SnpError for images that are not there, or not named."""
    if purpose == "calibration" and recipe.calibration in (None, UNNAMED):
        raise SnpError(
            "--calibration: expected images for this model: a folder, a .parquet file, a hub id, or noise; got none."
        )
    if purpose == "calibration" or recipe.eval_dataset is not None:
        check_pictures(pictures_of(recipe, purpose), purpose)
    elif recipe.calibration == NOISE:
        raise SnpError("--eval-dataset: expected labelled images beside noise, got none. Name some, or use --no-eval.")


def pictures_of(recipe: Recipe, purpose: Purpose) -> Pictures:
    """Images that a recipe names for a purpose."""
    if purpose == "calibration":
        name, split = recipe.calibration, recipe.calibration_split
    else:
        name, split = recipe.eval_dataset, recipe.eval_split
    return Pictures(str(name), split, recipe.image_column, recipe.label_column)


def form_of(config: PretrainedConfig, processor: Any, dtype: torch.dtype) -> Form:
    """What a model of a config takes of images."""
    size = getattr(config, "image_size", None)
    size = (size, size) if isinstance(size, int) else size
    labels = {str(name): int(number) for number, name in (config.id2label or {}).items()}
    channels = int(getattr(config, "num_channels", 3))
    return Form(processor, channels, size and (int(size[0]), int(size[1])), labels, len(labels), dtype)


def drawn_images(processor: Any, recipe: ResolvedRecipe, model: PreTrainedModel, more: int) -> Windows:
    """The calibration images of a recipe, and `more` after them."""
    check_images(recipe, "calibration")
    form, pictures = form_of(model.config, processor, model.dtype), pictures_of(recipe, "calibration")
    drawn = calibration_images(form, pictures, num_samples=recipe.num_samples + more, seed=recipe.seed)
    return cast(Windows, drawn)  # which has what pruning asks of windows


def say_what_is_short(model: PreTrainedModel, images: int, recipe: ResolvedRecipe) -> None:
    """Warns of sites with more channels than so many images have positions there; says what is the reference."""
    anatomy = find_anatomy(model, recipe.head_unit)
    blocks = anatomy.blocks
    if isinstance(blocks, Segments):
        log.info("layers of a convolutional network are repaired to put out what they did: --reference self")
    short: list[tuple[int, str]] = []
    for site in anatomy.sites:
        each = site_positions(model, blocks, site) if isinstance(blocks, Segments) else recipe.seq_len
        if images * each < site.channels:
            short.append((-(-site.channels // each), site.name))
    if short:
        needed, worst = max(short)
        log.warning(
            "%d images are fewer than %d of %d sites have channels for; the rest is guessed by dampening. %s needs %s: "
            "use a --num-samples of as many, or more.",
            *(images, len(short), len(anatomy.sites), worst, f"{needed:,}"),
        )


def images_given(processor: Any, data: Any, recipe: ResolvedRecipe, model: PreTrainedModel, more: int) -> Windows:
    """Calibration images out of data in memory, and `more` after them."""
    form, columns = form_of(model.config, processor, model.dtype), Pictures(ORIGIN, image=recipe.image_column)
    found = given_images(form, data, columns, num_samples=recipe.num_samples + more, seed=recipe.seed)
    return cast(Windows, found)


def by_accuracy(processor: Any, recipe: ResolvedRecipe, model: PreTrainedModel) -> Evaluation:
    """Accuracy on the evaluation images of a recipe; the first of them are read now."""
    form, pictures = form_of(model.config, processor, model.dtype), pictures_of(recipe, "evaluation")
    next(labelled_batches(form, pictures, batch_size=1)[0], None)

    def measure(models: Sequence[PreTrainedModel], device: torch.device, watch: Watch) -> tuple[list[Figures], str]:
        batches, label = labelled_batches(form, pictures, batch_size=max(recipe.batch_size, SPEED_IMAGES))
        with watch(f"accuracy of the {' and the '.join(NAMES[len(models)])} model") as signs:
            found = accuracy(models, batches, device, signs)
        return [{"top1": f.top1, "top5": f.top5} for f in found], f"{label}, {found[0].images:,} images"

    def shown(models: Sequence[PreTrainedModel], device: torch.device) -> list[Sample]:
        if not recipe.shown_images:
            return []
        batches, _ = labelled_batches(form, pictures, batch_size=LOOKED_AT, most=LOOKED_AT)
        return samples(models, *next(batches), recipe.shown_images, device)

    return Evaluation(measure, shown)


def prefill_speeds(models: Sequence[PreTrainedModel], windows: Windows, device: torch.device, watch: Watch) -> Speeds:
    """Tokens a second that a dense and a pruned model read of the first window."""
    tokens = windows.tokens[:1]
    with watch("speed of both models") as signs:
        return speeds_of(tokens.numel(), prefill_times(models, tokens, device=device, on_share=signs.share))


def image_speeds(models: Sequence[PreTrainedModel], images: Windows, device: torch.device, watch: Watch) -> Speeds:
    """Images a second that a dense and a pruned model classify of the first ones."""
    pixels = images.tokens[:SPEED_IMAGES]
    with watch("speed of both models"):
        return speeds_of(len(pixels), image_times(models, pixels, device=device))


TEXTS = Material(
    text_settings,
    check_text,
    text_windows,
    text_given,
    by_perplexity,
    remark=lambda _model, _windows, _recipe: None,
    compared=lambda windows: windows.tokens[:1, :LONGEST_COMPARISON],
    speed=prefill_speeds,
)
IMAGES = Material(
    image_settings,
    check_images,
    drawn_images,
    images_given,
    by_accuracy,
    remark=say_what_is_short,
    compared=lambda images: images.tokens[:2],
    speed=image_speeds,
)
MATERIALS = {"text": TEXTS, "images": IMAGES}


def material_of(config: PretrainedConfig) -> Material:
    """What models of a config's kind are calibrated on and measured by."""
    return MATERIALS[task_of(config).name]
