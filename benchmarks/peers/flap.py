"""FLAP: units whose inputs hardly fluctuate go, and the out-projection's bias takes up their mean.

Y. An, X. Zhao, T. Yu, M. Tang, J. Wang, "Fluctuation-based Adaptive Structured Pruning for Large Language Models",
arXiv 2312.11983. Scored on the dense model; one threshold for the heads and FFN channels of all blocks.
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.linalg.units import per_unit, unit_channels
from snp_llm.models.projections import projection, weight_of
from snp_llm.models.site import Site

from .common import Method, Prune, Pruned, channel_statistics, keep_units, model_sites, pruned

log = logging.getLogger(__name__)


def unit_scores(W: Tensor, variance: Tensor, unit_size: int) -> Tensor:
    """Fluctuation `Var(x_j) ||W_j||^2` of each channel, standardised over the site, averaged over each unit, (units,).

    Args:
        W: out-projection weight, (d_out, n).
        variance: of each input channel over tokens, (n,).
        unit_size: channels a unit has.
    """
    fluctuation = variance * W.square().sum(0)
    standardised = (fluctuation - fluctuation.mean()) / fluctuation.std()
    return per_unit(standardised, unit_size) / unit_size


def choose_units(scores: Sequence[Tensor], sites: Sequence[Site], sparsity: float) -> list[Tensor]:
    """Kept units of each site, ascending: one threshold on all scores, set by how many parameters units have.

    The lowest scores go, as many as come closest to the budget. The highest of each site stays in any case, since a
    block without heads or channels would not run; said where that changes something.
    """
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    unit = torch.cat([torch.arange(len(s)) for s in scores])
    order = torch.argsort(torch.cat(list(scores)), stable=True)
    last = torch.tensor([int(s.argmax()) for s in scores])
    stays = (unit == last[owner])[order]
    cost = torch.tensor([site.cost for site in sites])[owner][order]
    removed = (cost * ~stays).cumsum(0)
    target = sparsity * sum(site.parameters for site in sites)
    count = int(torch.argmin((torch.cat([removed.new_zeros(1), removed]) - target).abs()))
    if rescued := int(stays[:count].sum()):
        log.warning("flap: %d sites would have lost every unit and keep one", rescued)
    going = order[:count][~stays[:count]]
    gone = torch.zeros(len(order), dtype=torch.bool)
    gone[going] = True
    return [(~gone[owner == i]).nonzero().squeeze(1) for i in range(len(sites))]


def compensated_bias(W: Tensor, bias: Tensor | None, mean: Tensor, kept: Tensor) -> Tensor:
    """`b' = b + W[:, P] mean[P]`: on average the output is what it was.

    Args:
        W: out-projection weight, (d_out, n).
        bias: b, (d_out,), or None.
        mean: of each input channel, (n,).
        kept: the channels that are not in P, int64.
    """
    gone = mean.clone()
    gone[kept] = 0
    return W @ gone if bias is None else bias + W @ gone


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int) -> Prune:
    _, blocks, sites = model_sites(dense)
    statistics = channel_statistics(dense, tokens)
    outs = [projection(blocks[site.block], site.path) for site in sites]
    weights = [weight_of(out).double().cpu() for out in outs]
    variances = [seen.square - seen.mean.square() for seen in statistics]
    scores = [unit_scores(W, v, s.unit_size) for W, v, s in zip(weights, variances, sites, strict=True)]

    def prune(sparsity: float) -> Pruned:
        kept = choose_units(scores, sites, sparsity)
        biases = []
        for site, out, W, seen, units in zip(sites, outs, weights, statistics, kept, strict=True):
            bias = None if out.bias is None else out.bias.detach().double().cpu()
            biases.append(compensated_bias(W, bias, seen.mean, unit_channels(units, site.unit_size)))
        return pruned(dense, keep_units(dense, kept, biases))

    return prune


METHODS = (Method("flap", "FLAP", "An et al., arXiv 2312.11983", prepare),)
