"""2SSP: FFN channels of small norm go from every block, then whole attentions whose loss costs least perplexity.

F. Sandri, E. Cunegatti, G. Iacca, "2SSP: A Two-Stage Framework for Structured Pruning of LLMs", arXiv 2501.17771. Of B
blocks `round(B s^(f / (1.5 a)))` lose their attention at sparsity s, f and a being the parameters of an FFN and of an
attention; the FFNs lose the rest of the budget. Nothing is repaired; with least squares, which is not the paper's, the
same units stay and FFN out-projections are refitted in order.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.evaluate.perplexity import perplexity
from snp_llm.linalg.gram import gram_matrix
from snp_llm.models.blocks import watch_inputs
from snp_llm.models.projections import projection, weight_of
from snp_llm.models.surgery import prune_site

from .common import (
    BATCH,
    Cut,
    Method,
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
from .widths import ffn_widths

BALANCE = 1.5
DAMPENING = 0.01  # of the mean of the Gram matrix's diagonal, for least squares
REFERENCE = "Sandri et al., arXiv 2501.17771"


@torch.no_grad()
def channel_norms(dense: PreTrainedModel, tokens: Tensor) -> dict[int, Tensor]:
    """Mean over windows of the Euclidean norm over tokens of each FFN channel, (n,), by block."""
    _, blocks, sites = model_sites(dense)
    ffns = [site for site in sites if site.kind == "ffn"]
    outs = [projection(blocks[s.block], s.path) for s in ffns]
    sums = [torch.zeros(weight_of(out).shape[1], dtype=torch.float64) for out in outs]

    def add(total: Tensor, x: Tensor) -> None:
        total += x.reshape(-1, tokens.shape[1], x.shape[-1]).double().norm(dim=1).sum(0).to(total.device)

    with watch_inputs({out: partial(add, total) for out, total in zip(outs, sums, strict=True)}):
        for batch in tokens.split(BATCH):
            dense.base_model(batch.to(dense.device), use_cache=False)
    return {site.block: total / len(tokens) for site, total in zip(ffns, sums, strict=True)}


def attentions_to_remove(blocks: int, ffn: int, attention: int, sparsity: float) -> int:
    """How many blocks lose their attention.

    Args:
        blocks: of the model.
        ffn: parameters of an FFN.
        attention: parameters of an attention.
        sparsity: share of the parameters of all blocks that goes.
    """
    return round(blocks * sparsity ** (ffn / attention / BALANCE))


def drop_attention(model: PreTrainedModel, block: int) -> None:
    """Takes a block's attention away, bias and all, in place."""
    _, blocks, sites = model_sites(model)
    site = next(s for s in sites if s.block == block and s.kind == "attention")
    out = projection(blocks[block], site.path)
    bias = None if out.bias is None else torch.zeros_like(out.bias)
    prune_site(blocks[block], site, torch.arange(0), weight_of(out)[:, :0], bias)


def cheapest_attentions(model: PreTrainedModel, count: int, window: Tensor) -> list[int]:
    """Blocks whose attentions go, one after the other, each costing the least perplexity of a window, (1, T)."""
    _, blocks, sites = model_sites(model)
    outs = {s.block: projection(blocks[s.block], s.path) for s in sites if s.kind == "attention"}
    gone: list[int] = []
    for _ in range(count):
        costs = {}
        for block in outs.keys() - set(gone):
            silenced = [outs[index].register_forward_hook(lambda _m, _x, y: y * 0) for index in (*gone, block)]
            costs[block] = perplexity(model, window)
            for handle in silenced:
                handle.remove()
        gone.append(min(costs, key=lambda block: (costs[block], block)))
    return gone


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int, *, refitted: bool) -> Prune:
    _, blocks, sites = model_sites(dense)
    norms = channel_norms(dense, tokens)
    attention, ffn = (next(s.parameters for s in sites if s.kind == kind) for kind in ("attention", "ffn"))
    total = sum(site.parameters for site in sites)

    def prune(sparsity: float) -> Pruned:
        count = attentions_to_remove(len(blocks), ffn, attention, sparsity)
        widths = ffn_widths(sites, sparsity - count * attention / total)
        kept = [
            best_units(norms[site.block], width) if site.kind == "ffn" else torch.arange(site.units)
            for site, width in zip(sites, widths, strict=True)
        ]
        model = keep_units(dense, kept)
        gone = cheapest_attentions(model, count, tokens[:1])
        if refitted:
            places = {(site.block, site.kind): units for site, units in zip(sites, kept, strict=True)}
            widths = [0 if s.kind == "attention" and s.block in gone else w for s, w in zip(sites, widths, strict=True)]
            model = prune_sequentially(dense, tokens, widths, partial(refit, places))
        else:
            for block in gone:
                drop_attention(model, block)
        return pruned(dense, model)

    return prune


def refit(places: dict[tuple[int, str], Tensor], problem: SiteProblem) -> Cut:
    """Least squares on the channels that stay; of an attention that goes, nothing."""
    if problem.site.kind == "attention":
        bias = None if problem.bias is None else torch.zeros_like(problem.bias)
        return Cut(torch.arange(0), problem.W[:, :0], bias)
    gram, kept = gram_matrix(problem.moments, centred=False), places[problem.site.block, "ffn"]
    gram.diagonal().add_(DAMPENING * gram.diagonal().mean())
    return Cut(kept, least_squares(problem.W, gram, kept.to(gram.device)), problem.bias)


METHODS = (
    Method("2ssp", "2SSP", REFERENCE, partial(prepare, refitted=False)),
    Method("2ssp-ls", "2SSP + least squares", REFERENCE, partial(prepare, refitted=True)),
)
