"""GRASPrune: gates on FFN channels and KV groups are learned, under the budget at every step; then scales.

Z. Wang, J. Xiao, C. Xiao, R. Li, R. Mao, J. Qin, "GRASPrune: Global Gating for Budgeted Structured Pruning of Large
Language Models", arXiv 2604.19398. Units with the largest `sigmoid(score / 1.5)` that fit into the budget pass;
gradients of the language-modelling loss reach the scores as if the sigmoid itself had been multiplied. Keys and
values of a group have one gate. What stays is then scaled by `1 + tanh(s) / 2` with learned s, folded into the
weights. Steps, rates and epochs are those of the authors' code; a window is a step.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from snp_llm.models.projections import projection
from snp_llm.models.site import Site

from .common import Method, Prune, Pruned, keep_units, model_sites, names_of, pruned

TEMPERATURE = 1.5
RATE = 0.01
EPOCHS = 4
SCALE = 0.5


def within_budget(scores: Sequence[Tensor], costs: Sequence[int], budget: float) -> list[Tensor]:
    """Which units pass, bool, one tensor a site: the highest scores as long as they fit; one of each site in any case.

    Args:
        scores: of each site's units.
        costs: parameters of a unit of each site.
        budget: parameters that may stay.
    """
    flat, owner = torch.cat([*scores]), torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores)])
    order = torch.argsort(flat, descending=True, stable=True)
    passing = torch.zeros(len(flat), dtype=torch.bool)
    passing[order[torch.tensor(costs)[owner][order].cumsum(0) <= budget]] = True
    masks = [*passing.split([len(s) for s in scores])]
    for mask, score in zip(masks, scores, strict=True):
        if not mask.any():
            mask[score.argmax()] = True
    return masks


@contextmanager
def gated(model: PreTrainedModel, sites: Sequence[Site], gates: Sequence[Tensor]) -> Iterator[None]:
    """Multiplies each unit by its gate: FFN channels, or keys and values of a group."""
    handles = []
    for site, gate in zip(sites, gates, strict=True):
        block = model_sites(model)[1][site.block]
        if site.kind == "ffn":
            out = projection(block, site.path)
            handles.append(out.register_forward_pre_hook(lambda _m, x, gate=gate: (x[0] * gate.to(x[0].dtype), *x[1:])))
            continue
        assert site.heads is not None
        per_channel = gate.repeat_interleave(site.heads.size)
        for path in names_of(block).qkv[1:]:
            reader = projection(block, path)
            handles.append(reader.register_forward_hook(lambda _m, _x, y, gate=per_channel: y * gate.to(y.dtype)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def learn(
    model: PreTrainedModel, tokens: Tensor, parameters: list[Tensor], gates, seed: int, epochs: int, sites
) -> None:
    """AdamW on the language-modelling loss, window by window in a seeded order; `gates` makes gates of parameters."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(tokens), generator=generator).tolist():
            window = tokens[index : index + 1].to(model.device)
            with torch.enable_grad(), gated(model, sites, gates()):
                logits = model(window, use_cache=False).logits
                loss = functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()


def prepare(dense: PreTrainedModel, tokens: Tensor, seed: int) -> Prune:
    sites = model_sites(dense)[2]
    costs, total = [site.cost for site in sites], sum(site.parameters for site in sites)

    def prune(sparsity: float) -> Pruned:
        model = copy.deepcopy(dense)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        scores = [torch.zeros(site.units, requires_grad=True) for site in sites]

        def passing() -> list[Tensor]:
            return within_budget(
                [torch.sigmoid(s.detach() / TEMPERATURE) for s in scores], costs, (1 - sparsity) * total
            )

        def straight_through() -> list[Tensor]:
            soft = [torch.sigmoid(s / TEMPERATURE) for s in scores]
            return [m.float() + p - p.detach() for m, p in zip(passing(), soft, strict=True)]

        learn(model, tokens, scores, straight_through, seed, EPOCHS, sites)
        masks = passing()
        scales = [torch.zeros(site.units, requires_grad=True) for site in sites]

        def scaled() -> list[Tensor]:
            return [m * (1 + SCALE * torch.tanh(s)) for m, s in zip(masks, scales, strict=True)]

        learn(model, tokens, scales, scaled, seed, 1, sites)
        with torch.no_grad():
            for site, gate in zip(sites, scaled(), strict=True):
                fold(model_sites(model)[1][site.block], site, gate)
        return pruned(dense, keep_units(model, [mask.nonzero().squeeze(1) for mask in masks]))

    return prune


def fold(block: nn.Module, site: Site, gate: Tensor) -> None:
    """Multiplies what a gate would have, into the weights, in place."""
    if site.kind == "ffn":
        out = projection(block, site.path)
        out.weight = nn.Parameter(out.weight.detach() * gate.to(out.weight), requires_grad=False)
        return
    assert site.heads is not None
    rows = gate.repeat_interleave(site.heads.size)
    for path in names_of(block).qkv[1:]:
        reader = projection(block, path)
        reader.weight = nn.Parameter(reader.weight.detach() * rows[:, None].to(reader.weight), requires_grad=False)
        if reader.bias is not None:
            reader.bias = nn.Parameter(reader.bias.detach() * rows.to(reader.bias), requires_grad=False)


METHODS = (Method("grasprune", "GRASPrune", "Wang et al., arXiv 2604.19398", prepare),)
