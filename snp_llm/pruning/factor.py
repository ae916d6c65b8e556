"""One site: its units in order and its Gram matrix factored. Cuts nothing."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snp_llm.linalg.gram import Moments, completed, gram_matrix
from snp_llm.linalg.ldl import (
    SOLVE_TOLERANCE,
    DefiniteGram,
    Subspace,
    build_subspace,
    cholesky_flops,
    energy_curve,
    error_curve,
    held_out_curve,
    held_out_curve_flops,
    make_definite,
    metric_root,
    probe,
    solve_error,
)
from snp_llm.linalg.least_squares import Cut, factored_repair
from snp_llm.linalg.ordering import FLOPS, OrderingProblem, order_units
from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.projections import weight_of
from snp_llm.models.site import Site, projecting, site_bias, site_weight, tap_weights
from snp_llm.pruning.algebra import ALGEBRA_MATRICES, algebra_dtype
from snp_llm.pruning.statistics import Statistics
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.device import Clock
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.storage import let_go

log = logging.getLogger(__name__)


METRIC_FLOOR = 1.0  # of the mean eigenvalue of F, added to all: what few gradients were seen of still counts

DAMPENING = 0.1  # of orderings and curves, unless the recipe says another


@dataclass(frozen=True)
class FactoredSite:
    """A site's units in order, with everything that the cut needs.

    Attributes:
        unit_order: units, most important first, (units,), int64.
        subspace: LDL factors in that order.
        W: out-projection weight, in the original channel order, (d_out, n), float64 or float32.
        mean: of the inputs, which the bias absorbs, in the same order, (n,), same type; None where it absorbs none.
        root: R, with `R R^T = F` and a floor under it, (d_out, d_out), same type; None without gradients.
        whole: likewise of the gradients of an image summed over its positions; None where there is one position.
        tokens: over which the Gram matrix was summed.
    """

    unit_order: Tensor
    subspace: Subspace
    W: Tensor
    mean: Tensor | None
    root: Tensor | None
    whole: Tensor | None
    tokens: int

    def cut(self, channels: int, *, repaired: bool) -> Cut:
        """The site with its first so many channels kept, and with `repaired` the repair that L has for it."""
        order = self.subspace.order
        first, last = order[:channels], order[channels:]
        repair = None
        if repaired:
            repair = factored_repair(self.W[:, order], self.subspace.L, channels)[:, first.argsort()]
        kept, gone = first.sort().values, last.sort().values
        return Cut(self.W, kept, gone, self.mean, self.root, self.subspace.dampening, repair)

    def loss_curve(self, statistics: Statistics) -> Tensor | None:
        """Predicted rise of the mean loss at every number of channels kept, (n + 1,), or None without gradients.

        Half the squared output error a token in the metric: the quadratic model of the loss whose curvature at the
        site's output is F, for outputs and gradients that are independent of each other. The floor makes it err on the
        dark side, most where F knows few directions.

        Args:
            statistics: of windows that are held out, if the site was not factored from them: on those errors are
                counted; else on those that it was.
        """
        if self.root is None:
            return None
        L, D, order = self.subspace.L, self.subspace.D, self.subspace.order
        W = (self.root.mT @ self.W)[:, order]
        together = self.together(statistics)
        if statistics.held is None or statistics.held.moments.tokens == 0:
            return error_curve(W, L, D) / (2 * self.tokens) + together
        gram = self.gram_about_mean(statistics.held.moments)
        let_go(statistics.files)
        return held_out_curve(W, L, gram) / (2 * statistics.held.moments.tokens) + together

    def together(self, statistics: Statistics) -> Tensor | float:
        """What errors at the positions of an image add to the loss beyond what each does, at every number of channels.

        They meet in one loss, and where a pooling gives all of them one gradient they add up. `(1 - 1/P) tr(S E) / 2`,
        with S the second moment of an image's gradients summed over its P positions, and E that of what its inputs'
        means lose. Zero where there is one position.

        Args:
            statistics: with the means.
        """
        means = statistics.means
        if self.whole is None or means is None or means.tokens == 0:
            return 0.0
        seen = statistics.held.moments if statistics.held is not None else statistics.moments
        share = 1 - means.tokens / seen.tokens
        W = (self.whole.mT @ self.W)[:, self.subspace.order]
        return share * held_out_curve(W, self.subspace.L, self.gram_about_mean(means)) / (2 * means.tokens)

    def gram_about_mean(self, moments: Moments) -> Tensor:
        """Gram matrix in the site's order, about the mean that the bias absorbs; the caller's own."""
        moments, order = completed(moments), self.subspace.order
        gram = moments.second[order[:, None], order].to(self.W)
        if self.mean is not None:
            first, mean = moments.first.to(self.W)[order], self.mean[order]
            gram.addr_(first, mean, alpha=-1).addr_(mean, first - moments.tokens * mean, alpha=-1)
        return gram

    def energies(self) -> Tensor:
        """Share of the latent energy at every width, (units + 1,)."""
        return energy_curve(self.subspace.D, len(self.subspace.D) // len(self.unit_order))

    def errors(self) -> Tensor:
        """Relative squared output error at every number of channels kept, (n + 1,)."""
        errors = error_curve(self.W[:, self.subspace.order], self.subspace.L, self.subspace.D)
        return errors / errors[0] if errors[0] > 0 else errors


def factor_site(
    block: nn.Module, site: Site, statistics: Statistics, recipe: Recipe, clock: Clock, width: int = 0
) -> tuple[FactoredSite, Tensor]:
    """Orders a site's units and factors its Gram matrix in that order, on the moments' device.

    Args:
        block: that it is in.
        site: to be factored.
        statistics: of it.
        recipe: all settings.
        clock: on which ordering is timed apart.
        width: units that will be kept at least: their order among themselves is then not worth much computing.

    Returns:
        The site, and its Gram matrix (centred where the bias absorbs the mean), (n, n), in the original channel order:
        a large one is not worth keeping where nothing is cut.
    """
    let_go(statistics.files)
    try:
        moments = statistics.moments
        if moments.tokens == 0:
            raise SnpError("no calibration token came by; expected some. Use more --num-samples.")
        centred = recipe.absorb_bias and site_bias(block, site) is not None
        definite = _definite(site, statistics, DAMPENING if recipe.dampening is None else recipe.dampening, centred)
        gram = definite.gram
        W = site_weight(block, site).to(gram.device).to(gram.dtype)  # a device may not have that type
        in_weight = torch.zeros(site.units, dtype=torch.float64, device=gram.device)
        for producer, module in projecting(block, site):
            sums = weight_of(module).to(gram.device).abs().sum(1, dtype=torch.float64)
            units = producer.units().to(gram.device)
            in_weight.index_add_(0, units[units >= 0], sums[units >= 0])
        metric, whole = _metric(block, site, statistics.gradient, W), _whole(block, site, statistics.whole, W)
        root = None if metric is None else metric_root(metric)
        weighted = root.mT @ W if root is not None and (recipe.metric == "loss" or site.taps) else W
        keep = 0 if site.groups else width  # dealing from groups takes some that are not among the best
        problem = OrderingProblem(definite, weighted, in_weight, site.unit_size, recipe.seed + site.block, keep)
        with clock.phase("ordering"):
            known = torch.tensor(site.order, device=gram.device)
            unit_order = known if site.order else order_units(recipe.ordering, problem)
        if site.groups:
            unit_order = deal_from_groups(unit_order, site.groups)
        subspace = build_subspace(definite, unit_channels(unit_order, site.unit_size))
        gram.diagonal().copy_(definite.diagonal)  # undampened again, and without dead channels' pivots
        mean = moments.first.to(gram) / moments.tokens if centred else None
        roots = (root, None if whole is None else metric_root(whole))
        return FactoredSite(unit_order, subspace, W, mean, *roots, moments.tokens), gram
    except SnpError as error:
        raise SnpError(f"{site.name}: {error}") from error


def _metric(block: nn.Module, site: Site, gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """F with a floor under it; of mixed channels what it says of an error in them, `sum_taps W^T F W`."""
    metric = None if gradient is None else _floored(gradient, like)
    if not site.taps:
        return metric
    total, taps = like.new_zeros(site.units, site.units), tap_weights(block, site)
    wide = torch.promote_types(taps.dtype, torch.float32)  # products with many outputs are not worth more
    metric = None if metric is None else metric.to(wide)
    for tap in taps:
        W = tap.to(like.device, wide)
        total += (W.mT @ (W if metric is None else metric @ W)).to(total)
    return total


def _floored(gradient: Tensor, like: Tensor) -> Tensor:
    """A copy of F with the floor under it."""
    metric = gradient.to(like, copy=True)
    metric.diagonal().add_(METRIC_FLOOR * metric.diagonal().mean())
    return metric


def _whole(block: nn.Module, site: Site, gradient: Tensor | None, like: Tensor) -> Tensor | None:
    """S with a floor under it, likewise; of mixed channels all taps see one error."""
    if gradient is None:
        return None
    metric = _floored(gradient, like)
    if not site.taps:
        return metric
    W = tap_weights(block, site).sum(0).to(like)
    return W.mT @ metric @ W


def factor_flops(d: int, n: int, recipe: Recipe, keep: int = 0) -> float:
    """FLOPs of `factor_site` for d outputs and n channels, of which some are kept for certain: a factor before the
    ordering and one after it, and that of the metric."""
    flops = 2 * cholesky_flops(n)
    if recipe.ordering in FLOPS:
        flops += FLOPS[recipe.ordering](n, d, keep)
    if recipe.needs_gradients:
        flops += cholesky_flops(d) + (2 * d * d * n if recipe.metric == "loss" else 0)
    return flops


def loss_curve_flops(d: int, n: int) -> float:
    """FLOPs of a site's `loss_curve` on held-out windows, for d outputs and n channels."""
    return 2 * d * d * n + held_out_curve_flops(d, n)


