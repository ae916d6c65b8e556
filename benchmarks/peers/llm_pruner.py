"""LLM-Pruner: units whose weights matter least to the loss, by its first-order Taylor expansion, go; no repair.

X. Ma, G. Fang, X. Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627. A weight
costs `|w dL/dw|`, a unit what its weights cost together ("element"), or `|sum w dL/dw|` over each row or column that is
its own ("vector"). The paper's code leaves the first and the last blocks whole, which is a setting here.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from snp_llm.linalg.units import per_unit
from snp_llm.models.projections import projection
from snp_llm.models.site import Site

from .common import Prune, Pruned, best_units, keep_units, model_sites, pruned
from .widths import Plan, Widths, everywhere, ffn_alone, ffn_widths, uniform_widths, with_plans

WHOLE_BEFORE, WHOLE_AFTER = 4 / 32, 2 / 32  # of the blocks, as of Llama-7B's in the paper's code
REFERENCE = "Ma et al., arXiv 2305.11627"


def salience(dense: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """`w dL/dw` of every weight, by its name, L the mean loss of the calibration windows."""
    weights = {name: p for name, p in dense.named_parameters() if p.dim() == 2}
    was = {name: p.requires_grad for name, p in weights.items()}
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        for window in tokens.split(1):
            logits = dense(window.to(dense.device), use_cache=False).logits
            loss = functional.cross_entropy(logits[0, :-1].float(), window[0, 1:].to(logits.device))
            gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += 0 if gradient is None else gradient
    for name, parameter in weights.items():
        parameter.requires_grad_(was[name])
    return {name: weights[name].detach() * value / len(tokens) for name, value in total.items()}


def unit_scores(found: Callable[[str], Tensor], site: Site, *, element: bool) -> Tensor:
    """What each unit of a site costs, (units,), float64.

    Args:
        found: salience of a projection by its path.
        site: of heads or FFN channels.
        element: sums of absolute values, or absolute values of sums over rows and columns.
    """
    columns = found(site.path).double()
    total = per_unit(columns.abs().sum(0) if element else columns.sum(0).abs(), site.unit_size)
    for producer in site.producers:
        rows, units = found(producer.path).double(), producer.units().to(total.device)
        scores = rows.abs().sum(1) if element else rows.sum(1).abs()
        total.index_add_(0, units[units >= 0], scores[units >= 0])
    return total


def middle_blocks(dense: PreTrainedModel, _tokens: Tensor) -> Widths:
    """Uniform in all blocks but the first eighth and the last sixteenth, which stay whole."""
    return partial(_in_the_middle, model_sites(dense)[2], uniform_widths)


def middle_ffns(dense: PreTrainedModel, _tokens: Tensor) -> Widths:
    """The same, of FFNs alone."""
    return partial(_in_the_middle, model_sites(dense)[2], ffn_widths)


def _in_the_middle(sites: list[Site], widths: Callable[[list[Site], float], list[int]], sparsity: float) -> list[int]:
    count = sites[-1].block + 1
    first, last = round(WHOLE_BEFORE * count), count - max(1, round(WHOLE_AFTER * count))
    middle = [site for site in sites if first <= site.block < last]
    share = sparsity * sum(s.parameters for s in sites) / sum(s.parameters for s in middle)
    kept = iter(widths(middle, share))
    return [next(kept) if first <= site.block < last else site.units for site in sites]


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int, plan: Plan, *, element: bool) -> Prune:
    planned, (_, blocks, sites) = plan(dense, tokens), model_sites(dense)
    by_name, names = salience(dense, tokens), {id(p): name for name, p in dense.named_parameters()}

    def found(block: nn.Module, path: str) -> Tensor:
        return by_name[names[id(projection(block, path).weight)]]

    scores = [unit_scores(partial(found, blocks[s.block]), s, element=element) for s in sites]

    def prune(sparsity: float) -> Pruned:
        widths = planned(sparsity)
        return pruned(dense, keep_units(dense, [best_units(s, w).cpu() for s, w in zip(scores, widths, strict=True)]))

    return prune


PLANS: dict[str, tuple[str, Plan]] = {
    "": ("", everywhere),
    "-ffn": (", FFN alone", ffn_alone),
    "-middle": (", middle blocks", middle_blocks),
    "-middle-ffn": (", middle blocks, FFN alone", middle_ffns),
}
METHODS = with_plans("llm-pruner", "LLM-Pruner", REFERENCE, partial(prepare, element=True), PLANS) + with_plans(
    "llm-pruner-vector",
    "LLM-Pruner",
    REFERENCE,
    partial(prepare, element=False),
    {suffix: (f", vector{said}", plan) for suffix, (said, plan) in PLANS.items()},
)
