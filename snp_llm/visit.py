"""One visit to the dense model before the first cut: what every site's widths would cost, and the loss's gradients.

Knows blocks and sites, cuts nothing and chooses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.device import Clock
from snp_llm.errors import SnpError
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.linalg.gram import Moments, add_moments, empty_moments, gram_matrix
from snp_llm.linalg.ldl import energy_curve
from snp_llm.models.blocks import (
    frozen,
    input_gradient,
    loss_gradient,
    on_device,
    rest_on_device,
    watch_inputs,
)
from snp_llm.models.families import Family, Site, linear, weight_of
from snp_llm.recipe import Recipe
from snp_llm.site import factor_site
from snp_llm.stream import Stream, advance, capture, moments_for
from snp_llm.sums import Statistics, add_batch, empty_sums, held_out

TOKENS_A_CHANNEL = 16  # of the widest site, from which curves and gradients are read
GRADIENT_TOKENS = 32_768  # at most, with gradients: what enters every block is kept for the way back
HELD_OUT_OF = 4  # one window of so many is held out

OnStep = Callable[[str], None]
Watchers = dict[nn.Module, Callable[[Tensor], None]]


@dataclass(frozen=True)
class SiteCurves:
    """What the dense model says of a site.

    Attributes:
        energy: share of the latent energy at every width, (units + 1,); None where no curve was asked for.
        loss: predicted rise of the mean loss at every width, (units + 1,); None without gradients.
        gradient: F, second moment of the loss gradient at the site's output, a token, (d_out, d_out); None without.
    """

    energy: Tensor | None
    loss: Tensor | None
    gradient: Tensor | None


def needs_visit(recipe: Recipe) -> bool:
    """Whether anything has to be known of the whole dense model before the first cut."""
    return recipe.needs_gradients or recipe.allocation in NEEDS_CURVES


def visit_dense(
    model: PreTrainedModel,
    family: Family,
    blocks: nn.ModuleList,
    sites: Sequence[Site],
    tokens: Tensor,
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> list[SiteCurves]:
    """Curves and gradients of every site, in the order of `find_sites`.

    The model is visited block by block and one block's moments are held at a time. With gradients there are two ways:
    forwards, keeping what enters each block, and backwards, where each block runs once more to pass the gradient on
    while its inputs are summed. Losses are predicted on windows that are held out: on those that a repair was computed
    from its error looks smaller than it is, the more so the more channels a site has for its tokens.
    Curves need fewer tokens than the matrix that repairs a site: the first windows of the draw are enough.

    Args:
        model: dense model; left as it was.
        family: its family.
        blocks: its decoder blocks.
        sites: all of theirs.
        tokens: calibration windows, (windows, T), int64.
        recipe: all settings, resolved.
        clock: of the compute device.
        on_step: called with a line a block.
    """
    widest = max(s.units * s.unit_size for s in sites)
    enough = -(-TOKENS_A_CHANNEL * widest // tokens.shape[1])
    if recipe.needs_gradients:
        enough = min(enough, max(HELD_OUT_OF, GRADIENT_TOKENS // tokens.shape[1]))
    tokens = tokens[:enough]
    stream = capture(model, blocks, tokens, recipe, clock)
    if recipe.needs_gradients:
        with frozen(model):
            return _there_and_back(model, family, blocks, sites, tokens, stream, recipe, clock, on_step)
    return _there(family, blocks, sites, stream, recipe, clock, on_step)


def _there(
    family: Family,
    blocks: nn.ModuleList,
    sites: Sequence[Site],
    stream: Stream,
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> list[SiteCurves]:
    """Curves without gradients, in one pass."""
    hidden = list(stream.hidden)
    found: list[SiteCurves] = []
    for index, block in enumerate(blocks):
        here = [s for s in sites if s.block == index]
        outs = [linear(block, s.out_projection) for s in here]
        moments = [moments_for(out, clock.device) for out in outs]
        watchers: Watchers = {out: partial(_accumulate, moments, at) for at, out in enumerate(outs)}
        with on_device(block, clock.device):
            with clock.phase("calibration"), watch_inputs(watchers):
                for b in range(len(hidden)):
                    hidden[b] = advance(block, index, hidden[b], stream.calls[b][index])
            with clock.phase("linear algebra"):
                for site, moment in zip(here, moments, strict=True):
                    found.append(_curves(block, family, site, Statistics(moment), recipe))
        on_step(f"block {index}: curves of the dense model")
    return found


def _there_and_back(
    model: PreTrainedModel,
    family: Family,
    blocks: nn.ModuleList,
    sites: Sequence[Site],
    tokens: Tensor,
    stream: Stream,
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> list[SiteCurves]:
    """Curves and gradients, in a pass forwards that keeps what enters each block, and one back."""
    hidden, calls, device = list(stream.hidden), stream.calls, clock.device
    inputs: list[list[Tensor]] = []
    for index, block in enumerate(blocks):
        inputs.append(list(hidden))
        with on_device(block, device), clock.phase("calibration"):
            for b in range(len(hidden)):
                hidden[b] = advance(block, index, hidden[b], calls[b][index])
    with clock.phase("calibration"), rest_on_device(model, blocks, device):
        gradients = [
            loss_gradient(model, blocks, batch.to(device), states.to(device)).to(states.device)
            for batch, states in zip(tokens.split(recipe.batch_size), hidden, strict=True)
        ]
    found: list[SiteCurves] = []
    for index, block in reversed([*enumerate(blocks)]):
        here = [s for s in sites if s.block == index]
        outs = [linear(block, s.out_projection) for s in here]
        sums = [empty_sums(out, device, drifting=False, holding_out=True) for out in outs]
        at_output = [empty_moments(weight_of(out).shape[0], out.weight.dtype, device) for out in outs]
        watchers: Watchers = {out: partial(_accumulate, at_output, at) for at, out in enumerate(outs)}
        seen: dict[nn.Module, Tensor] = {}
        with on_device(block, device):
            with clock.phase("calibration"), watch_inputs({out: partial(_keep, seen, out) for out in outs}):
                for b, batch in enumerate(inputs[index]):
                    back = input_gradient(block, batch, calls[b][index], gradients[b].to(device), watchers)
                    gradients[b] = back.to(batch.device)
                    held = held_out(inputs[index], b, one_of=HELD_OUT_OF)
                    sums = [add_batch(s, seen[out], None, held) for s, out in zip(sums, outs, strict=True)]
            inputs[index] = []
            with clock.phase("linear algebra"):
                for site, site_sums, gradient in reversed([*zip(here, sums, at_output, strict=True)]):
                    apart = Statistics(
                        site_sums.moments, held_moments=site_sums.held_moments, gradient=_per_token(gradient, site)
                    )
                    found.append(_curves(block, family, site, apart, recipe))
        on_step(f"block {index}: curves and gradients of the dense model")
    return found[::-1]


def _curves(block: nn.Module, family: Family, site: Site, statistics: Statistics, recipe: Recipe) -> SiteCurves:
    gradient = None if statistics.gradient is None else statistics.gradient.float().cpu()
    if recipe.allocation not in NEEDS_CURVES:
        return SiteCurves(None, None, gradient)
    factored = factor_site(block, family, site, statistics, recipe)
    loss = factored.loss_curve(statistics.held_moments)
    return SiteCurves(
        energy=energy_curve(factored.subspace.D, site.unit_size).cpu(),
        loss=None if loss is None else loss[:: site.unit_size].cpu(),
        gradient=gradient,
    )


def _per_token(moments: Moments, site: Site) -> Tensor:
    if not torch.isfinite(moments.first).all():
        raise SnpError(f"{site.name}: the loss gradient holds NaN or Inf; expected finite. Try --dtype float32.")
    return gram_matrix(moments, centred=False) / moments.tokens


def _accumulate(moments: list[Moments], at: int, values: Tensor) -> None:
    moments[at] = add_moments(moments[at], values.detach())


def _keep(seen: dict[nn.Module, Tensor], module: nn.Module, values: Tensor) -> None:
    seen[module] = values.detach()
