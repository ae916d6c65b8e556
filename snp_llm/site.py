"""One site: order its units, factor its Gram matrix, cut it and repair it. Knows one block at a time."""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from snp_llm.device import Clock
from snp_llm.errors import SnpError
from snp_llm.linalg.gram import ROWS_AT_ONCE, Drift, Moments, alive_channels, completed, gram_matrix, random_signs
from snp_llm.linalg.held_out import Choice, KeptSums, choose_repair, repair_cut, repair_drift
from snp_llm.linalg.ldl import (
    SOLVE_TOLERANCE,
    DefiniteGram,
    Subspace,
    build_subspace,
    energy_curve,
    error_curve,
    held_out_curve,
    make_definite,
    metric_root,
    probe,
    solve_error,
)
from snp_llm.linalg.ordering import OrderingProblem, order_units
from snp_llm.linalg.reconstruction import absorb_mean, output_energy, reconstruct
from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.families import Family, Site, linear, row_units, weight_of
from snp_llm.models.surgery import prune_site
from snp_llm.recipe import Recipe
from snp_llm.shelf import Files, let_go
from snp_llm.sums import SINGLE_PRECISION_FROM, Statistics

METRIC_FLOOR = 1.0  # of the mean eigenvalue of F, added to all: what few gradients were seen of still counts

DAMPENING = 0.1  # of orderings and curves, unless the recipe says another
DAMPENINGS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of repairs, from which held-out windows choose

