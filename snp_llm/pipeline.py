"""The sequential loop: statistics, ordering, widths, reconstruction, surgery, block after block. Writes no files."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.data import Windows, calibration_windows
from snp_llm.device import Clock, compute_device
from snp_llm.errors import SnpError
from snp_llm.linalg.allocation import ALLOCATIONS, NEEDS_CURVES, SiteBudget
from snp_llm.linalg.gram import Moments, add_moments
from snp_llm.linalg.ldl import energy_curve
from snp_llm.linalg.units import unit_channels
from snp_llm.models.blocks import fixed_output, input_of, move, on_device, run_block, watch_inputs, with_first_tensor
from snp_llm.models.families import Family, Site, embedding_rows, find_blocks, find_family, find_sites, linear
from snp_llm.models.layouts import assemble
from snp_llm.recipe import Recipe
from snp_llm.site import SiteResult, cut, factor_site
from snp_llm.stream import Stream, attention_statistics, capture, moments_for

LONGEST_DEFAULT_WINDOW = 2048
TOKENS_A_CHANNEL = 16  # from which energy curves are read


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


OnStep = Callable[[str], None]


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
    check_weights(model)
    windows = read_calibration(tokenizer, recipe, model)
    device = compute_device(recipe.device)
    clock = Clock(device)
    preview = capture_preview(model, blocks, windows, recipe, clock)
    widths = plan_widths(blocks, family, preview, recipe, clock, on_step)
    stream = capture(model, blocks, windows.tokens, recipe, clock)
    pruned_blocks, results = prune_blocks(blocks, family, stream, widths, recipe, clock, on_step)
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
    check_weights(model)
    clock = Clock(compute_device(recipe.device))
    windows = read_calibration(tokenizer, recipe, model) if recipe.allocation in NEEDS_CURVES else None
    preview = capture_preview(model, blocks, windows, recipe, clock)
    widths = plan_widths(blocks, family, preview, recipe, clock, on_step)
    return list(zip(find_sites(blocks, family), widths, strict=True))


def resolve(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The recipe with the window length filled in from the model.

    Raises:
        SnpError: the window is longer than the model's positions.
    """
    positions = int(getattr(model.config, "max_position_embeddings", LONGEST_DEFAULT_WINDOW))
    return replace(recipe, seq_len=window_length(recipe.seq_len, positions))


def window_length(asked: int | None, positions: int) -> int:
    """Tokens a window: what was asked for, or the model's maximum, at most 2048."""
    if asked is not None and asked > positions:
        raise SnpError(f"--seq-len: expected at most the model's {positions:,} positions, got {asked:,}.")
    return asked or min(positions, LONGEST_DEFAULT_WINDOW)


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


def capture_preview(
    model: PreTrainedModel, blocks: nn.ModuleList, windows: Windows | None, recipe: Recipe, clock: Clock
) -> Stream | None:
    """The calibration windows from which an allocation reads its curves, or None if it reads none.

    A curve is a few shares of energy, which need fewer tokens than the matrix that repairs a site: the first windows of
    the draw, `TOKENS_A_CHANNEL` tokens for every channel of the widest site.
    """
    if recipe.allocation not in NEEDS_CURVES:
        return None
    assert windows is not None
    widest = max(s.units * s.unit_size for s in find_sites(blocks, find_family(model.config)))
    enough = -(-TOKENS_A_CHANNEL * widest // windows.tokens.shape[1])
    return capture(model, blocks, windows.tokens[:enough], recipe, clock)


def plan_widths(
    blocks: nn.ModuleList, family: Family, preview: Stream | None, recipe: Recipe, clock: Clock, on_step: OnStep
) -> list[int]:
    """Units kept at every site, in the order of `find_sites`.

    An allocation that compares sites needs the curves of all of them before the first cut: the dense model is then
    visited once, block by block, and only the curves are kept, never all Gram matrices.
    """
    sites = find_sites(blocks, family)
    curves: list[Tensor | None] = [None] * len(sites)
    if recipe.allocation in NEEDS_CURVES and any(recipe.sparsity_of(s.kind) for s in sites):
        assert preview is not None
        curves = [*dense_curves(blocks, sites, preview, recipe, clock, on_step)]
    budgets = [
        SiteBudget(
            kind=site.kind,
            units=site.units,
            cost=site.cost,
            multiple=recipe.round_to if site.kind == "ffn" else 1,
            minimum=recipe.round_to if site.kind == "ffn" else 1,
            energy=curve,
        )
        for site, curve in zip(sites, curves, strict=True)
    ]
    widths = [site.units for site in sites]
    for kinds, sparsity in recipe.budgets:
        members = [i for i, s in enumerate(sites) if s.kind in kinds]
        if sparsity > 0:
            chosen = ALLOCATIONS[recipe.allocation]([budgets[i] for i in members], 1 - sparsity)
            for i, width in zip(members, chosen, strict=True):
                widths[i] = width
    return widths


def dense_curves(
    blocks: nn.ModuleList, sites: Sequence[Site], stream: Stream, recipe: Recipe, clock: Clock, on_step: OnStep
) -> list[Tensor]:
    """Energy curve of every site on the dense model's own activations."""
    hidden = list(stream.hidden)
    curves = []
    for index, block in enumerate(blocks):
        here = [s for s in sites if s.block == index]
        with on_device(block, clock.device):
            outs = [linear(block, s.out_projection) for s in here]
            moments = [moments_for(out, clock.device) for out in outs]
            watchers: dict[nn.Module, Callable[[Tensor], None]] = {
                out: partial(_accumulate, moments, at) for at, out in enumerate(outs)
            }
            with clock.phase("calibration"), watch_inputs(watchers):
                for b, batch in enumerate(hidden):
                    hidden[b] = run_block(block, batch, stream.calls[b][index]).to(batch.device)
            with clock.phase("linear algebra"):
                for site, moment in zip(here, moments, strict=True):
                    factored = factor_site(block, site, moment, recipe)
                    curves.append(energy_curve(factored.subspace.D, site.unit_size).cpu())
        on_step(f"block {index}: energy curves of the dense model")
    return curves


def prune_blocks(
    blocks: nn.ModuleList,
    family: Family,
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
    sites = find_sites(blocks, family)
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


def _accumulate(moments: list[Moments], at: int, inputs: Tensor) -> None:
    moments[at] = add_moments(moments[at], inputs)
