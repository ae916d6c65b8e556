"""The tools of a run; its recipe made definite by a model, and model and text checked before the first block."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.checkpoint.journal import Journal
from snp_llm.data.windows import Windows
from snp_llm.evaluate.material import material_of
from snp_llm.models.anatomy import Anatomy, find_anatomy
from snp_llm.models.layouts import FEWEST_STEPS, KERNEL_MULTIPLE, check_code
from snp_llm.models.offload import on_device, rest_on_device
from snp_llm.models.site import Site
from snp_llm.models.task import Loss
from snp_llm.models.text_part import text_config
from snp_llm.recipe.kernels import ROWS
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.runtime.batches import BatchSize
from snp_llm.runtime.device import Clock, device_name, where_it_fits
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.signs import UNWATCHED, Signs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """The tools of a run, never its results.

    Attributes:
        recipe: all settings.
        clock: of the compute device.
        journal: of the phase that is on: keeps what it has done, and knows what an interrupted one has.
        signs: told of each site, each block of the dense model, and what begins.
        loss: what gradients are of, from logits and the inputs that they are of; None: the task's own.
        batch: the most windows that are known to fit; all phases share it.
    """

    recipe: ResolvedRecipe
    clock: Clock
    journal: Journal
    signs: Signs = UNWATCHED
    loss: Loss | None = None
    batch: BatchSize = field(default_factory=BatchSize)

    def phase(self, name: str) -> "Run":
        """The tools of a phase, with the journal of its own."""
        return replace(self, journal=self.journal.phase(name))


def resolve(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> ResolvedRecipe:
    """The recipe with texts, window length, rounding and sparsity filled in for a model, and BOS for a tokenizer.

    Raises:
        SnpError: the window is longer than the model's positions; the model is not of a supported family, or has code
            of its own; hidden states are to wait where no blocks are run.
    """
    check_code(model)
    kind = device_name(recipe.device)
    if kind == "mps" and model.dtype == torch.float64:
        raise SnpError("--dtype float64: Apple's GPUs have no such type; expected --dtype float32, or --device cpu.")
    if recipe.hidden_device not in ("auto", "cpu", "disk", kind):
        raise SnpError(
            f"--hidden-device {recipe.hidden_device}: expected auto, cpu, disk or {kind}, where blocks are run."
        )
    if recipe.norm_statistics == "pass" and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise SnpError("--norm-statistics pass: expected a model with batch norms; this one has none. Leave it out.")
    check_rows(model, recipe)
    settings = {
        **material_of(model.config).settings(recipe, model, tokenizer),
        "round_to": recipe.round_to or (recipe.row if recipe.for_ else usual_rounding(model, recipe.layout)),
        "sparsity": recipe.common_sparsity,
    }
    return ResolvedRecipe(**{**vars(recipe), **settings})


def check_rows(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raises SnpError if rows that no width changes, those as long as the hidden size, do not fit what --for names."""
    hidden = int(getattr(text_config(model.config), "hidden_size", 0))
    if hidden % recipe.row:
        fitting = ", ".join(kernel for kernel, row in ROWS.items() if hidden % row == 0) or "none"
        raise SnpError(
            f"--for {recipe.for_}: expected a hidden size in multiples of {recipe.row}, got {hidden:,}, so that other "
            f"rows fit as little as the dense model's. This model's fit --for {fitting}; or use "
            f"--round-to {math.gcd(hidden, recipe.row)} and a quantiser that takes groups of that size."
        )


def usual_rounding(model: PreTrainedModel, layout: str) -> int:
    """What FFN widths are multiples of where nothing else is asked for."""
    narrowest = min((site.units for site in find_anatomy(model).sites if site.heads is None), default=0)
    coarse = layout == "uniform" and narrowest >= KERNEL_MULTIPLE * FEWEST_STEPS
    return KERNEL_MULTIPLE if coarse else 8


def announce_heads(sites: Sequence[Site], recipe: Recipe) -> None:
    """Says what head units became of those asked for, where the model has no such choice."""
    first = next((site for site in sites if site.heads is not None and site.prunable), None)
    if first is None:
        return
    if recipe.head_unit == "kv_group" and first.unit == "query heads":
        log.warning("%s: one key-value head; query heads are the units instead of KV groups", first.name)
    elif recipe.head_unit == "query" and first.unit != "query heads":
        log.warning("%s: every key-value head has one query head; both go together", first.name)


def announce_experts(anatomy: Anatomy, recipe: Recipe) -> None:
    """Says so where experts were to lose something, and there are none that are known."""
    if recipe.experts != "never" and not any(site.mixture is not None for site in anatomy.sites):
        log.warning("--experts %s: this model has no experts that are known; nothing goes of any", recipe.experts)


def check_weights(anatomy: Anatomy, device: torch.device) -> None:
    """Raises SnpError with the tensor's name if a weight is NaN or Inf; one block is in memory at a time."""
    model, blocks = anatomy.model, anatomy.blocks
    names = {id(module): name for name, module in model.named_modules()}

    def check(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta and not torch.isfinite(parameter).all():
                    raise SnpError(
                        f"{names[id(module)]}.{name}: weights hold NaN or Inf; expected finite numbers. The checkpoint "
                        "is damaged."
                    )

    def check_rest(place: torch.device) -> None:
        with rest_on_device(model, blocks, place):
            check(model.modules())  # blocks that are on disk are passed over here

    def check_block(block: nn.Module, place: torch.device) -> None:
        with on_device(block, place):
            check(block.modules())

    where_it_fits("embeddings and head: weights", device, check_rest)
    for index, block in enumerate(blocks):
        where_it_fits(f"block {index}: weights", device, partial(check_block, block))


def read_calibration(
    tokenizer: PreTrainedTokenizerBase, recipe: ResolvedRecipe, model: PreTrainedModel, more: int = 0, data: Any = None
) -> Windows:
    """The calibration windows, or images, of a recipe or out of data in memory, and `more` after them, checked against
    the model."""
    material = material_of(model.config)
    if data is not None:
        windows = material.given(tokenizer, data, recipe, model, more)
    else:
        windows = material.calibration(tokenizer, recipe, model, more)
    material.remark(model, len(windows.tokens) - more, recipe)
    return windows
