"""One site: the weight that its kept channels get, dampening and drift chosen on held-out windows."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from snp_llm.linalg.gram import OutputSums, alive_channels, random_signs, rows_at_once, triangle_flops
from snp_llm.linalg.least_squares import (
    Choice,
    Cut,
    KeptSums,
    choose_repair,
    choose_repair_flops,
    output_energy,
    repair,
    repair_flops,
)
from snp_llm.pruning.statistics import Statistics, TokenSums
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


def repair_site(cut: Cut, statistics: Statistics, recipe: Recipe) -> RepairedSite:
    """Least squares on the kept channels: of the cut, and of the drift where there is any.

    The cut is repaired from all windows, the drift from all that have a reference.

    Args:
        cut: weight, and the channels that go.
        statistics: that it was factored from.
        recipe: dampening and share of the drift, if fixed.

    Raises:
        SnpError: a Gram matrix is not positive definite at the dampening.
    """
    choice, drifting = chosen_repair(cut, statistics, recipe), statistics.referred
    sums = kept_sums(cut, TokenSums(statistics.moments), statistics.files)
    added = repair(sums.gram(), sums.cut.cross, choice.dampening) if cut.repair is None else cut.repair
    change = output_energy(added, sums.gram()) - 2 * float((added * sums.cut.cross).sum(dtype=torch.float64))
    W, shift = cut.W[:, cut.kept] + added, torch.zeros_like(cut.W[:, 0])
    if drifting is not None and choice.alpha > 0:
        del sums  # before the next are made
        sums = kept_sums(replace(cut, gone=cut.gone[:0]), drifting, statistics.files)
        assert sums.drift is not None
        pull = repair(sums.gram(), sums.drift.cross, choice.drift_dampening).mul_(choice.alpha)
        W = W + pull
        if cut.mean is not None and sums.mean is not None:  # as seen from the mean that the bias absorbs
            shift = choice.alpha * (sums.drift.first / sums.tokens) + pull @ (cut.mean - sums.mean)[cut.kept]
    return RepairedSite(W, shift, change, choice.dampening, choice.alpha)


def repair_is_open(statistics: Statistics, recipe: Recipe) -> bool:
    """Whether held-out windows choose the repair: there are some, and the recipe fixes less than all of it."""
    open_share = statistics.referred is not None and recipe.reference_weight is None
    return statistics.held is not None and (recipe.dampening is None or open_share)


def chosen_repair(cut: Cut, statistics: Statistics, recipe: Recipe) -> Choice:
    """Dampening and share of the drift: what the recipe fixes, and for the rest what held-out windows like best.

    They judge repairs that are computed from the other windows that have a reference.
    """
    held, referred = statistics.held, statistics.referred
    fixed_share = None if referred is None else recipe.reference_weight
    if held is None or not repair_is_open(statistics, recipe):
        return Choice(cut.dampening, cut.dampening, fixed_share or 0.0)
    fit = kept_sums(cut, referred or TokenSums(statistics.moments), statistics.files, less=held)
    judged = kept_sums(cut, held, statistics.files, about=fit.mean)
    view = viewed(cut.root, cut.W)
    if view is not None:
        fit, judged = fit.seen_by(view), judged.seen_by(view)
    choice = choose_repair(fit, judged, DAMPENINGS if recipe.dampening is None else [cut.dampening])
    return choice if recipe.reference_weight is None else replace(choice, alpha=recipe.reference_weight)


def repair_site_flops(d: int, n: int, k: int, recipe: Recipe) -> float:
    """FLOPs of `repair_site` for d outputs, k of n channels kept."""
    drifting = recipe.reference != "self"
    sums = 2 * d * (n - k) * k
    flops = sums + d * triangle_flops(k) + drifting * repair_flops(d, k)
    if recipe.holds_out:
        candidates, rows = len(DAMPENINGS) if recipe.dampening is None else 1, VIEWS if d >= 2 * VIEWS else d
        flops += 2 * sums + repair_flops(d, k) + choose_repair_flops(rows, k, candidates, 1 + drifting)
        flops += 4 * d * rows * k * (1 + drifting) if recipe.needs_gradients or rows < d else 0
    return flops


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
    cut: Cut, sums: TokenSums, files: Files = (), *, less: TokenSums | None = None, about: Tensor | None = None
) -> KeptSums:
    """Sums that a repair on the kept channels needs, in the type of W; of the Gram matrix only blocks are ever made.

    Where a bias absorbs the mean of the inputs, that is taken off, and channels that are constant are dead.

    Args:
        cut: weight, and the channels that go.
        sums: over the tokens, whole; and what the output lacks of its reference.
        files: that they are in; let go of after each reading.
        less: sums over those of the tokens that are left out.
        about: mean to take off instead of these tokens' own, (n,); no channel is dead then for being constant.
    """
    W, kept, gone, moments, drift = cut.W, cut.kept, cut.gone, sums.moments, sums.outputs
    tokens, first, energy = moments.tokens, moments.first, moments.second.diagonal()
    if less is not None:
        tokens, first = tokens - less.moments.tokens, first - less.moments.first
        energy = energy - less.moments.second.diagonal()
    alive, mean = None, about
    if cut.mean is not None and about is None:
        alive, mean = alive_channels(energy, first, tokens).to(W), first.to(W) / tokens
    first = first.to(W)
    rest = first if mean is None else first - tokens * mean
    let_go(files)

    def block(rows: Tensor) -> Tensor:
        second = W.new_empty(len(rows), len(kept))
        at_once = rows_at_once(rows.device)
        for some, into in zip(rows.split(at_once), second.split(at_once), strict=True):
            part = moments.second[some[:, None], kept]
            into.copy_(part if less is None else part.sub_(less.moments.second[some[:, None], kept]))
            let_go(files)
        if mean is not None:
            second.addr_(first[rows], mean[kept], alpha=-1).addr_(mean[rows], rest[kept], alpha=-1)
        return second if alive is None else second.mul_(alive[rows][:, None]).mul_(alive[kept])

    removed = OutputSums(W[:, gone] @ block(gone), W[:, gone] @ rest[gone])
    if drift is not None:
        cross, lacking = drift.cross[:, kept], drift.first
        if less is not None and less.outputs is not None:
            cross, lacking = cross - less.outputs.cross[:, kept], lacking - less.outputs.first
        cross, lacking = (sums.to(W.device).to(W.dtype) for sums in (cross, lacking))
        drift = OutputSums(cross if mean is None else cross.addr(lacking, mean[kept], alpha=-1), lacking)
    return KeptSums(partial(block, kept), rest[kept], tokens, removed, drift, mean)
