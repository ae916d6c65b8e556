"""Subspace node pruning by this package: as in the paper, and with the package's defaults or any other settings.

J. Offergeld, M. van Gerven, N. Ahmad, "Subspace Node Pruning", arXiv 2405.17506.
"""

from dataclasses import replace
from functools import partial
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
REFERENCE = "Offergeld et al., arXiv 2405.17506"
OURS = "ours"  # the family of all settings of this package


def make_recipe(settings: dict[str, Any], choices: dict[str, Any], sparsity: float, seed: int) -> Recipe:
    """The package's defaults but for the calibration, the budget and `choices`."""
    return Recipe(**(settings | choices), sparsity=sparsity, seed=seed)


def make_methods(
    tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], ours: dict[str, dict[str, Any]]
) -> tuple[Method, ...]:
    """`snp`, and a method for each choice of settings of this package.

    Args:
        tokenizer: of the model.
        settings: fields of the recipe that say what is calibrated on: model, calibration, num_samples, seq_len, ...
        ours: fields of the recipe that differ from its defaults, by the method's name.
    """

    def prepare(choices: dict[str, Any], dense: PreTrainedModel, tokens: Tensor, seed: int) -> Prune:
        recipe = decide(dense, resolve(make_recipe(settings, choices, 0.5, seed), dense))
        windows = read_calibration(tokenizer, recipe, dense)
        if not torch.equal(windows.tokens, tokens):
            raise SnpError("expected the package to calibrate on the windows that its peers get, got others.")
        clock = Clock(compute_device(recipe.device))
        run = Run(recipe, clock, Journal())
        visited = visit(dense, windows, run)  # what no sparsity changes

        def prune(sparsity: float) -> Pruned:
            recipe = decide(dense, resolve(make_recipe(settings, choices, sparsity, seed), dense))
            return pruned(dense, cut_once(visited, windows.tokens, replace(run, recipe=recipe))[0])

        return prune

    def titled(choices: dict[str, Any]) -> str:
        said = ", ".join(f"{key} {value}" for key, value in choices.items())
        return f"{OURS}, {said}" if choices else OURS

    return (
        Method("snp", "SNP as in the paper", REFERENCE, partial(prepare, PAPER)),
        *(
            Method(name, titled(choices), f"this package, after {REFERENCE}", partial(prepare, choices), OURS)
            for name, choices in ours.items()
        ),
    )
