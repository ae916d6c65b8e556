"""The sequential loop: statistics, ordering, widths, reconstruction, surgery, block after block. Writes no files."""

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.data import Windows, calibration_windows
from snp_llm.device import Clock, compute_device
from snp_llm.errors import SnpError
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.linalg.gram import add_moments
from snp_llm.linalg.units import unit_channels
from snp_llm.models.blocks import fixed_output, input_of, move, on_device, run_block, with_first_tensor
from snp_llm.models.families import Family, Site, embedding_rows, find_blocks, find_family, find_sites, linear
from snp_llm.models.layouts import FEWEST_STEPS, KERNEL_MULTIPLE, assemble, pad_blocks
from snp_llm.recipe import Recipe
from snp_llm.site import SiteResult, cut
from snp_llm.stream import Stream, attention_statistics, capture, moments_for
from snp_llm.widths import OnStep, plan_widths

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
    widths = plan_widths(model, family, sites, windows, recipe, clock, on_step)
    stream = capture(model, blocks, windows.tokens, recipe, clock)
    pruned_blocks, results = prune_blocks(blocks, family, sites, stream, widths, recipe, clock, on_step)
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
    windows = read_calibration(tokenizer, recipe, model) if recipe.allocation in NEEDS_CURVES else None
    widths = plan_widths(model, family, sites, windows, recipe, clock, on_step)
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


def prune_blocks(
    blocks: nn.ModuleList,
    family: Family,
    sites: Sequence[Site],
    stream: Stream,
    widths: Sequence[int],
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> tuple[nn.ModuleList, list[SiteResult]]:
    """Pruned copies of all blocks; each is calibrated on what the pruned blocks before it put out.

    A block costs one forward pass and a third: attention's inputs to the out-projection are computed once and kept, so
    that after its cut only the out-projection runs again, and the FFN sees exactly what the pruned block will give it.
    """
    hidden = list(stream.hidden)
    pruned_blocks, results = [], []
    for index, dense_block in enumerate(blocks):
        calls = [batch[index] for batch in stream.calls]
        attention_site, ffn_site = (s for s in sites if s.block == index)
        attention_width, ffn_width = widths[2 * index : 2 * index + 2]
        block = copy.deepcopy(dense_block)
        with on_device(block, clock.device):
            attention = block.get_submodule(family.attention)
            start = time.perf_counter()
            with clock.phase("calibration"):
                moments, contexts, attended = attention_statistics(block, family, hidden, calls)
            result = cut(block, family, attention_site, moments, attention_width, recipe, clock, start)
            results.append(result)
            on_step(str(result))

            start = time.perf_counter()
            channels = unit_channels(result.kept, attention_site.unit_size).to(clock.device)
            attention_out, ffn_out = linear(block, family.attention_out), linear(block, family.ffn_out)
            moments = moments_for(ffn_out, clock.device)
            with clock.phase("calibration"), torch.no_grad():
                for b, batch in enumerate(hidden):
                    kept_context = contexts[b].to(clock.device)[..., channels]
                    attended[b] = with_first_tensor(attended[b], attention_out(kept_context).to(batch.device))
                    contexts[b] = batch.new_empty(0)  # not needed again
                    with fixed_output(attention, move(attended[b], clock.device)):
                        inputs = input_of(ffn_out, block, batch, calls[b])
                    moments = add_moments(moments, inputs)
            result = cut(block, family, ffn_site, moments, ffn_width, recipe, clock, start)
            results.append(result)
            on_step(str(result))

            with clock.phase("calibration"):
                for b, batch in enumerate(hidden):
                    with fixed_output(attention, move(attended[b], clock.device)):
                        hidden[b] = run_block(block, batch, calls[b]).to(batch.device)
                    if not torch.isfinite(hidden[b]).all():
                        raise SnpError(f"block {index}: activations hold NaN or Inf. Try --dtype float32.")
        pruned_blocks.append(block)
    return nn.ModuleList(pruned_blocks), results
