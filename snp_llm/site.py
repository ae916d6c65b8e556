"""One site: order its units, factor its Gram matrix, cut it and repair it. Knows one block at a time."""

import logging
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snp_llm.device import Clock
from snp_llm.errors import SnpError
from snp_llm.linalg.gram import Drift, Moments, gram_matrix
from snp_llm.linalg.held_out import Choice, TokenSums, choose_repair, cut_repair, drift_repair
from snp_llm.linalg.ldl import (
    Subspace,
    build_subspace,
    energy_curve,
    error_curve,
    held_out_curve,
    make_definite,
    metric_root,
)
from snp_llm.linalg.ordering import OrderingProblem, order_units
from snp_llm.linalg.reconstruction import absorb_mean, reconstruct, relative_error
from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.families import Family, Site, linear, row_units, weight_of
from snp_llm.models.surgery import prune_site
from snp_llm.recipe import Recipe
from snp_llm.sums import Statistics

METRIC_FLOOR = 1.0  # of the mean eigenvalue of F, added to all: what few gradients were seen of still counts

DAMPENING = 0.1  # of orderings and curves, unless the recipe says another
DAMPENINGS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of repairs, from which held-out windows choose

CURVE_POINTS = 128  # of a curve that is kept for pictures; the cut comes on top

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curve:
    """What one factorisation says of a site: its spectrum, and what every width would cost, at some of the widths.

    Attributes:
        channels: numbers of channels kept, ascending, from 1 to all, the cut among them, (p,).
        cut: channels kept.
        variance: of the last latent kept at each of them, in squared activations, dampening included; about the mean
            where the bias absorbs that, about zero elsewhere, (p,).
        spectrum: the same of all latents, the largest first, read at the same places, (p,).
        error: relative squared output error after repair, on the tokens that the site was factored from, (p,).
    """

    channels: list[int]
    cut: int
    variance: list[float]
    spectrum: list[float]
    error: list[float]


def sample_curve(D: Tensor, errors: Tensor, tokens: int, cut: int) -> Curve:
    """A site's curve at no more than `CURVE_POINTS` widths, evenly spaced, and at the cut.

    Args:
        D: latent energies summed over the tokens, in the site's order, (n,), float64.
        errors: squared output error of keeping the first k channels, (n + 1,), float64.
        tokens: that D was summed over.
        cut: channels kept, 1 <= cut <= n.
    """
    points = torch.linspace(1, len(D), min(CURVE_POINTS, len(D)), dtype=torch.float64).round().long()
    channels = torch.cat([points, torch.tensor([cut])]).unique()
    at = (channels - 1).to(D.device)
    whole = float(errors[0])
    return Curve(
        channels=channels.tolist(),
        cut=cut,
        variance=(D[at] / tokens).tolist(),
        spectrum=(D.sort(descending=True).values[at] / tokens).tolist(),
        error=(errors[at + 1] / whole if whole > 0 else torch.zeros_like(errors[at])).tolist(),
    )