def algebra_bytes(d: int, n: int, weights: torch.dtype, recipe: Recipe) -> int:
    """Bytes that a site of n channels and d outputs takes while it is factored, cut and repaired: matrices as wide as
    it, weights (W, weighted, W L, W'), and the metric with its root."""
    entries = ALGEBRA_MATRICES * n * n + 4 * d * n + (3 * d * d if recipe.needs_gradients else 0)
    return entries * algebra_dtype(n, weights).itemsize


def _definite(site: Site, statistics: Statistics, wanted: float, centred: bool) -> DefiniteGram:
    """The site's dampened Gram matrix, in float32 where it is large and that will do."""

    def damped(dtype: torch.dtype) -> DefiniteGram:
        gram = gram_matrix(statistics.moments, centred=centred, dtype=dtype)
        let_go(statistics.files)
        return make_definite(gram, wanted)

    second = statistics.moments.second
    if algebra_dtype(len(second), second.dtype) == torch.float32:
        definite = damped(torch.float32)
        if definite.dampening == wanted and solve_error(definite.spare[0], probe(definite.gram)) <= SOLVE_TOLERANCE:
            return definite
        log.info("%s: too badly conditioned for float32; computed in float64", site.name)
        del definite
    definite = damped(torch.float64)
    if definite.dampening != wanted:
        log.warning("%s: dampening raised from %g to %g", site.name, wanted, definite.dampening)
    return definite
