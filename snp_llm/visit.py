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
    run_block,
    watch_inputs,
)
from snp_llm.models.families import Family, Site, linear, weight_of
from snp_llm.recipe import Recipe
from snp_llm.site import Statistics, factor_site
from snp_llm.stream import capture, moments_for

TOKENS_A_CHANNEL = 16  # of the widest site, from which curves and gradients are read

OnStep = Callable[[str], None]


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
    while its inputs are summed. Curves are a few shares, which need fewer tokens than the matrix that repairs a site:
    the first windows of the draw are enough.

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
    stream = capture(model, blocks, tokens[:enough], recipe, clock)
    hidden, calls, device = list(stream.hidden), stream.calls, clock.device
    inputs: list[list[Tensor]] = []  # what enters each block, kept only where a way back follows
    found: list[SiteCurves] = []
    with frozen(model):
        for index, block in enumerate(blocks):
            here = [s for s in sites if s.block == index]
            inputs.append(list(hidden))
            moments = [moments_for(linear(block, s.out_projection), device) for s in here]
            watchers = {} if recipe.needs_gradients else _watchers(block, here, moments)
            with on_device(block, device):
                with clock.phase("calibration"), watch_inputs(watchers):
                    for b, batch in enumerate(hidden):
                        hidden[b] = run_block(block, batch, calls[b][index]).to(batch.device)
                        if not torch.isfinite(hidden[b]).all():
                            raise SnpError(f"block {index}: activations hold NaN or Inf. Try --dtype float32.")
                if not recipe.needs_gradients:
                    inputs[-1] = []
                    with clock.phase("linear algebra"):
                        found += [
                            _curves(block, family, s, Statistics(m), recipe) for s, m in zip(here, moments, strict=True)
                        ]
                    on_step(f"block {index}: curves of the dense model")
        if not recipe.needs_gradients:
            return found
        with clock.phase("calibration"), rest_on_device(model, blocks, device):
            gradients = [
                loss_gradient(model, blocks, batch.to(device), states.to(device)).to(states.device)
                for batch, states in zip(tokens[:enough].split(recipe.batch_size), hidden, strict=True)
            ]
        for index, block in reversed([*enumerate(blocks)]):
            here = [s for s in sites if s.block == index]
            outs = [linear(block, s.out_projection) for s in here]
            moments = [moments_for(out, device) for out in outs]
            at_output = [empty_moments(weight_of(out).shape[0], out.weight.dtype, device) for out in outs]
            with on_device(block, device):
                with clock.phase("calibration"), watch_inputs(_watchers(block, here, moments)):
                    for b, batch in enumerate(inputs[index]):
                        watchers = {out: partial(_accumulate, at_output, at) for at, out in enumerate(outs)}
                        back = input_gradient(block, batch, calls[b][index], gradients[b].to(device), watchers)
                        gradients[b] = back.to(batch.device)
                inputs[index] = []
                with clock.phase("linear algebra"):
                    found += [
                        _curves(block, family, s, Statistics(m, gradient=_per_token(g, s)), recipe)
                        for s, m, g in reversed([*zip(here, moments, at_output, strict=True)])
                    ]
            on_step(f"block {index}: curves and gradients of the dense model")
    return found[::-1]


def _curves(block: nn.Module, family: Family, site: Site, statistics: Statistics, recipe: Recipe) -> SiteCurves:
    gradient = None if statistics.gradient is None else statistics.gradient.float().cpu()
    if recipe.allocation not in NEEDS_CURVES:
        return SiteCurves(None, None, gradient)
    factored = factor_site(block, family, site, statistics, recipe)
    loss = factored.loss_curve()
    return SiteCurves(
        energy=energy_curve(factored.subspace.D, site.unit_size).cpu(),
        loss=None if loss is None else loss[:: site.unit_size].cpu(),
        gradient=gradient,
    )


def _per_token(moments: Moments, site: Site) -> Tensor:
    if not torch.isfinite(moments.first).all():
        raise SnpError(f"{site.name}: the loss gradient holds NaN or Inf; expected finite. Try --dtype float32.")
    return gram_matrix(moments, centred=False) / moments.tokens


def _watchers(
    block: nn.Module, sites: Sequence[Site], moments: list[Moments]
) -> dict[nn.Module, Callable[[Tensor], None]]:
    return {linear(block, s.out_projection): partial(_accumulate, moments, at) for at, s in enumerate(sites)}


def _accumulate(moments: list[Moments], at: int, values: Tensor) -> None:
    moments[at] = add_moments(moments[at], values.detach())