VIEWS = 512  # directions of wider outputs in which candidates for a repair are compared

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
        W, mean: out-projection weight, and mean of the inputs, float64 or float32, in the original channel order.
        root: R, with `R R^T = F` and a floor under it, (d_out, d_out), same type; None without gradients.
        tokens: over which the Gram matrix was summed.
        centred: whether the bias absorbs the mean.
    """

    unit_order: Tensor
    subspace: Subspace
    W: Tensor
    mean: Tensor
    root: Tensor | None
    tokens: int
    centred: bool

    def loss_curve(self, statistics: Statistics) -> Tensor | None:
        """Predicted rise of the mean loss at every number of channels kept, (n + 1,), or None without gradients.

        Half the squared output error a token in the metric: the quadratic model of the loss whose curvature at the
        site's output is F, for outputs and gradients that are independent of each other. The floor makes it err on the
        dark side, most where F knows few directions.

        Args:
            statistics: of windows that are held out, if the site was not factored from them: on those errors are
                counted; else on those that it was.
        """
        held = statistics.held_moments
        if self.root is None:
            return None
        L, D, order = self.subspace.L, self.subspace.D, self.subspace.order
        W = (self.root.mT @ self.W)[:, order]
        if held is None or held.tokens == 0:
            return error_curve(W, L, D) / (2 * self.tokens)
        held = completed(held)
        gram = held.second[order[:, None], order].to(W)
        let_go(statistics.files)
        if self.centred:
            first, mean = held.first.to(W)[order], self.mean[order]
            gram.addr_(first, mean, alpha=-1).addr_(mean, first - held.tokens * mean, alpha=-1)
        return held_out_curve(W, L, gram) / (2 * held.tokens)


def factor_site(
    block: nn.Module, family: Family, site: Site, statistics: Statistics, recipe: Recipe, clock: Clock, width: int = 0
) -> tuple[FactoredSite, Tensor]:
    """Orders a site's units and factors its Gram matrix in that order, on the moments' device.

    Args:
        block: that it is in.
        family: the block's.
        site: to be factored.
        statistics: of it.
        recipe: all settings, resolved.
        clock: on which ordering is timed apart.
        width: units that will be kept at least: their order among themselves is then not worth much computing.

    Returns:
        The site, and its Gram matrix (centred where the bias absorbs the mean), (n, n), in the original channel order:
        a large one is not worth keeping where nothing is cut.
    """
    let_go(statistics.files)
    try:
        out, moments = linear(block, site.out_projection), statistics.moments
        centred = recipe.absorb_bias and out.bias is not None
        definite = _definite(site, statistics, DAMPENING if recipe.dampening is None else recipe.dampening, centred)
        gram = definite.gram
        W = weight_of(out).to(gram)
        in_weight = torch.zeros(site.units, dtype=torch.float64, device=gram.device)
        for path, units in zip(site.in_projections, row_units(block, family, site), strict=True):
            sums = weight_of(linear(block, path)).to(gram.device).abs().sum(1, dtype=torch.float64)
            units = units.to(gram.device)
            in_weight.index_add_(0, units[units >= 0], sums[units >= 0])
        root = None
        if statistics.gradient is not None:
            metric = statistics.gradient.to(gram, copy=True)
            metric.diagonal().add_(METRIC_FLOOR * metric.diagonal().mean())
            root = metric_root(metric)
        weighted = root.mT @ W if root is not None and recipe.metric == "loss" else W
        keep = 0 if site.groups else width  # dealing from groups takes some that are not among the best
        problem = OrderingProblem(definite, weighted, in_weight, site.unit_size, recipe.seed + site.block, keep)
        with clock.phase("ordering"):
            unit_order = order_units(recipe.ordering, problem)
        if site.groups:
            unit_order = deal_from_groups(unit_order, site.groups)
        subspace = build_subspace(definite, unit_channels(unit_order, site.unit_size))
        gram.diagonal().copy_(definite.diagonal)  # undampened again, and without dead channels' pivots
        mean = moments.first.to(gram) / moments.tokens
        return FactoredSite(unit_order, subspace, W, mean, root, moments.tokens, centred), gram
    except SnpError as error:
        raise SnpError(f"{site.name}: {error}") from error


def _definite(site: Site, statistics: Statistics, wanted: float, centred: bool) -> DefiniteGram:
    """The site's dampened Gram matrix, in float32 where it is large and that will do."""

    def damped(dtype: torch.dtype) -> DefiniteGram:
        gram = gram_matrix(statistics.moments, centred=centred, dtype=dtype)
        let_go(statistics.files)
        return make_definite(gram, wanted)

    second = statistics.moments.second
    if len(second) >= SINGLE_PRECISION_FROM and second.dtype == torch.float32:
        definite = damped(torch.float32)
        if definite.dampening == wanted and solve_error(definite.spare[0], probe(definite.gram)) <= SOLVE_TOLERANCE:
            return definite
        log.info("%s: too badly conditioned for float32; computed in float64", site.name)
        del definite
    definite = damped(torch.float64)
    if definite.dampening != wanted:
        log.warning("%s: dampening raised from %g to %g", site.name, wanted, definite.dampening)
    return definite


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
    with clock.phase("factorisation"):
        factored, gram = factor_site(block, family, site, statistics, recipe, clock, width)
        W, mean, subspace = factored.W, factored.mean, factored.subspace
        channels = width * site.unit_size
        kept, gone = subspace.order[:channels].sort().values, subspace.order[channels:].sort().values
        dense_bias = linear(block, site.out_projection).bias
        bias = None if dense_bias is None else dense_bias.detach().to(W)
        energy = float(energy_curve(subspace.D, site.unit_size)[width])
        total, lost = output_energy(W, gram), output_energy(W[:, gone], gram[gone[:, None], gone])
        dampened = total + subspace.dampening * float((gram.diagonal() * W.square().sum(0)).sum())
        errors = error_curve(W[:, subspace.order], subspace.L, subspace.D)
        predicted, curve = float(errors[channels]), sample_curve(subspace.D, errors, factored.tokens, channels)
        chosen = chooses_repair(recipe, statistics)
        at_once = None  # the repair that comes with the factorisation, where its dampening is the one to use
        if not chosen:
            ordered = reconstruct(W[:, subspace.order], subspace.L, channels)
            at_once = ordered[:, subspace.order[:channels].argsort()]
        used, root, centred = subspace.dampening, factored.root, factored.centred
        unit_order = factored.unit_order
        del factored, subspace, gram, errors  # a large site's memory goes to its repair
    with clock.phase("reconstruction"):
        try:
            repaired = repair_site(W, at_once, root, mean, statistics, kept, gone, used, recipe, centred=centred)
        except SnpError as error:
            raise SnpError(f"{site.name}: {error}") from error
        if centred and bias is not None:
            bias = absorb_mean(bias, W, repaired.W, kept, mean) + repaired.shift
        result = SiteResult(
            site=site,
            kept=unit_order[:width].sort().values.cpu(),
            energy=energy,
            predicted_error=predicted / dampened if dampened > 0 else 0.0,
            error=max(0.0, lost + repaired.change) / total if total > 0 else 0.0,
            predicted_loss=None,
            target_weight=repaired.alpha,
            dampening=repaired.dampening,
            seconds=0.0,
            curve=curve,
        )
    with clock.phase("surgery"):
        prune_site(block, family, site, result.kept, repaired.W, bias)
    return replace(result, seconds=time.perf_counter() - start)


