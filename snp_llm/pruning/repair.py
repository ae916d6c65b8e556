"""One site: the weight that its kept channels get, dampening and drift chosen on held-out windows."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from snp_llm.linalg.gram import ROWS_AT_ONCE, Drift, Moments, alive_channels, completed, random_signs
from snp_llm.linalg.least_squares import Choice, KeptSums, choose_repair, output_energy, repair_cut, repair_drift
from snp_llm.pruning.statistics import Statistics
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.storage import Files, let_go

DAMPENINGS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of repairs, from which held-out windows choose

VIEWS = 512  # directions of wider outputs in which candidates for a repair are compared


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
    open_share = statistics.drift is not None and recipe.reference_weight is None
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
    have a reference, unless the recipe fixes them. The repairs themselves are then computed from all windows, that of
    the drift from all that have a reference.

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
    referred = statistics.referred or total
    choice = Choice(used, used, 0.0 if drift is None else recipe.reference_weight or 0.0)
    if at_once is None:
        assert held is not None
        fit_first, fit_tokens = (referred.first - held.first).to(W), referred.tokens - held.tokens
        fit_mean = fit_first / fit_tokens if centred else None
        fit = kept_sums(W, kept, gone, referred, drift, fit_mean, less=(held, statistics.held_drift), files=files)
        judged = kept_sums(W, kept, gone, held, statistics.held_drift, fit_mean, own_mean=False, files=files)
        view = viewed(root, W)
        if view is not None:
            fit, judged = fit.seen_by(view), judged.seen_by(view)
        dampenings = DAMPENINGS if recipe.dampening is None else [used]
        choice = choose_repair(fit, judged, dampenings, bias=centred)
        if recipe.reference_weight is not None:
            choice = replace(choice, alpha=recipe.reference_weight)
        del fit, judged
    sums = kept_sums(W, kept, gone, total, None, mean if centred else None, files=files)
    added = repair_cut(sums, choice.dampening) if at_once is None else at_once - W[:, kept]
    change = output_energy(added, sums.gram()) - 2 * float((added * sums.taken).sum(dtype=torch.float64))
    W_new, shift = (W[:, kept] + added) if at_once is None else at_once, torch.zeros_like(W[:, 0])
    if drift is not None and choice.alpha > 0:
        del sums
        own_mean = referred.first.to(W) / referred.tokens
        sums = kept_sums(W, kept, kept[:0], referred, drift, own_mean if centred else None, files=files)
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
