"""Runs of `snp-llm prune` that do no more than a test is about: what is left out takes longer than a small model."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from snp_llm import checkpoint
from snp_llm.cli import prune
from snp_llm.evaluate import prefill
from snp_llm.pruning.estimate import estimate

Replace = Callable[[Any, str, Any], None]  # setattr, or one that is undone


def without_reloading(replace: Replace) -> None:
    """Leaves out the process that loads what was saved."""
    replace(checkpoint, "fresh_process", lambda _dense: nullcontext(SimpleNamespace(load=lambda *_given: None)))
    replace(checkpoint, "compare", lambda *_given: 0.0)


def with_few_steps(replace: Replace) -> None:
    """Takes two steps of refinement and times a pass where a run would take as many as it has time for."""
    replace(prefill, "FEWEST_TURNS", 1)
    replace(prefill, "MOST_TURNS", 1)
    replace(estimate, "FEWEST_STEPS", 1)
    replace(estimate, "MOST_STEPS", 2)


def without_page(replace: Replace) -> None:
    """Leaves out report.html."""
    replace(prune, "write_page", lambda _folder: None)
