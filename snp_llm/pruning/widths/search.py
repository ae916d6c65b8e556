"""The largest sparsity whose perplexity is still good enough, by bisection. Neither prunes nor measures anything."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from snp_llm.pruning.result import SiteResult
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)


HELD_OUT_WINDOWS = 32  # of the calibration text, never calibrated on

LARGEST = 0.9

PRECISION = 0.01  # of the sparsity found

Attempt = Callable[[float], tuple[PreTrainedModel, list[SiteResult]]]


@dataclass(frozen=True)
class Found:
    """The end of a search.

    Attributes:
        sparsity: the largest one tried that is good enough.
        model, results: pruned to it.
        trials: every sparsity tried and the relative rise of perplexity there, in order.
    """

    sparsity: float
    model: PreTrainedModel
    results: list[SiteResult]
    trials: list[tuple[float, float]]


def largest_sparsity(
    dense: PreTrainedModel,
    allowed: float,
    measure: Callable[[PreTrainedModel], float],
    attempt: Attempt,
    predicted: Callable[[float], float | None],
) -> Found:
    """Bisects the sparsity to within 0.01 of where perplexity on held-out windows has risen by what is allowed.

    The first try is where the predicted loss has risen by as much: predictions cost nothing.

    Args:
        dense: model to compare with.
        allowed: relative rise of perplexity, for instance 0.05.
        measure: perplexity of a model on held-out windows.
        attempt: prunes to a sparsity; raises SnpError where that is more than can go.
        predicted: rise of the mean loss predicted for a sparsity, or None without predictions; raises likewise.

    Raises:
        SnpError: perplexity rises by more at the smallest sparsity tried.
    """
    base = measure(dense)
    low, high = 0.0, LARGEST
    best: tuple[float, PreTrainedModel, list[SiteResult]] | None = None
    trials: list[tuple[float, float]] = []
    sparsity = _first_try(predicted, math.log1p(allowed))
    while high - low > PRECISION:
        try:
            model, results = attempt(sparsity)
        except SnpError:  # more than all units that may go
            if sparsity <= PRECISION:
                raise
            high = sparsity
        else:
            rise = measure(model) / base - 1
            trials.append((sparsity, rise))
            log.info("sparsity %.3f: held-out perplexity %+.2f %%, %g %% allowed", sparsity, 100 * rise, 100 * allowed)
            if rise <= allowed:
                low, best = sparsity, (sparsity, model, results)
            else:
                high = sparsity
        sparsity = (low + high) / 2
    if best is None:
        raise SnpError(
            f"--max-perplexity-increase: expected a rise of at most {100 * allowed:g} %, got {100 * trials[-1][1]:.2f} "
            f"% at a sparsity of {trials[-1][0]:.3f} already. Allow more, or use more or other calibration text."
        )
    return Found(*best, trials)


def _first_try(predicted: Callable[[float], float | None], allowed: float) -> float:
    """The sparsity at which the predicted loss has risen by `allowed`; the middle where nothing is predicted."""
    low, high = 0.0, LARGEST
    while high - low > PRECISION:
        middle = (low + high) / 2
        try:
            rise = predicted(middle)
        except SnpError:
            rise = math.inf
        if rise is None:
            return LARGEST / 2
        low, high = (middle, high) if rise <= allowed else (low, middle)
    return (low + high) / 2
