"""One site: order, factor, cut and repair it. Knows one block at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snp_llm.linalg.gram import triangle_flops
from snp_llm.linalg.ldl import energy_curve, error_curve
from snp_llm.linalg.least_squares import Cut, absorb_mean, factored_repair_flops, output_energy
from snp_llm.linalg.units import unit_channels
from snp_llm.models.site import Site, site_bias, site_weight
from snp_llm.models.surgery import drop_experts, narrow_experts, prune_site
from snp_llm.pruning.algebra import with_algebra
from snp_llm.pruning.factor import DAMPENING, factor_flops, factor_site
from snp_llm.pruning.norms import restate
from snp_llm.pruning.repair import repair_is_open, repair_site, repair_site_flops
from snp_llm.pruning.result import Curve, SiteResult, sample_curve
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import Statistics, Sums
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import SnpError


@dataclass(frozen=True)
class Forecast:
    """What a site's factorisation says of a cut before it is repaired.

    Attributes:
        units: to be kept, ascending, (u,), int64, on the CPU.
        energy: share of the latent energy in them.
        predicted_error: relative squared output error after repair, read off the error curve.
        output: squared norm of the dense output.
        lost: squared output error without any repair.
        curve: of every width.
    """

    units: Tensor
    energy: float
    predicted_error: float
    output: float
    lost: float
    curve: Curve


def cut(block: nn.Module, site: Site, statistics: Statistics, width: int, run: Run) -> SiteResult:
    """Removes all but `width` units of a site from the block, in place.

    Args:
        block: on the compute device.
        site: of the block.
        statistics: of the site, as `for_algebra` gives them.
        width: units to keep.
        run: of this phase.

    Raises:
        SnpError: the statistics are not finite, or a Gram matrix is not positive definite; with the site's name.
    """
    if not torch.isfinite(statistics.moments.first).all():
        raise SnpError(f"{site.name}: its inputs hold NaN or Inf; expected finite activations. Try --dtype float32.")
    if width == site.units and statistics.referred is None:  # nothing to do: the weights stay as they are to the bit
        everything = torch.arange(site.units)
        if site.drifts and not site.taps:
            restate(block, site, everything, statistics.moments)
        return SiteResult(site, everything, 1.0, 0.0, 0.0, 0.0, 0.0, run.recipe.dampening or DAMPENING, 0.0)
    with run.clock.phase("factorisation"):  # a large site's factors are gone after it: their memory goes to its repair
        parted, forecast = factored_cut(block, site, statistics, width, run)
    with run.clock.phase("reconstruction"):
        try:
            repaired = repair_site(parted, statistics, run.recipe)
        except SnpError as error:
            raise SnpError(f"{site.name}: {error}") from error
        bias = site_bias(block, site)
        bias = None if bias is None else bias.to(parted.W.device).to(parted.W.dtype)
        if parted.mean is not None and bias is not None:
            bias = absorb_mean(bias, parted.W, repaired.W, parted.kept, parted.mean) + repaired.shift
    with run.clock.phase("surgery"):
        prune_site(block, site, forecast.units, repaired.W, bias)
        if site.norm and not site.taps:
            restate(block, site, forecast.units, statistics.moments)
    return SiteResult(
        site=site,
        kept=forecast.units,
        energy=forecast.energy,
        predicted_error=forecast.predicted_error,
        error=max(0.0, forecast.lost + repaired.change) / forecast.output if forecast.output > 0 else 0.0,
        predicted_loss=None,
        reference_weight=repaired.alpha,
        dampening=repaired.dampening,
        seconds=0.0,
        curve=forecast.curve,
    )


def factored_cut(block: nn.Module, site: Site, statistics: Statistics, width: int, run: Run) -> tuple[Cut, Forecast]:
    """Which channels of a site go when `width` units are kept, and what its factorisation says of that."""
    factored, gram = factor_site(block, site, statistics, run.recipe, run.clock, width)
    W, subspace, channels = factored.W, factored.subspace, width * site.unit_size
    parted = factored.cut(channels, repaired=not repair_is_open(statistics, run.recipe))
    output, gone = output_energy(W, gram), parted.gone
    dampened = output + subspace.dampening * float((gram.diagonal() * W.square().sum(0)).sum())
    errors = error_curve(W[:, subspace.order], subspace.L, subspace.D)
    return parted, Forecast(
        units=factored.unit_order[:width].sort().values.cpu(),
        energy=float(energy_curve(subspace.D, site.unit_size)[width]),
        predicted_error=float(errors[channels]) / dampened if dampened > 0 else 0.0,
        output=output,
        lost=output_energy(W[:, gone], gram[gone[:, None], gone]),
        curve=sample_curve(subspace.D, errors, factored.tokens, channels),
    )


def cut_flops(d: int, site: Site, width: int, recipe: Recipe) -> float:
    """FLOPs of `cut` for a site with d outputs of which `width` units are kept: a factor, a repair, and the errors."""
    n, k = site.channels, width * site.unit_size
    flops = factor_flops(d, n, recipe, 0 if site.groups else k) + repair_site_flops(d, n, k, recipe)
    flops += 2 * d * triangle_flops(n) + d * triangle_flops(n - k)
    return flops if recipe.holds_out else flops + factored_repair_flops(d, n, k)


def cut_site(
    block: nn.Module,
    site: Site,
    sums: Sums,
    width: int,
    gradient: Callable[[], Tensor | None],
    run: Run,
) -> SiteResult:
    """Cuts a site on the rank whose block it is; the others take over its result, so that all have the same bits.

    Sums are those of all ranks.
    """

    def here() -> tuple[SiteResult, dict[str, dict[str, Any]]]:
        with run.clock.phase("Gram matrices"):
            W, bias = site_weight(block, site), site_bias(block, site)
            statistics = sums.statistics(W, bias, gradient())
        result = with_algebra(site.name, statistics, lambda found: cut(block, site, found, width, run))
        return result, {path: block.get_submodule(path).state_dict() for path in (*site.consumers, site.norm) if path}

    owner = ranks.owner(site.block)
    result, repaired = ranks.from_rank(owner, here)
    if ranks.rank() != owner:
        cut_alike(block, result)
        for path, tensors in repaired.items():
            block.get_submodule(path).load_state_dict(tensors)
    return result


def cut_alike(block: nn.Module, result: SiteResult) -> None:
    """Gives a block the shapes that a cut gave another copy of it; what the repaired tensors hold is yet to come."""
    if result.site.mixture is not None and result.site.whole:
        drop_experts(block, result.site.mixture, result.kept)
        return
    if result.site.mixture is not None:
        narrow_experts(block, result.site, result.kept)
        return
    W = site_weight(block, result.site)
    weight = W[:, unit_channels(result.kept, result.site.unit_size).to(W.device)]
    prune_site(block, result.site, result.kept, weight, site_bias(block, result.site))