@dataclass(frozen=True)
class SiteResult:
    """What happened at one site.

    Attributes:
        site: as it was.
        kept: kept units, ascending, (u,), int64, on the CPU.
        energy: share of the latent energy in what was kept.
        predicted_error: relative squared output error read off the error curve (dampened Gram matrix).
        error: the same, computed from the weights that were written.
        predicted_loss: rise of the mean loss that the visit to the dense model predicted; None without gradients.
        target_weight: alpha, the share of the drift's repair that the out-projection took up.
        dampening: relative dampening used; more than the recipe's where the factorisation failed at that.
        seconds: spent on this site.
        curve: spectrum and errors of every width, for pictures; None where nothing was to be cut or repaired.
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
    curve: Curve | None = None

    def then(self, later: "SiteResult") -> "SiteResult":
        """The result of both, one cut after the other: errors and curve are those of the later."""
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
        repaired = f"error {self.error:.2e}, drift repaired {100 * self.target_weight:.0f} %"
        return f"{self.site.name}: kept {units}, {repaired}, {self.seconds:.1f} s"


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

    def loss_curve(self, held: Moments | None) -> Tensor | None:
        """Predicted rise of the mean loss at every number of channels kept, (n + 1,), or None without gradients.

        Half the squared output error a token in the metric: the quadratic model of the loss whose curvature at the
        site's output is F, for outputs and gradients that are independent of each other. The floor makes it err on the
        dark side, most where F knows few directions.

        Args:
            held: windows that the site was not factored from, on which errors are counted; None: those that it was.
        """
        if self.metric is None:
            return None
        W, subspace = self.W[:, self.subspace.order], self.subspace
        if held is None or held.tokens == 0:
            return error_curve(metric_root(self.metric).T @ W, subspace.L, subspace.D) / (2 * self.tokens)
        sums = sums_about(self.mean if self.centred else torch.zeros_like(self.mean), held, None)
        gram = sums.gram[subspace.order][:, subspace.order]
        return held_out_curve(W, subspace.L, gram, self.metric) / (2 * held.tokens)


def factor_site(block: nn.Module, family: Family, site: Site, statistics: Statistics, recipe: Recipe) -> FactoredSite:
    """Orders a site's units and factors its Gram matrix in that order, on the moments' device."""
    try:
        out, moments = linear(block, site.out_projection), statistics.moments
        centred = recipe.absorb_bias and out.bias is not None
        gram = gram_matrix(moments, centred=centred)
        device = gram.device
        wanted = DAMPENING if recipe.dampening is None else recipe.dampening
        definite = make_definite(gram, wanted)
        if definite.dampening != wanted:
            log.warning("%s: dampening raised from %g to %g", site.name, wanted, definite.dampening)
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
        mean = moments.first.to(device).double() / moments.tokens
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
        return SiteResult(
            site, everything, 1.0, 0.0, 0.0, 0.0, 0.0, recipe.dampening or DAMPENING, time.perf_counter() - start
        )
    with clock.phase("linear algebra"):
        factored = factor_site(block, family, site, statistics, recipe)
        subspace, W, size = factored.subspace, factored.W, site.unit_size
        channels = width * size
        kept, ascending = subspace.order[:channels].sort()
        dense_bias = linear(block, site.out_projection).bias
        bias = None if dense_bias is None else dense_bias.detach().to(W.device).double()
        curve = error_curve(W[:, subspace.order], subspace.L, subspace.D)
        try:
            repaired = repair_site(factored, statistics, kept, ascending, recipe)
        except SnpError as error:
            raise SnpError(f"{site.name}: {error}") from error
        W_new = repaired.W
        if factored.centred and bias is not None:
            bias = absorb_mean(bias, W, W_new, kept, factored.mean) + repaired.shift
        result = SiteResult(
            site=site,
            kept=factored.unit_order[:width].sort().values.cpu(),
            energy=float(energy_curve(subspace.D, size)[width]),
            predicted_error=float(curve[channels] / curve[0]) if curve[0] > 0 else 0.0,
            error=repaired.error,
            predicted_loss=None,
            target_weight=repaired.alpha,
            dampening=repaired.dampening,
            seconds=0.0,
            curve=sample_curve(subspace.D, curve, factored.tokens, channels),
        )
    with clock.phase("surgery"):
        prune_site(block, family, site, result.kept, W_new, bias)
    return replace(result, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class RepairedSite:
    """An out-projection after cut and repair.

    Attributes:
        W: on the kept channels, ascending, (d_out, k), float64.
        shift: what drift adds to the bias, (d_out,), float64.
        error: relative squared output error of the cut with its own repair alone.
        dampening: of that repair.
        alpha: share of the drift's repair that is in W.
    """

    W: Tensor
    shift: Tensor
    error: float
    dampening: float
    alpha: float


def repair_site(
    factored: FactoredSite, statistics: Statistics, kept: Tensor, ascending: Tensor, recipe: Recipe
) -> RepairedSite:
    """Least squares on the kept channels: of the cut, and of the drift where there is any.

    Dampening and the share of the drift are what serves the held-out windows best, when computed from the others,
    unless the recipe fixes them; the repair itself is then computed from all.

    Args:
        factored: the site.
        statistics: that it was factored from.
        kept: kept channels, ascending, (k,), int64.
        ascending: what sorts the first k channels of the site's order.
        recipe: dampening and share, if fixed.
    """
    W, gram, used = factored.W, factored.gram, factored.subspace.dampening
    total, held = statistics.moments, statistics.held_moments
    choice = Choice(used, used, recipe.target_weight or 0.0)
    chosen = recipe.dampening is None or (statistics.drift is not None and recipe.target_weight is None)
    if chosen and held is not None:
        fit = Moments(total.second - held.second, total.first - held.first, total.tokens - held.tokens)
        fit_mean = fit.first.to(W.device).double() / fit.tokens
        metric = torch.eye(len(W), dtype=W.dtype, device=W.device) if factored.metric is None else factored.metric
        drift, held_drift = statistics.drift, statistics.held_drift
        fit_drift = None
        if drift is not None and held_drift is not None:
            fit_drift = Drift(drift.cross - held_drift.cross, drift.first - held_drift.first)
        choice = choose_repair(
            W,
            own_sums(gram_matrix(fit, centred=factored.centred), fit, fit_drift, centred=factored.centred),
            sums_about(fit_mean if factored.centred else torch.zeros_like(fit_mean), held, held_drift),
            kept,
            metric,
            DAMPENINGS if recipe.dampening is None else [used],
            bias=factored.centred,
        )
        if recipe.target_weight is not None:
            choice = replace(choice, alpha=recipe.target_weight)
    sums = own_sums(gram, total, statistics.drift, centred=factored.centred)
    if choice.dampening == used:
        L, order = factored.subspace.L, factored.subspace.order
        W_new = reconstruct(W[:, order], L, len(kept))[:, ascending]
    else:
        W_new = W[:, kept] + cut_repair(W, sums, kept, choice.dampening)
    error = relative_error(W, W_new, kept, gram)
    shift = torch.zeros_like(W[:, 0])
    if choice.alpha > 0 and statistics.drift is not None:
        added = drift_repair(sums, kept, choice.drift_dampening, bias=factored.centred)
        W_new, shift = W_new + choice.alpha * added.weight, choice.alpha * added.shift
    return RepairedSite(W_new, shift, error, choice.dampening, choice.alpha)


def own_sums(gram: Tensor, moments: Moments, drift: Drift | None, *, centred: bool) -> TokenSums:
    """Sums in float64 where their Gram matrix is; with `centred`, of inputs less their own mean, as that is."""
    device = gram.device
    mean = moments.first.to(device).double() / moments.tokens
    sums = TokenSums(gram, moments.first.to(device).double(), moments.tokens, *_drift_sums(drift, device))
    if not centred:
        return sums
    cross = None if sums.cross is None or sums.lacking is None else sums.cross - torch.outer(sums.lacking, mean)
    return replace(sums, first=torch.zeros_like(mean), cross=cross)


def sums_about(mean: Tensor, moments: Moments, drift: Drift | None) -> TokenSums:
    """Sums in float64 where `mean` is, of inputs less that mean of other tokens."""
    first = moments.first.to(mean.device).double()
    rest = first - moments.tokens * mean
    gram = gram_matrix(moments, centred=False).to(mean.device) - torch.outer(first, mean) - torch.outer(mean, rest)
    cross, lacking = _drift_sums(drift, mean.device)
    cross = None if cross is None or lacking is None else cross - torch.outer(lacking, mean)
    return TokenSums(gram, rest, moments.tokens, cross, lacking)


def _drift_sums(drift: Drift | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if drift is None else (drift.cross.to(device).double(), drift.first.to(device).double())
