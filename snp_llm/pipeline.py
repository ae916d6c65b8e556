"""The sequential loop: statistics, ordering, widths, reconstruction, surgery, block after block. Writes no files."""

import copy
import logging
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
from snp_llm.linalg.allocation import ALLOCATIONS, NEEDS_CURVES, SiteBudget, pooled_widths
from snp_llm.linalg.gram import Moments, add_moments
from snp_llm.linalg.ldl import energy_curve
from snp_llm.linalg.units import unit_channels
from snp_llm.models.blocks import fixed_output, input_of, move, on_device, run_block, watch_inputs, with_first_tensor
from snp_llm.models.families import Family, Site, embedding_rows, find_blocks, find_family, find_sites, linear
from snp_llm.models.layouts import FEWEST_STEPS, KERNEL_MULTIPLE, assemble, pad_blocks, plain_type, uniform_widths
from snp_llm.recipe import Recipe
from snp_llm.site import SiteResult, cut, factor_site
from snp_llm.stream import Stream, attention_statistics, capture, moments_for

LONGEST_DEFAULT_WINDOW = 2048
FARTHEST_FROM_TARGET = 0.01  # that an achieved sparsity may be without a word about it


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


log = logging.getLogger(__name__)
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
    sites = find_sites(blocks, family, recipe.head_unit)
    check_weights(model)
    announce_heads(sites, recipe)
    windows = read_calibration(tokenizer, recipe, model)
    device = compute_device(recipe.device)
    clock = Clock(device)
    stream = capture(model, blocks, windows.tokens, recipe, clock)
    widths = plan_widths(model, family, sites, stream, recipe, clock, on_step)
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
    stream = None
    clock = Clock(compute_device(recipe.device))
    if recipe.allocation in NEEDS_CURVES:
        stream = capture(model, blocks, read_calibration(tokenizer, recipe, model).tokens, recipe, clock)
    widths = plan_widths(model, family, sites, stream, recipe, clock, on_step)
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


def plan_widths(
    model: PreTrainedModel,
    family: Family,
    sites: Sequence[Site],
    stream: Stream | None,
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> list[int]:
    """Units kept at every site, in the order of `find_sites`.

    An allocation that compares sites needs the curves of all of them before the first cut: the dense model is then
    visited once, block by block, and only the curves are kept, never all Gram matrices.

    Raises:
        SnpError: the target cannot be met with the units that may go.
    """
    curves: list[Tensor | None] = [None] * len(sites)
    if recipe.allocation in NEEDS_CURVES and any(recipe.sparsity_of(s.kind) for s in sites):
        assert stream is not None
        curves = [*dense_curves(find_blocks(model, family), family, sites, stream, recipe, clock, on_step)]
    budgets = [site_budget(model, family, s, recipe, c) for s, c in zip(sites, curves, strict=True)]
    widths = [site.units for site in sites]
    for kinds, sparsity in recipe.budgets:
        concerned = [i for i, s in enumerate(sites) if s.kind in kinds]
        found = fit_budget([sites[i] for i in concerned], [budgets[i] for i in concerned], sparsity, recipe)
        for i, width in zip(concerned, found, strict=True):
            widths[i] = width
    if recipe.layout == "uniform":
        check_uniform(model, family, sites, widths)
    return widths


def fit_budget(sites: Sequence[Site], budgets: Sequence[SiteBudget], sparsity: float, recipe: Recipe) -> list[int]:
    """Widths of the sites that share one budget; says so where units are too coarse to meet it.

    Raises:
        SnpError: the target is more than all units that may go.
    """
    uniform = recipe.layout == "uniform"
    kinds = list(dict.fromkeys(site.kind for site in sites))
    widths = [min(s.units for s in sites if s.kind == site.kind) if uniform else site.units for site in sites]
    if sparsity == 0:
        return widths
    parameters = sum(site.parameters for site in sites)
    movable = {budget.kind for budget in budgets if len(budget.widths()) > 1}
    members = [i for i, site in enumerate(sites) if site.kind in movable]
    prunable = sum(sites[i].units * sites[i].cost for i in members)
    if sparsity * parameters >= prunable:
        remedy = f"Ask for a sparsity below {prunable / parameters:.3f} there."
        if prunable == 0:
            remedy = "Use --head-sparsity 0." if kinds == ["attention"] else "Use a smaller --round-to."
        raise SnpError(
            f"the target removes {sparsity * parameters:,.0f} parameters of {' and '.join(kinds)} sites; in this model "
            f"and layout at most {prunable:,} may go. {remedy}"
        )
    rule = ALLOCATIONS[recipe.allocation]
    chosen = [budgets[i] for i in members]
    keep = 1 - sparsity * parameters / prunable
    found = pooled_widths(rule, chosen, keep) if uniform else rule(chosen, keep)
    for i, width in zip(members, found, strict=True):
        widths[i] = width
    achieved = sum((s.units - w) * s.cost for s, w in zip(sites, widths, strict=True)) / parameters
    if abs(achieved - sparsity) > FARTHEST_FROM_TARGET:
        log.warning(
            "%s: sparsity %g asked for, whole units give %.3f",
            " and ".join(kinds),
            sparsity,
            achieved,
        )
    return widths


def check_uniform(model: PreTrainedModel, family: Family, sites: Sequence[Site], widths: Sequence[int]) -> None:
    """Raises SnpError if the widths are not one plain config's: in models whose blocks differed before."""
    heads = {s.heads_after(w) for s, w in zip(sites, widths, strict=True) if s.heads}
    ffn = {w for s, w in zip(sites, widths, strict=True) if s.kind == "ffn"}
    if len(heads) > 1 or len(ffn) > 1 or plain_type(model, family, min(heads)) is None:
        counts = ", ".join(sorted(f"{h.query} query and {h.key_value} key-value" for h in heads))
        raise SnpError(
            f"layout uniform: expected head counts that one plain {family.name} config can hold in every block, got "
            f"{counts} heads. The model was pruned before, block by block. Use --layout compact."
        )


def site_budget(model: PreTrainedModel, family: Family, site: Site, recipe: Recipe, curve: Tensor | None) -> SiteBudget:
    """What the allocation may know of a site, and the widths that the layout lets it have."""
    assert recipe.round_to is not None
    multiple = recipe.round_to if site.kind == "ffn" else site.groups or 1
    permitted: tuple[int, ...] | None = None
    if not site.prunable:
        permitted = ()
    elif recipe.layout == "uniform" and site.kind == "attention":
        permitted = uniform_widths(model, family, site)
    return SiteBudget(
        kind=site.kind,
        units=site.units,
        cost=site.cost,
        multiple=multiple,
        minimum=min(permitted, default=site.units) if permitted is not None else multiple,
        energy=curve,
        permitted=permitted,
    )


def dense_curves(
    blocks: nn.ModuleList,
    family: Family,
    sites: Sequence[Site],
    stream: Stream,
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
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
                    factored = factor_site(block, family, site, moment, recipe)
                    curves.append(energy_curve(factored.subspace.D, site.unit_size).cpu())
        on_step(f"block {index}: energy curves of the dense model")
    return curves


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


def _accumulate(moments: list[Moments], at: int, inputs: Tensor) -> None:
    moments[at] = add_moments(moments[at], inputs)
