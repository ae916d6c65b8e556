"""Subspace node pruning by this package: as in the paper, and with the package's defaults.

J. Offergeld, M. van Gerven, N. Ahmad, "Subspace Node Pruning", arXiv 2405.17506.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import snp_llm
from snp_llm import Recipe
from snp_llm.errors import SnpError

from .common import Method, Prune, Pruned, pruned

# Later fields of a recipe, each with the value at which it changes nothing about the paper's method.
PAPER = {"ordering": "zca", "allocation": "variance", "metric": "error", "target": "self"}


def make_recipe(settings: dict[str, Any], choices: dict[str, Any], sparsity: float, seed: int) -> Recipe:
    """The package's defaults but for the calibration, the budget and, as far as a recipe has them, `choices`."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    known = {name: value for name, value in choices.items() if name in fields}
    return Recipe(**settings, **known, sparsity=sparsity, seed=seed)


def make_methods(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> tuple[Method, Method]:
    """`snp` and `ours`.

    Args:
        tokenizer: of the model.
        settings: fields of the recipe that say what is calibrated on: model, calibration, num_samples, seq_len, ...
    """

    def prepare(dense: PreTrainedModel, tokens: Tensor, seed: int, choices: dict[str, Any]) -> Prune:
        def prune(sparsity: float) -> Pruned:
            result = snp_llm.prune(dense, tokenizer, make_recipe(settings, choices, sparsity, seed))
            if not torch.equal(result.calibration.tokens, tokens):
                raise SnpError("expected the package to calibrate on the windows that its peers get, got others.")
            return pruned(dense, result.model)

        return prune

    reference = "Offergeld et al., arXiv 2405.17506"
    return (
        Method("snp", "SNP as in the paper", reference, lambda d, t, s: prepare(d, t, s, PAPER)),
        Method("ours", "ours", f"this package's defaults, after {reference}", lambda d, t, s: prepare(d, t, s, {})),
    )
