"""Units with the smallest weights go; as they are, or with least squares on the out-projection.

H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710: a
unit's norm is its score. Y. He, X. Zhang, J. Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv
1707.06168: the layer that reads the units is then refitted to what it put out before.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.linalg.gram import gram_matrix
from snp_llm.linalg.ldl import make_definite
from snp_llm.linalg.least_squares import absorb_mean
from snp_llm.linalg.units import per_unit, unit_channels
from snp_llm.models.projections import projection, weight_of
from snp_llm.models.site import Site

from .common import (
    Cut,
    Prune,
    Pruned,
    SiteProblem,
    best_units,
    keep_units,
    least_squares,
    model_sites,
    prune_sequentially,
    pruned,
)
from .widths import Plan, with_plans

DAMPENING = 0.1  # relative to each channel's energy, as by default in the package


def unit_norms(block: nn.Module, site: Site) -> Tensor:
    """Euclidean norm of all weights of each unit, its rows of the in-projections and its columns, (units,), float64."""
    total = per_unit(weight_of(projection(block, site.path)).double().square().sum(0), site.unit_size)
    for producer in site.producers:
        rows = weight_of(projection(block, producer.path)).double().square().sum(1)
        units = producer.units().to(total.device)
        total.index_add_(0, units[units >= 0], rows[units >= 0])
    return total.sqrt()


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int, plan: Plan) -> Prune:
    """The units of the largest norm, out-projections as they were."""
    _family, blocks, sites = model_sites(dense)
    scores, planned = [unit_norms(blocks[site.block], site) for site in sites], plan(dense, tokens)

    def prune(sparsity: float) -> Pruned:
        widths = planned(sparsity)
        return pruned(dense, keep_units(dense, [best_units(s, w) for s, w in zip(scores, widths, strict=True)]))

    return prune


def prepare_refitted(dense: PreTrainedModel, tokens: Tensor, _seed: int, plan: Plan) -> Prune:
    """The units of the largest norm, each out-projection refitted on the activations of the model as pruned so far."""
    planned = plan(dense, tokens)

    def prune(sparsity: float) -> Pruned:
        return pruned(dense, prune_sequentially(dense, tokens, planned(sparsity), refit))

    return prune


def refit(problem: SiteProblem) -> Cut:
    """Weight, and bias where there is one, that come closest to the site's output before the cut."""
    kept = best_units(unit_norms(problem.block, problem.site), problem.width).cpu()
    channels = unit_channels(kept, problem.site.unit_size).to(problem.W.device)
    gram = make_definite(gram_matrix(problem.moments, centred=problem.bias is not None), DAMPENING).gram
    weight, bias = least_squares(problem.W, gram, channels), problem.bias
    if bias is not None:
        mean = problem.moments.first.double() / problem.moments.tokens
        bias = absorb_mean(bias, problem.W, weight, channels, mean)
    return Cut(kept, weight, bias)


METHODS = (
    *with_plans("magnitude", "magnitude", "Li et al., arXiv 1608.08710", prepare),
    *with_plans("magnitude-ls", "magnitude + least squares", "He et al., arXiv 1707.06168", prepare_refitted),
)