@dataclass(frozen=True)
class RepairedSite:
    """An out-projection after cut and repair.

    Attributes:
        W: on the kept channels, ascending, (d_out, k), float64 or float32.
        shift: what drift adds to the bias, (d_out,), same type.
        change: squared output error of the cut with its own repair alone, less that of the cut without any.
        dampening: of that repair.
        alpha: share of the drift's repair that is in W.
    """

    W: Tensor
    shift: Tensor
    change: float
    dampening: float
    alpha: float


def chooses_repair(recipe: Recipe, statistics: Statistics) -> bool:
    """Whether held-out windows choose the repair."""
    open_share = statistics.drift is not None and recipe.target_weight is None
    return statistics.held_moments is not None and (recipe.dampening is None or open_share)


def repair_site(
    W: Tensor,
    at_once: Tensor | None,
    root: Tensor | None,
    mean: Tensor,
    statistics: Statistics,
    kept: Tensor,
    gone: Tensor,
    used: float,
    recipe: Recipe,
    *,
    centred: bool,
) -> RepairedSite:
    """Least squares on the kept channels: of the cut, and of the drift where there is any.

    Dampening and the share of the drift are what serves the held-out windows best, when computed from the others that
    have targets, unless the recipe fixes them. The repairs themselves are then computed from all windows, that of the
    drift from all that have targets.

    Args:
        W: out-projection weight, (d_out, n), float64 or float32: so is everything here.
        at_once: the repaired weight that came with the factorisation, (d_out, k), or None where repairs are chosen.
        root: of the metric in which errors count, (d_out, d_out), or None for the plain norm.
        mean: of the site's inputs, (n,).
        statistics: that it was factored from.
        kept: kept channels, ascending, (k,), int64.
        gone: the others, ascending, (n - k,), int64.
        used: dampening of the factorisation.
        recipe: dampening and share, if fixed.
        centred: whether the bias absorbs the mean.
    """
    total, held, drift, files = statistics.moments, statistics.held_moments, statistics.drift, statistics.files
    targeted = statistics.targeted or total
    choice = Choice(used, used, 0.0 if drift is None else recipe.target_weight or 0.0)
    if at_once is None:
        assert held is not None
        fit_first, fit_tokens = (targeted.first - held.first).to(W), targeted.tokens - held.tokens
        fit_mean = fit_first / fit_tokens if centred else None
        fit = kept_sums(W, kept, gone, targeted, drift, fit_mean, less=(held, statistics.held_drift), files=files)
        judged = kept_sums(W, kept, gone, held, statistics.held_drift, fit_mean, own_mean=False, files=files)
        view = viewed(root, W)
        if view is not None:
            fit, judged = fit.seen_by(view), judged.seen_by(view)
        dampenings = DAMPENINGS if recipe.dampening is None else [used]
        choice = choose_repair(fit, judged, dampenings, bias=centred)
        if recipe.target_weight is not None:
            choice = replace(choice, alpha=recipe.target_weight)
        del fit, judged
    sums = kept_sums(W, kept, gone, total, None, mean if centred else None, files=files)
    added = repair_cut(sums, choice.dampening) if at_once is None else at_once - W[:, kept]
    change = output_energy(added, sums.gram()) - 2 * float((added * sums.taken).sum(dtype=torch.float64))
    W_new, shift = (W[:, kept] + added) if at_once is None else at_once, torch.zeros_like(W[:, 0])
    if drift is not None and choice.alpha > 0:
        del sums
        own_mean = targeted.first.to(W) / targeted.tokens
        sums = kept_sums(W, kept, kept[:0], targeted, drift, own_mean if centred else None, files=files)
        drifted = repair_drift(sums, choice, bias=centred)
        W_new = W_new + drifted.weight
        if centred:  # as seen from the mean that the bias absorbs
            shift = drifted.shift + drifted.weight @ (mean - own_mean)[kept]
    return RepairedSite(W_new, shift, change, choice.dampening, choice.alpha)


