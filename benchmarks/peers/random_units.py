"""Random units, no repair: the floor. It has no source."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .common import Prune, Pruned, best_units, keep_units, model_sites, pruned
from .widths import Plan, with_plans


def prepare(dense: PreTrainedModel, tokens: Tensor, seed: int, plan: Plan) -> Prune:
    """Every unit gets a random score, the same at all sparsities, so that smaller models are parts of larger ones."""
    sites = model_sites(dense)[2]
    generator = torch.Generator().manual_seed(seed)
    planned = plan(dense, tokens)
    scores = [torch.rand(site.units, generator=generator) for site in sites]

    def prune(sparsity: float) -> Pruned:
        widths = planned(sparsity)
        return pruned(dense, keep_units(dense, [best_units(s, w) for s, w in zip(scores, widths, strict=True)]))

    return prune


METHODS = with_plans("random", "random", "no source", prepare)
