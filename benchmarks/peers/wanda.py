"""Wanda for whole units: weights times the norms of their inputs, no repair.

M. Sun, Z. Liu, A. Bair, J. Z. Kolter, "A Simple and Effective Pruning Approach for Large Language Models", arXiv
2306.11695, which scores single weights; added up over a unit's columns of the out-projection as in the structured
baseline of arXiv 2312.11983. Scored on the dense model.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.linalg.units import per_unit
from snp_llm.models.projections import projection, weight_of

from .common import (
    Prune,
    Pruned,
    best_units,
    channel_statistics,
    keep_units,
    model_sites,
    pruned,
)
from .widths import Plan, with_plans


def unit_scores(W: Tensor, norms: Tensor, unit_size: int) -> Tensor:
    """`sum |W_ij| ||x_j||` over the columns j of each unit, (units,).

    Args:
        W: out-projection weight, (d_out, n).
        norms: Euclidean norm of each input channel over tokens, (n,).
        unit_size: channels a unit has.
    """
    return per_unit(W.abs().sum(0) * norms, unit_size)


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int, plan: Plan) -> Prune:
    _, blocks, sites = model_sites(dense)
    scores, planned = [], plan(dense, tokens)
    for site, seen in zip(sites, channel_statistics(dense, tokens), strict=True):
        W = weight_of(projection(blocks[site.block], site.path)).double().cpu()
        scores.append(unit_scores(W, torch.sqrt(seen.square * seen.tokens), site.unit_size))

    def prune(sparsity: float) -> Pruned:
        widths = planned(sparsity)
        return pruned(dense, keep_units(dense, [best_units(s, w) for s, w in zip(scores, widths, strict=True)]))

    return prune


METHODS = with_plans("wanda", "Wanda, structured", "Sun et al., arXiv 2306.11695", prepare)
