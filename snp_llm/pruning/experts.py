"""The experts of a block: what comes by each, what its widths would cost, and its cut. One expert's sums at a time.

What arrives at an expert's out-projection is weighted by the router: so are its Gram matrix and its repair.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from snp_llm.models.anatomy import expert_site
from snp_llm.models.calls import move
from snp_llm.models.experts import Arrived, Expert, Mixture, activated, expert_of, put_experts
from snp_llm.models.projections import weight_of
from snp_llm.models.site import Site, site_weight
from snp_llm.models.surgery import prune_site
from snp_llm.pruning.algebra import with_algebra
from snp_llm.pruning.cut import cut_site
from snp_llm.pruning.factor import DAMPENING, factor_site
from snp_llm.pruning.repair import DAMPENINGS
from snp_llm.pruning.result import SiteResult
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import Statistics, Sums, add_batch, empty_sums, over_all_ranks
from snp_llm.pruning.stream import Stream
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.storage import store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrivals:
    """What arrives at the experts of a block for all windows of a stream, where its hidden states wait.

    Attributes:
        inputs: of all experts, (windows, T, d).
        chosen: experts that each token comes by, (windows, T, k), int64.
        weights: that the router gives them, (windows, T, k).
        stream: the windows.
    """

    inputs: Tensor
    chosen: Tensor
    weights: Tensor
    stream: Stream

    @classmethod
    def awaited(cls, block: nn.Module, site: Site, stream: Stream) -> "Arrivals":
        """Room for what will arrive at a site of a block."""
        mixture, (windows, tokens) = site.mixture, stream.hidden.shape[:2]
        assert mixture is not None
        width = expert_of(block, mixture, 0).inward.in_features

        def empty(size: int, dtype: torch.dtype) -> Tensor:
            return stream.storage.empty(windows, tokens, size, dtype=dtype)

        dtype = stream.hidden.dtype
        return cls(empty(width, dtype), empty(mixture.each, torch.int64), empty(mixture.each, dtype), stream)

    def put(self, at: slice, came: Arrived) -> None:
        """Takes what arrived for the windows `at`."""
        for into, values in ((self.inputs, came.inputs), (self.chosen, came.chosen), (self.weights, came.weights)):
            store(into, at, values.detach().reshape(at.stop - at.start, *into.shape[1:]))

    def batches(self, device: torch.device) -> Iterator[tuple[slice, Arrived]]:
        """What arrived, some windows at a time, on a device."""
        for start in range(0, len(self.inputs), self.stream.batch.windows):
            at = slice(start, min(start + self.stream.batch.windows, len(self.inputs)))
            parts = (self.inputs[at], self.chosen[at], self.weights[at])
            yield at, Arrived(*(move(part, device).flatten(0, 1) for part in parts))

    def rows(self, block: nn.Module, mixture: Mixture, number: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """What arrives at one expert's out-projection, weighted, (t, channels); of which windows and tokens.

        They are picked out where they wait: of many experts each needs few of the tokens on its device.
        """
        expert, device = expert_of(block, mixture, number), next(block.parameters()).device
        for at, came in self.batches(self.inputs.device):
            tokens, inputs, weights = came.at(number)
            if len(tokens):
                yield at, tokens, activated(block, mixture, expert, move(inputs, device)) * move(weights, device)

    def held_out(self, at: slice, tokens: Tensor, held: Tensor) -> Tensor:
        """Which of some tokens of the windows `at` are held out, (t,), bool, on the CPU."""
        return held[at][(tokens // self.inputs.shape[1]).cpu()]

    def added(self, block: nn.Module, site: Site, number: int, sums: Sums, held: Tensor) -> Sums:
        """Sums of an expert with all windows added, weighted by the router, on all ranks together.

        Args:
            block: that it is in, on the compute device.
            site: of its experts.
            number: of the expert.
            sums: of nothing.
            held: which windows are held out, (windows,), bool, on the CPU.
        """
        assert site.mixture is not None
        for at, tokens, seen in self.rows(block, site.mixture, number):
            sums = add_batch(sums, seen[:, None], None, self.held_out(at, tokens, held))
        return over_all_ranks(sums)


def tokens_of(sums: Sums) -> int:
    """Tokens that sums are over, held out or not."""
    return sums.fitted.moments.tokens + (0 if sums.held is None else sums.held.moments.tokens)


@torch.no_grad()
def experts_curves(
    block: nn.Module,
    site: Site,
    arrivals: Arrivals,
    held: Tensor,
    gradient: Tensor | None,
    run: Run,
    order: Tensor | None = None,
) -> dict[str, Tensor]:
    """Curves of a site of experts as `SiteCurves` holds them: the sum of what each expert's widths cost.

    F is that of what all experts put out together: of one expert's output it is the share of tokens that come by. Of an
    expert that no token comes by nothing is known to be lost.

    Args:
        block: on the compute device.
        site: of its experts.
        arrivals: at it.
        held: which windows are held out.
        gradient: F, (d_out, d_out), or None where not needed.
        run: of this phase.
        order: of the experts where some may go, most important first, (experts,), int64.
    """
    inner, mixture = expert_site(site), site.mixture
    assert mixture is not None
    energies: list[Tensor] = []
    losses = torch.zeros(mixture.count, site.units + 1, dtype=torch.float64)
    tokens = torch.zeros(mixture.count, dtype=torch.float64)
    everything = arrivals.stream.total * arrivals.inputs.shape[1]
    for number in range(mixture.count):
        expert = expert_of(block, mixture, number)
        sums = _empty(inner, expert, arrivals, holding_out=bool(held.any()))
        with run.clock.phase("Gram matrices"):
            sums = arrivals.added(block, site, number, sums, held)
        tokens[number] = tokens_of(sums)
        if sums.fitted.moments.tokens == 0 or ranks.owner(site.block) != ranks.rank():
            continue
        scaled = None if gradient is None else gradient * (float(tokens[number]) / everything)
        apart = Statistics(sums.fitted.moments, held=sums.held, gradient=scaled, files=sums.files)
        with run.clock.phase("factorisation"), named(site, number):
            read = partial(_curves, expert, inner, dampened(run, sums, site))
            energy, loss = with_algebra(site.name, apart, read)
        energies.append(energy)
        losses[number] = 0 if loss is None else loss
    if not energies:
        energies = [torch.linspace(0, 1, site.units + 1, dtype=torch.float64)]
    found = {f"{site.path} energy": torch.stack(energies).mean(0)}
    if gradient is not None:
        found[f"{site.path} loss"] = losses.cumsum(0)[-1]
        if order is not None:
            found[f"{site.path} left"] = curves_of_those_left(losses[order], tokens[order])
    return found


def curves_of_those_left(losses: Tensor, tokens: Tensor) -> Tensor:
    """Predicted rise of the loss where only the first experts are left, by their number, (experts + 1, units + 1).

    The sum of their curves, times what all tokens are of those that came by them: tokens of experts that go come by
    others, and are taken to cost there what those did that came by before.

    Args:
        losses: of every expert at every width, most important first, (experts, units + 1), float64.
        tokens: that came by each, (experts,), float64.
    """
    times = tokens.sum() / tokens.cumsum(0).clamp(min=1)
    return torch.cat([torch.zeros_like(losses[:1]), losses.cumsum(0) * times[:, None]])


def _curves(expert: Expert, inner: Site, run: Run, statistics: Statistics) -> tuple[Tensor, Tensor | None]:
    factored = factor_site(expert, inner, statistics, run.recipe, run.clock)[0]
    loss = factored.loss_curve(statistics)
    return factored.energies().cpu(), None if loss is None else loss.cpu()


@torch.no_grad()
def cut_experts(
    block: nn.Module, site: Site, arrivals: Arrivals, held: Tensor, width: int, gradient: Tensor | None, run: Run
) -> SiteResult:
    """Removes all but `width` channels of each expert, its own, and repairs it on the tokens that come by, in place.

    An expert with fewer tokens than channels gets more dampening; one that no token came by keeps the channels of the
    largest weights, as they are.

    Args:
        block: on the compute device.
        site: of its experts.
        arrivals: at it.
        held: which windows are held out.
        width: channels to keep.
        gradient: F, or None.
        run: of this phase.
    """
    inner, mixture = expert_site(site), site.mixture
    assert mixture is not None
    experts, results, counts = list[Expert](), list[SiteResult](), list[int]()
    for number in range(mixture.count):
        expert = expert_of(block, mixture, number)
        sums = _empty(inner, expert, arrivals, holding_out=run.recipe.holds_out)
        with run.clock.phase("Gram matrices"):
            sums = arrivals.added(block, site, number, sums, held)
        counts.append(tokens_of(sums))
        if sums.fitted.moments.tokens == 0:
            results.append(_unseen(expert, inner, width))
        else:
            with named(site, number):
                results.append(cut_site(expert, inner, sums, width, lambda: gradient, dampened(run, sums, site)))
        experts.append(expert)
    with run.clock.phase("surgery"):
        put_experts(block, mixture, experts)
    if unseen := [number for number, count in enumerate(counts) if not count]:
        log.warning(
            "%s: no calibration token came by %s %s; what they keep follows from their weights alone",
            site.name,
            "expert" if len(unseen) == 1 else "experts",
            ", ".join(map(str, unseen)),
        )
    return _together(site, results, counts)


def uncut_experts(site: Site) -> SiteResult:
    """What happened at a site of experts of which nothing went."""
    assert site.mixture is not None
    everything = torch.arange(site.units)
    everything = everything if site.whole else everything[:, None].expand(-1, site.mixture.count)
    return SiteResult(site, everything, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _empty(inner: Site, expert: Expert, arrivals: Arrivals, *, holding_out: bool) -> Sums:
    W = site_weight(expert, inner)
    return empty_sums(inner.name, W, W.device, arrivals.stream.storage, drifting=False, holding_out=holding_out)


def dampened(run: Run, sums: Sums, site: Site) -> Run:
    """The run with more dampening where fewer tokens came by than there are channels, unless the recipe fixes it."""
    few = (1 if site.mixture is None else site.mixture.channels) / max(1, tokens_of(sums))
    if few <= 1 or run.recipe.dampening is not None:
        return run
    return replace(run, recipe=replace(run.recipe, dampening=min(DAMPENING * few, DAMPENINGS[-1])))


@contextmanager
def named(site: Site, number: int) -> Iterator[None]:
    """Names the expert of a site in what goes wrong while the context lasts."""
    try:
        yield
    except SnpError as error:
        raise SnpError(f"{site.name}, expert {number}: {str(error).partition(': ')[2]}") from error


def _unseen(expert: Expert, inner: Site, width: int) -> SiteResult:
    W = weight_of(expert.outward)
    sizes = W.new_zeros(inner.units).index_add_(
        0, inner.producers[0].units().to(W.device), weight_of(expert.inward).square().sum(1)
    )
    kept = (sizes * W.square().sum(0)).argsort(descending=True, stable=True)[:width].sort().values
    prune_site(expert, inner, kept, W[:, kept], None)
    return SiteResult(inner, kept.cpu(), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _together(site: Site, results: Sequence[SiteResult], counts: Sequence[int]) -> SiteResult:
    """One result for all experts: units of each beside one another, figures weighted by the tokens that came by."""
    total = max(1, sum(counts))

    def mean(of: Callable[[SiteResult], float]) -> float:
        return sum(count * of(result) for result, count in zip(results, counts, strict=True)) / total

    return SiteResult(
        site=site,
        kept=torch.stack([result.kept for result in results], 1),
        energy=mean(lambda r: r.energy),
        predicted_error=mean(lambda r: r.predicted_error),
        error=mean(lambda r: r.error),
        predicted_loss=None,
        reference_weight=0.0,
        dampening=mean(lambda r: r.dampening),
        seconds=0.0,
        experts=[
            {"tokens": count, "dampening": result.dampening, "relative_error": result.error}
            for result, count in zip(results, counts, strict=True)
        ],
    )
