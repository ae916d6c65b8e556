"""Whole experts of a block: which can be done without, and what is left repaired on the tokens that then reach it.

The router stays as it is but for the rows of those that go: it sends their tokens to others.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from snp_llm.linalg.units import deal_from_groups
from snp_llm.models.anatomy import expert_site
from snp_llm.models.calls import move
from snp_llm.models.experts import activated, expert_of, find_experts, put_experts, put_together
from snp_llm.models.site import Site, site_weight
from snp_llm.models.surgery import drop_experts
from snp_llm.pruning.cut import cut_site
from snp_llm.pruning.experts import Arrivals, dampened, named, tokens_of
from snp_llm.pruning.result import SiteResult
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import Sums, add_batch, empty_sums, over_all_ranks
from snp_llm.runtime import ranks
from snp_llm.runtime.device import in_float64
from snp_llm.runtime.storage import store


@torch.no_grad()
def scores(block: nn.Module, site: Site, arrivals: Arrivals, gradient: Tensor | None, by: str, seed: int) -> Tensor:
    """What each expert is worth, (experts,), float64, on the CPU.

    "loss": predicted rise of the mean loss without it, `sum_t (w_t f_t)^T F (w_t f_t) / 2 T`, with w what the router
    gives it and f what it puts out; the squared norm where there is no F. "reap": `mean_t w_t ||f_t||` over the tokens
    that come by (Lasby et al., arXiv 2510.13999). "frequency": how many do. "random": nothing.
    """
    mixture = site.mixture
    assert mixture is not None
    if by == "random":
        draw = torch.Generator().manual_seed(seed + site.block)
        return torch.rand(mixture.count, dtype=torch.float64, generator=draw)
    sums, counts = (torch.zeros(mixture.count, dtype=torch.float64) for _ in range(2))
    for _, came in arrivals.batches(next(block.parameters()).device):
        for number in range(mixture.count):
            tokens, inputs, weights = came.at(number)
            expert = expert_of(block, mixture, number)
            output = in_float64(expert.outward(activated(block, mixture, expert, inputs) * weights))
            counts[number] += len(tokens)
            if by == "reap":
                sums[number] += float(output.norm(dim=1).sum())
            else:
                moved = output if gradient is None else output @ gradient.to(output)
                sums[number] += float((moved * output).sum()) / 2
    ranks.add_up([sums, counts])
    if by == "frequency":
        return counts
    return sums / (counts.clamp(min=1) if by == "reap" else arrivals.stream.total * arrivals.inputs.shape[1])


def importance(found: Tensor, site: Site) -> Tensor:
    """Experts, most important first, equally many of every group in every whole round, (experts,), int64."""
    order = found.argsort(descending=True, stable=True)
    return deal_from_groups(order, site.groups) if site.groups else order


def whole_curves(
    block: nn.Module, site: Site, arrivals: Arrivals, gradient: Tensor | None, run: Run
) -> dict[str, Tensor]:
    """Curves of a site of whole experts as `SiteCurves` holds them: what those lose that go in the order chosen; and
    this order."""
    recipe = run.recipe
    losses = scores(block, site, arrivals, gradient, "loss", recipe.seed)
    by = recipe.expert_score
    found = losses if by == "loss" else scores(block, site, arrivals, gradient, by, recipe.seed)
    order = importance(found, site)
    kept = losses[order].cumsum(0)
    kept = torch.cat([kept.new_zeros(1), kept])
    known = {f"{site.path} order": order, f"{site.path} energy": kept / kept[-1].clamp(min=1e-30)}
    return known if gradient is None else {**known, f"{site.path} loss": kept[-1] - kept}


@torch.no_grad()
def cut_whole(
    block: nn.Module,
    site: Site,
    arrivals: Arrivals,
    held: Tensor,
    width: int,
    gradient: Tensor | None,
    run: Run,
    arrive: Callable[[Site], Arrivals],
) -> SiteResult:
    """Removes all but `width` experts of a block with their rows of the router, in place, and repairs the others.

    One after the other, the most important first, each takes up what all of them together still lack of what the dense
    experts put out, on the tokens that come by now, as far as held-out windows like it.

    Args:
        block: on the compute device.
        site: of its experts.
        arrivals: at them, before the cut.
        held: which windows are held out.
        width: experts to keep.
        gradient: F, or None.
        run: of this phase.
        arrive: reads what arrives at the experts that are left.
    """
    mixture = site.mixture
    assert mixture is not None
    found = scores(block, site, arrivals, gradient, run.recipe.expert_score, run.recipe.seed)
    order = importance(found, site)
    kept = order[:width].sort().values
    lacking = arrivals.stream.room_for(mixture.outputs)
    with run.clock.phase("forward passes"):
        for at, came in arrivals.batches(next(block.parameters()).device):
            store(lacking, at, put_together(block, mixture, came).view(*lacking[at].shape))
    whole = float(in_float64(lacking).square().sum())
    drop_experts(block, mixture, kept)
    left = find_experts(block)
    assert left is not None
    now = arrive(site)
    with run.clock.phase("forward passes"):
        for at, came in now.batches(next(block.parameters()).device):
            lacking[at] -= put_together(block, left, came).view(*lacking[at].shape).to(lacking)
    most_important_first = (int((kept == unit).nonzero()) for unit in order[:width])
    results = {n: _take_up(block, site, now, n, lacking, held, gradient, run) for n in most_important_first}
    error = float(in_float64(lacking).square().sum()) / whole if whole else 0.0
    facts = [results[number] for number in range(width)]
    share = float(found[kept].sum() / found.sum()) if found.sum() else 1.0
    alpha = sum(f.get("reference_weight", 0.0) for f in facts) / width
    return SiteResult(site, kept, share, 1 - share, error, None, alpha, 0.0, 0.0, experts=facts)


def _take_up(
    block: nn.Module,
    site: Site,
    arrivals: Arrivals,
    number: int,
    lacking: Tensor,
    held: Tensor,
    gradient: Tensor | None,
    run: Run,
) -> dict[str, float]:
    """Repairs one of the experts that are left, in place, for what all of them together lack; what it gives then is
    lacking no more.

    Returns:
        The tokens that come by it, its dampening, and the share of the repair that it took up.
    """
    mixture = find_experts(block)
    assert mixture is not None
    inner, expert = expert_site(site), expert_of(block, mixture, number)
    before, storage = site_weight(expert, inner).clone(), arrivals.stream.storage
    sums = empty_sums(inner.name, before, before.device, storage, drifting=True, holding_out=run.recipe.holds_out)
    with run.clock.phase("Gram matrices"):
        for at, tokens, seen in arrivals.rows(block, mixture, number):
            short = move(lacking[at].flatten(0, 1)[tokens.to(lacking.device)], seen.device)
            wanted = (seen @ before.T + short)[:, None]
            sums = add_batch(sums, seen[:, None], wanted, arrivals.held_out(at, tokens, held))
        sums = over_all_ranks(sums)
    facts = {"tokens": tokens_of(sums), "dampening": 0.0, "relative_error": 0.0}
    if run.recipe.reference == "self" or not worth_a_repair(sums):
        return facts
    with named(site, number):
        result = cut_site(expert, inner, sums, inner.units, lambda: gradient, dampened(run, sums, site))
    change = site_weight(expert, inner) - before
    for at, tokens, seen in arrivals.rows(block, mixture, number):
        flat = lacking[at].flatten(0, 1)
        flat[tokens.to(flat.device)] -= (seen @ change.T).to(flat)
        lacking[at] = flat.view(*lacking[at].shape)
    experts = [expert if n == number else expert_of(block, mixture, n) for n in range(mixture.count)]
    put_experts(block, mixture, experts)
    return {**facts, "dampening": result.dampening, "reference_weight": result.reference_weight}


def worth_a_repair(sums: Sums) -> bool:
    """Whether enough tokens come by an expert, held out ones among them."""
    return sums.fitted.moments.tokens > 0 and (sums.held is None or sums.held.moments.tokens > 0)
