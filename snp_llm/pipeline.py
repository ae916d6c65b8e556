"""From a model and a recipe to a pruned model: visit, widths, the sequential loop, assembly. Writes no files."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.data import Windows, calibration_windows
from snp_llm.device import Clock, compute_device
from snp_llm.errors import SnpError
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.models.families import Site, embedding_rows, find_blocks, find_family, find_sites
from snp_llm.models.layouts import FEWEST_STEPS, KERNEL_MULTIPLE, assemble, pad_blocks
from snp_llm.recipe import Recipe
from snp_llm.sequential import prune_blocks
from snp_llm.site import SiteResult
from snp_llm.stream import capture
from snp_llm.visit import OnStep, SiteCurves, needs_visit, visit_dense
from snp_llm.widths import plan_widths

LONGEST_DEFAULT_WINDOW = 2048

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model with everything that is known about it.

    Attributes:
        model: an ordinary transformers model; its untouched tensors are the dense model's own.
        tokenizer: the dense model's.
        recipe: with the defaults that depend on the model filled in.
        sites: results in pruning order.
        calibration: the windows that were used.
        seconds: by phase.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    sites: list[SiteResult]
    calibration: Windows
    seconds: dict[str, float]


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    on_step: OnStep = lambda _line: None,
) -> PrunedModel:
    """Remove units from every attention and FFN site and repair the out-projections by least squares.

    Args:
        model: dense model of a supported family; left as it was.
        tokenizer: its tokenizer.
        recipe: all settings. Everything about files and evaluation is ignored here.
        on_step: called with a line of text after each site, and after each block of the dense model's visit.

    Raises:
        SnpError: unsupported model, unusable data or settings, numerical failure (with the block's name).
    """
    recipe = resolve(recipe, model)
    family = find_family(model.config)
    blocks = find_blocks(model, family)
    sites = find_sites(blocks, family, recipe.head_unit)
    check_weights(model)
    announce_heads(sites, recipe)
    windows = read_calibration(tokenizer, recipe, model)
    device = compute_device(recipe.device)
    clock = Clock(device)
    curves: Sequence[SiteCurves | None] = [None] * len(sites)
    if needs_visit(recipe):
        curves = visit_dense(model, family, blocks, sites, windows.tokens, recipe, clock, on_step)
    widths = plan_widths(model, family, sites, curves, recipe)
    gradients = [None if c is None else c.gradient for c in curves]
    stream = capture(model, blocks, windows.tokens, recipe, clock)
    pruned_blocks, results = prune_blocks(blocks, family, sites, stream, widths, gradients, recipe, clock, on_step)
    if recipe.layout == "padded":
        pad_blocks(blocks, pruned_blocks, family, [(result.site, result.kept) for result in results])
    pruned = assemble(model, family, pruned_blocks)
    return PrunedModel(pruned, tokenizer, recipe, results, windows, clock.seconds)


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    on_step: OnStep = lambda _line: None,
) -> list[tuple[Site, int]]:
    """The width of every site that `prune` would choose, without pruning."""
    recipe = resolve(recipe, model)
    family = find_family(model.config)
    blocks = find_blocks(model, family)
    sites = find_sites(blocks, family, recipe.head_unit)
    check_weights(model)
    announce_heads(sites, recipe)
    clock = Clock(compute_device(recipe.device))
    curves: Sequence[SiteCurves | None] = [None] * len(sites)
    if recipe.allocation in NEEDS_CURVES:
        windows = read_calibration(tokenizer, recipe, model)
        curves = visit_dense(model, family, blocks, sites, windows.tokens, recipe, clock, on_step)
    widths = plan_widths(model, family, sites, curves, recipe)
    return list(zip(sites, widths, strict=True))


def resolve(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The recipe with the window length and the rounding filled in from the model.

    Raises:
        SnpError: the window is longer than the model's positions; the model is not of a supported family.
    """
    positions = int(getattr(model.config, "max_position_embeddings", LONGEST_DEFAULT_WINDOW))
    seq_len = window_length(recipe.seq_len, positions)
    if recipe.round_to is not None:
        return replace(recipe, seq_len=seq_len)
    family = find_family(model.config)
    narrowest = min(s.units for s in find_sites(find_blocks(model, family), family) if s.kind == "ffn")
    coarse = recipe.layout == "uniform" and narrowest >= KERNEL_MULTIPLE * FEWEST_STEPS
    return replace(recipe, seq_len=seq_len, round_to=KERNEL_MULTIPLE if coarse else 8)


def window_length(asked: int | None, positions: int) -> int:
    """Tokens a window: what was asked for, or the model's maximum, at most 2048."""
    if asked is not None and asked > positions:
        raise SnpError(f"--seq-len: expected at most the model's {positions:,} positions, got {asked:,}.")
    return asked or min(positions, LONGEST_DEFAULT_WINDOW)


def announce_heads(sites: Sequence[Site], recipe: Recipe) -> None:
    """Says what head units became of those asked for, where the model has no such choice."""
    first = next(site for site in sites if site.kind == "attention")
    assert first.heads is not None
    if recipe.head_unit == "kv_group" and first.groups:
        log.warning("%s: one key-value head; query heads are the units instead of KV groups", first.name)
    elif recipe.head_unit == "query" and not first.groups:
        log.warning("%s: every key-value head has one query head; both go together", first.name)


def check_weights(model: PreTrainedModel) -> None:
    """Raises SnpError with the tensor's name if a weight is NaN or Inf."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise SnpError(f"{name}: weights hold NaN or Inf; expected finite numbers. The checkpoint is damaged.")


def read_calibration(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, model: PreTrainedModel) -> Windows:
    """The calibration windows of a resolved recipe, checked against the model's vocabulary."""
    assert recipe.seq_len is not None
    windows = calibration_windows(
        tokenizer,
        recipe.calibration or "wikitext2",
        split=recipe.calibration_split,
        column=recipe.text_column,
        num_samples=recipe.num_samples,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
    )
    rows = embedding_rows(model)
    if (largest := int(windows.tokens.max())) >= rows:
        raise SnpError(f"tokenizer: gives token id {largest:,}, the model has {rows:,}. They do not belong together.")
    return windows