def viewed(root: Tensor | None, W: Tensor) -> Tensor | None:
    """In which outputs repairs are compared: V, of which `||V^T v||^2` is the error v in the metric, or None for all.

    Of wide outputs V holds so many combinations of the directions with random signs, which give the same sums but for
    some per cent that all candidates have in common (Achlioptas, 2003): a candidate then costs a solve with few rows.

    Args:
        root: of the metric, (d_out, d_out), or None for the plain norm.
        W: out-projection weight, (d_out, n).
    """
    if len(W) < 2 * VIEWS:
        return root
    signs = random_signs(len(W), VIEWS, W) / VIEWS**0.5
    return signs if root is None else root @ signs


def kept_sums(
    W: Tensor,
    kept: Tensor,
    gone: Tensor,
    moments: Moments,
    drift: Drift | None,
    mean: Tensor | None,
    *,
    less: tuple[Moments, Drift | None] | None = None,
    own_mean: bool = True,
    files: Files = (),
) -> KeptSums:
    """Sums that a repair on the kept channels needs, in the type of W; of the Gram matrix only blocks are ever made.

    Args:
        W: out-projection weight, (d_out, n).
        kept: K, (k,), int64.
        gone: P, (n - k,), int64.
        moments: of the site's inputs.
        drift: of its output, or None.
        mean: that is taken off the inputs, (n,), or None.
        less: sums of the tokens to leave out, of those.
        own_mean: whether the mean is that of these tokens: channels that are constant about it are dead.
        files: that the sums are in; let go of after each reading.
    """
    moments = completed(moments)
    apart = None if less is None else completed(less[0])
    tokens, first = moments.tokens, moments.first
    if apart is not None:
        tokens, first = tokens - apart.tokens, first - apart.first
    first = first.to(W)
    rest = first if mean is None else first - tokens * mean
    alive = None
    if mean is not None and own_mean:
        energy = moments.second.diagonal() if apart is None else moments.second.diagonal() - apart.second.diagonal()
        alive = alive_channels(energy, first.to(energy.dtype), tokens).to(W)
    let_go(files)

    def block(rows: Tensor) -> Tensor:
        second = W.new_empty(len(rows), len(kept))
        for some, into in zip(rows.split(ROWS_AT_ONCE), second.split(ROWS_AT_ONCE), strict=True):
            part = moments.second[some[:, None], kept]
            into.copy_(part if apart is None else part.sub_(apart.second[some[:, None], kept]))
            let_go(files)
        if mean is not None:
            second.addr_(first[rows], mean[kept], alpha=-1).addr_(mean[rows], rest[kept], alpha=-1)
        return second if alive is None else second.mul_(alive[rows][:, None]).mul_(alive[kept])

    taken = W[:, gone] @ block(gone)
    cross = lacking = None
    if drift is not None:
        apart_drift = None if less is None else less[1]
        cross, lacking = drift.cross[:, kept], drift.first
        if apart_drift is not None:
            cross, lacking = cross - apart_drift.cross[:, kept], lacking - apart_drift.first
        cross, lacking = cross.to(W), lacking.to(W)
        if mean is not None:
            cross = cross.addr(lacking, mean[kept], alpha=-1)
    return KeptSums(partial(block, kept), taken, rest[kept], W[:, gone] @ rest[gone], tokens, cross, lacking)
