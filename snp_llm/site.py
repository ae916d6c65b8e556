"""One site: order its units, factor its Gram matrix, cut it and repair it. Knows one block at a time."""

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snp_llm.device import Clock
from snp_llm.errors import SnpError
from snp_llm.linalg.gram import Drift, Moments, gram_matrix
from snp_llm.linalg.ldl import (
    Subspace,
    build_subspace,
    energy_curve,
    error_curve,
    make_definite,
    metric_root,
    predicted_loss,
)
from snp_llm.linalg.ordering import OrderingProblem, order_units
from snp_llm.linalg.reconstruction import absorb_mean, reconstruct, relative_error, repair, repair_weight
from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.families import Family, Site, linear, row_units, weight_of
from snp_llm.models.surgery import prune_site
from snp_llm.recipe import Recipe

METRIC_FLOOR = 1.0  # of the mean eigenvalue of F, added to all: what few gradients were seen of still counts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """What calibration says of a site.

    Attributes:
        moments: of its inputs, all tokens.
        drift: what its output lacks of its target, all tokens; None where the target is its own dense output.
        held_moments, held_drift: the same over the windows that were held out; None without.
        gradient: F, second moment of the loss gradient at its output, a token, (d_out, d_out); None where not needed.
    """

    moments: Moments
    drift: Drift | None = None
    held_moments: Moments | None = None
    held_drift: Drift | None = None
    gradient: Tensor | None = None


@dataclass(frozen=True)
class SiteResult:
    """What happened at one site.

    Attributes:
        site: as it was.
        kept: kept units, ascending, (u,), int64, on the CPU.
        energy: share of the latent energy in what was kept.
        predicted_error: relative squared output error read off the error curve (dampened Gram matrix).
        error: the same, computed from the weights that were written.
        predicted_loss: rise of the mean loss that the quadratic model predicts; None without gradients.
        target_weight: alpha, the share of the drift's repair that the out-projection took up.
        dampening: relative dampening used; more than the recipe's where the factorisation failed at that.
        seconds: spent on this site.
    """

    site: Site
    kept: Tensor
    energy: float
    predicted_error: float
    error: float
    predicted_loss: float | None
    target_weight: float
    dampening: float
    seconds: float

    def then(self, later: "SiteResult") -> "SiteResult":
        """The result of both, one cut after the other: errors are those of the later."""
        losses = (self.predicted_loss, later.predicted_loss)
        return replace(
            later,
            site=self.site,
            kept=self.kept[later.kept],
            energy=self.energy * later.energy,
            predicted_loss=None if None in losses else sum(x for x in losses if x is not None),
            seconds=self.seconds + later.seconds,
        )

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
        metric: F with a floor, (d_out, d_out), float64; None without gradients.
        tokens: over which the Gram matrix was summed.
        centred: whether the bias absorbs the mean.
    """

    unit_order: Tensor
    subspace: Subspace
    W: Tensor
    gram: Tensor
    mean: Tensor
    metric: Tensor | None
    tokens: int
    centred: bool

    def loss_curve(self) -> Tensor | None:
        """Predicted rise of the mean loss at every number of channels kept, or None without gradients."""
        if self.metric is None:
            return None
        W, subspace = self.W[:, self.subspace.order], self.subspace
        return predicted_loss(W, subspace.L, subspace.D, self.metric, self.tokens)


def factor_site(block: nn.Module, family: Family, site: Site, statistics: Statistics, recipe: Recipe) -> FactoredSite:
    """Orders a site's units and factors its Gram matrix in that order, on the moments' device."""
    try:
        out, moments = linear(block, site.out_projection), statistics.moments
        device = torch.device("cpu") if moments.second.device.type == "mps" else moments.second.device  # no float64
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
        metric = None
        if statistics.gradient is not None:
            metric = statistics.gradient.to(device).double()
            metric.diagonal().add_(METRIC_FLOOR * metric.diagonal().mean())
        weighted = metric_root(metric).T @ W if metric is not None and recipe.metric == "loss" else W
        problem = OrderingProblem(definite, weighted, in_weight, site.unit_size, recipe.seed + site.block)
        unit_order = order_units(recipe.ordering, problem)
        if site.groups:
            unit_order = deal_from_groups(unit_order, site.groups)
        subspace = build_subspace(definite, unit_channels(unit_order, site.unit_size))
        mean = moments.first.double() / moments.tokens
        return FactoredSite(unit_order, subspace, W, gram, mean, metric, moments.tokens, centred)
    except SnpError as error:
        raise SnpError(f"{site.name}: {error}") from error


