"""Subspace node pruning by this package: as in the paper, and with the package's defaults.

J. Offergeld, M. van Gerven, N. Ahmad, "Subspace Node Pruning", arXiv 2405.17506.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import Recipe
from snp_llm.checkpoint.journal import Journal
from snp_llm.pruning.estimate.estimate import decide
from snp_llm.pruning.pipeline import cut_once, visit
from snp_llm.pruning.run import Run, read_calibration, resolve
from snp_llm.runtime.device import Clock, compute_device
from snp_llm.runtime.errors import SnpError

from .common import Method, Prune, Pruned, pruned

PAPER = {"ordering": "zca-exact", "allocation": "variance", "metric": "error", "reference": "self", "dampening": 0.1}
PAPER |= {"refine": "none"}


def make_recipe(settings: dict[str, Any], choices: dict[str, Any], sparsity: float, seed: int) -> Recipe:
    """The package's defaults but for the calibration, the budget and `choices`."""
    return Recipe(**settings, **choices, sparsity=sparsity, seed=seed)


def make_methods(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> tuple[Method, Method]:
    """`snp` and `ours`.

    Args:
        tokenizer: of the model.
        settings: fields of the recipe that say what is calibrated on: model, calibration, num_samples, seq_len, ...
    """

    def prepare(dense: PreTrainedModel, tokens: Tensor, seed: int, choices: dict[str, Any]) -> Prune:
        recipe = decide(dense, resolve(make_recipe(settings, choices, 0.5, seed), dense))
        windows = read_calibration(tokenizer, recipe, dense)
        if not torch.equal(windows.tokens, tokens):
            raise SnpError("expected the package to calibrate on the windows that its peers get, got others.")
        clock = Clock(compute_device(recipe.device))
        run = Run(recipe, clock, Journal(), lambda _line: None)
        visited = visit(dense, windows, run)  # what no sparsity changes

        def prune(sparsity: float) -> Pruned:
            recipe = decide(dense, resolve(make_recipe(settings, choices, sparsity, seed), dense))
            return pruned(dense, cut_once(visited, windows.tokens, replace(run, recipe=recipe))[0])

        return prune

    reference = "Offergeld et al., arXiv 2405.17506"
    return (
        Method("snp", "SNP as in the paper", reference, lambda d, t, s: prepare(d, t, s, PAPER)),
        Method("ours", "ours", f"this package's defaults, after {reference}", lambda d, t, s: prepare(d, t, s, {})),
    )
