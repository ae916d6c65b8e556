"""One site: order its units, factor its Gram matrix, cut it and repair it. Knows one block at a time."""

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snp_llm.device import Clock
from snp_llm.errors import SnpError
from snp_llm.linalg.gram import Moments, gram_matrix
from snp_llm.linalg.ldl import Subspace, build_subspace, energy_curve, error_curve, make_definite
from snp_llm.linalg.ordering import OrderingProblem, order_units
from snp_llm.linalg.reconstruction import absorb_mean, reconstruct, relative_error
from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.families import Family, Site, linear, row_units, weight_of
from snp_llm.models.surgery import prune_site
from snp_llm.recipe import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteResult:
    """What happened at one site.

    Attributes:
        site: as it was.
        kept: kept units, ascending, (u,), int64, on the CPU.
        energy: share of the latent energy in what was kept.
        predicted_error: relative squared output error read off the error curve (dampened Gram matrix).
        error: the same, computed from the weights that were written.
        dampening: relative dampening used; more than the recipe's where the factorisation failed at that.
        seconds: spent on this site.
    """

    site: Site
    kept: Tensor
    energy: float
    predicted_error: float
    error: float
    dampening: float
    seconds: float

    def __str__(self) -> str:
        units = f"{len(self.kept):,} of {self.site.units:,} {self.site.unit}"
        return f"{self.site.name}: kept {units}, error {self.error:.2e}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class FactoredSite:
    """A site's units in order, with everything that the cut needs.

    Attributes:
        unit_order: units, most important first, (units,), int64.
        subspace: LDL factors in that order.
        W, gram, mean: out-projection weight, Gram matrix (centred where the bias absorbs the mean), mean of the inputs,
            float64, in the original channel order.
        centred: whether the bias absorbs the mean.
    """

    unit_order: Tensor
    subspace: Subspace
    W: Tensor
    gram: Tensor
    mean: Tensor
    centred: bool


def factor_site(block: nn.Module, family: Family, site: Site, moments: Moments, recipe: Recipe) -> FactoredSite:
    """Orders a site's units and factors its Gram matrix in that order, on the moments' device."""
    try:
        out = linear(block, site.out_projection)
        device = (
            torch.device("cpu") if moments.second.device.type == "mps" else moments.second.device
        )  # no float64 there
        moments = Moments(moments.second.to(device), moments.first.to(device), moments.tokens)
        centred = recipe.absorb_bias and out.bias is not None
        gram = gram_matrix(moments, centred=centred)
        definite = make_definite(gram, recipe.dampening)
        if definite.dampening != recipe.dampening:
            log.warning("%s: dampening raised from %g to %g", site.name, recipe.dampening, definite.dampening)
        W = weight_of(out).to(device).double()
        in_weight = W.new_zeros(site.units)
        for path, units in zip(site.in_projections, row_units(block, family, site), strict=True):
            sums = weight_of(linear(block, path)).to(device).double().abs().sum(1)
            units = units.to(device)
            in_weight.index_add_(0, units[units >= 0], sums[units >= 0])
        problem = OrderingProblem(definite, W, in_weight, site.unit_size, recipe.seed + site.block)
        unit_order = order_units(recipe.ordering, problem)
        if site.groups:
            unit_order = deal_from_groups(unit_order, site.groups)
        subspace = build_subspace(definite, unit_channels(unit_order, site.unit_size))
        return FactoredSite(unit_order, subspace, W, gram, moments.first.double() / moments.tokens, centred)
    except SnpError as error:
        raise SnpError(f"{site.name}: {error}") from error


def cut(
    block: nn.Module,
    family: Family,
    site: Site,
    moments: Moments,
    width: int,
    recipe: Recipe,
    clock: Clock,
    start: float,
) -> SiteResult:
    """Removes all but `width` units of a site from the block, in place."""
    if not torch.isfinite(moments.first).all():
        raise SnpError(f"{site.name}: its inputs hold NaN or Inf; expected finite activations. Try --dtype float32.")
    if width == site.units:  # nothing to remove: the weights stay as they are to the bit
        everything = torch.arange(site.units)
        return SiteResult(site, everything, 1.0, 0.0, 0.0, recipe.dampening, time.perf_counter() - start)
    with clock.phase("linear algebra"):
        factored = factor_site(block, family, site, moments, recipe)
        subspace, W, size = factored.subspace, factored.W, site.unit_size
        channels = width * size
        ordered = subspace.order[:channels]
        kept, ascending = ordered.sort()
        W_new = reconstruct(W[:, subspace.order], subspace.L, channels)[:, ascending]
        dense_bias = linear(block, site.out_projection).bias
        bias = None if dense_bias is None else dense_bias.detach().to(W.device).double()
        if factored.centred and bias is not None:
            bias = absorb_mean(bias, W, W_new, kept, factored.mean)
        curve = error_curve(W[:, subspace.order], subspace.L, subspace.D)
        result = SiteResult(
            site=site,
            kept=factored.unit_order[:width].sort().values.cpu(),
            energy=float(energy_curve(subspace.D, size)[width]),
            predicted_error=float(curve[channels] / curve[0]) if curve[0] > 0 else 0.0,
            error=relative_error(W, W_new, kept, factored.gram),
            dampening=subspace.dampening,
            seconds=0.0,
        )
    with clock.phase("surgery"):
        prune_site(block, family, site, result.kept, W_new, bias)
    return replace(result, seconds=time.perf_counter() - start)