def cut(
    block: nn.Module,
    family: Family,
    site: Site,
    statistics: Statistics,
    width: int,
    recipe: Recipe,
    clock: Clock,
    start: float,
) -> SiteResult:
    """Removes all but `width` units of a site from the block, in place."""
    if not torch.isfinite(statistics.moments.first).all():
        raise SnpError(f"{site.name}: its inputs hold NaN or Inf; expected finite activations. Try --dtype float32.")
    if width == site.units and statistics.drift is None:  # nothing to do: the weights stay as they are to the bit
        everything = torch.arange(site.units)
        return SiteResult(site, everything, 1.0, 0.0, 0.0, 0.0, 0.0, recipe.dampening, time.perf_counter() - start)
    with clock.phase("linear algebra"):
        factored = factor_site(block, family, site, statistics, recipe)
        subspace, W, size = factored.subspace, factored.W, site.unit_size
        channels = width * size
        ordered = subspace.order[:channels]
        kept, ascending = ordered.sort()
        W_new = reconstruct(W[:, subspace.order], subspace.L, channels)[:, ascending]
        dense_bias = linear(block, site.out_projection).bias
        bias = None if dense_bias is None else dense_bias.detach().to(W.device).double()
        curve = error_curve(W[:, subspace.order], subspace.L, subspace.D)
        loss = factored.loss_curve()
        error = relative_error(W, W_new, kept, factored.gram)
        alpha = 0.0
        if statistics.drift is not None:
            added, shift, alpha = repair_drift(factored, statistics, W_new, kept, ascending, recipe)
            W_new = W_new + alpha * added
            if factored.centred and bias is not None:
                bias = bias + alpha * shift
        if factored.centred and bias is not None:
            bias = absorb_mean(bias, W, W_new, kept, factored.mean)
        result = SiteResult(
            site=site,
            kept=factored.unit_order[:width].sort().values.cpu(),
            energy=float(energy_curve(subspace.D, size)[width]),
            predicted_error=float(curve[channels] / curve[0]) if curve[0] > 0 else 0.0,
            error=error,
            predicted_loss=None if loss is None else float(loss[channels]),
            target_weight=alpha,
            dampening=subspace.dampening,
            seconds=0.0,
        )
    with clock.phase("surgery"):
        prune_site(block, family, site, result.kept, W_new, bias)
    return replace(result, seconds=time.perf_counter() - start)


def repair_drift(
    factored: FactoredSite, statistics: Statistics, W_new: Tensor, kept: Tensor, ascending: Tensor, recipe: Recipe
) -> tuple[Tensor, Tensor, float]:
    """What to add to a cut out-projection so that its output comes closer to the target, and how much of it.

    The share alpha is the one that serves the held-out windows best when cut and repair are computed on the others.

    Returns:
        The repair R of the weight on the kept channels, ascending, (d_out, k), that of the bias, (d_out,), and alpha.
    """
    drift, held, held_drift = statistics.drift, statistics.held_moments, statistics.held_drift
    assert drift is not None
    W, order, centred = factored.W, factored.subspace.order[: len(kept)], factored.centred
    cross, shift = centred_drift(drift, statistics.moments, factored.mean, centred)
    L, D = factored.subspace.L[: len(kept), : len(kept)], factored.subspace.D[: len(kept)]
    added = repair(cross[:, order], L, D.masked_fill(D <= 0, torch.inf))[:, ascending]
    if recipe.target_weight is not None or held is None or held_drift is None:
        return added, shift, recipe.target_weight or 0.0

    total = statistics.moments
    fit = Moments(total.second - held.second, total.first - held.first, total.tokens - held.tokens)
    fit_drift = Drift(drift.cross - held_drift.cross, drift.first - held_drift.first)
    fit_mean = fit.first.to(W.device).double() / fit.tokens
    fit_gram = gram_matrix(fit, centred=centred).to(W.device)
    fit_cross, fit_shift = centred_drift(fit_drift, fit, fit_mean, centred)
    definite = make_definite(fit_gram[kept][:, kept], factored.subspace.dampening)
    wanted = (W @ fit_gram)[:, kept] + definite.dampening * W[:, kept] * fit_gram.diagonal()[kept]
    solved = torch.cholesky_solve(torch.cat([wanted, fit_cross[:, kept]]).T, definite.cholesky).T
    lack, repaired = W.clone(), torch.zeros_like(W)
    lack[:, kept] -= solved[: len(W)]
    repaired[:, kept] = solved[len(W) :]

    # The bias is the weight of one more channel, which is always 1.
    gram, first = gram_matrix(held, centred=False).to(W.device), held.first.to(W.device).double()
    cross, first_drift = held_drift.cross.to(W.device).double(), held_drift.first.to(W.device).double()
    if centred:
        gram = gram - torch.outer(first, fit_mean) - torch.outer(fit_mean, first - held.tokens * fit_mean)
        cross = cross - torch.outer(first_drift, fit_mean)
        rest = (first - held.tokens * fit_mean)[:, None]
        gram = torch.cat([torch.cat([gram, rest], 1), torch.cat([rest.T, rest.new_full((1, 1), held.tokens)], 1)])
        cross = torch.cat([cross, first_drift[:, None]], 1)
        lack = torch.cat([lack, torch.zeros_like(lack[:, :1])], 1)
        repaired = torch.cat([repaired, fit_shift[:, None]], 1)
    metric = factored.metric if recipe.metric == "loss" else None
    return added, shift, repair_weight(lack, cross, gram, repaired, metric)


def centred_drift(drift: Drift, moments: Moments, mean: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """`sum e x^T` and the mean of e, both in float64 where `mean` is; with `centred`, of x less its mean."""
    cross, first = drift.cross.to(mean.device).double(), drift.first.to(mean.device).double()
    if centred:
        cross = cross - torch.outer(first, mean)
    return cross, first / moments.tokens
