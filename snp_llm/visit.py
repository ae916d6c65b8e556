"""One visit to the dense model before the first cut: what every site's widths would cost, and the loss's gradients.

Knows blocks and sites, cuts nothing and chooses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm import ranks
from snp_llm.device import ONCE, Clock
from snp_llm.errors import SnpError
from snp_llm.journal import Journal
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.linalg.gram import Moments, gram_matrix
from snp_llm.linalg.ldl import energy_curve
from snp_llm.models.blocks import (
    BlockCall,
    frozen,
    input_gradient,
    loss_gradient,
    on_device,
    rest_on_device,
    run_block,
    watch_inputs,
)
from snp_llm.models.families import Family, Site, linear
from snp_llm.recipe import Recipe
from snp_llm.site import factor_site
from snp_llm.stream import Stream, advance, capture, check_finite, in_batches
from snp_llm.sums import Statistics, Sums, add_batch, add_gradient, empty_sums, for_algebra, held_out, over_all_ranks

TOKENS_A_CHANNEL = 16  # of the widest site, from which curves and gradients are read
GRADIENT_TOKENS = 32_768  # at most, with gradients: what enters every block is kept for the way back
HELD_OUT_OF = 4  # one window of so many is held out

OnStep = Callable[[str], None]
Watchers = dict[nn.Module, Callable[[Tensor], None]]


@dataclass(frozen=True)
class SiteCurves:
    """What the dense model says of a site.

    Attributes:
        energy: share of the latent energy at every width, (units + 1,); None where no curve was asked for.
        loss: predicted rise of the mean loss at every width, (units + 1,); None without gradients.
        read_gradient: reads F, second moment of the loss gradient at the site's output, a token, (d_out, d_out).
    """

    energy: Tensor | None
    loss: Tensor | None
    read_gradient: Callable[[], Tensor | None]

    @property
    def gradient(self) -> Tensor | None:
        """F, or None where no gradients were asked for."""
        return self.read_gradient()


def needs_visit(recipe: Recipe) -> bool:
    """Whether anything has to be known of the whole dense model before the first cut."""
    return recipe.needs_gradients or recipe.allocation in NEEDS_CURVES


def visit_dense(
    model: PreTrainedModel,
    family: Family,
    blocks: nn.ModuleList,
    sites: Sequence[Site],
    tokens: Tensor,
    recipe: Recipe,
    clock: Clock,
    journal: Journal,
    on_step: OnStep,
) -> list[SiteCurves]:
    """Curves and gradients of every site, in the order of `find_sites`.

    The model is visited block by block and one block's moments are held at a time. With gradients there are two ways:
    forwards, keeping what enters each block, and backwards, where each block runs once more to pass the gradient on
    while its inputs are summed. Losses are predicted on windows that are held out: on those that a repair was computed
    from its error looks smaller than it is, the more so the more channels a site has for its tokens.
    Curves need fewer tokens than the matrix that repairs a site: the first windows of the draw are enough.

    Args:
        model: dense model; left as it was.
        family: its family.
        blocks: its decoder blocks.
        sites: all of theirs.
        tokens: calibration windows, (windows, T), int64.
        recipe: all settings, resolved.
        clock: of the compute device.
        journal: of this phase; keeps curves and gradients.
        on_step: called with a line a block.
    """
    widest = max(s.units * s.unit_size for s in sites)
    enough = -(-TOKENS_A_CHANNEL * widest // tokens.shape[1])
    if recipe.needs_gradients:
        enough = min(enough, max(HELD_OUT_OF, GRADIENT_TOKENS // tokens.shape[1]))
    tokens = tokens[: max(enough, ranks.rank_count())]
    way = _there_and_back if recipe.needs_gradients else _there
    with frozen(model):
        way(_Visit(model, family, blocks, sites, tokens, recipe, clock, journal, on_step))
    return [
        SiteCurves(
            energy=journal.get(site.block, f"{site.kind} energy"),
            loss=journal.get(site.block, f"{site.kind} loss"),
            read_gradient=partial(journal.get, site.block, f"{site.kind} gradient"),
        )
        for site in sites
    ]


@dataclass(frozen=True)
class _Visit:
    """What `visit_dense` was given, with the tokens that it takes of it; and blocks that wait to be factorised.

    Attributes:
        summed: by number of the block; of other ranks' blocks nothing is held.
    """

    model: PreTrainedModel
    family: Family
    blocks: nn.ModuleList
    sites: Sequence[Site]
    tokens: Tensor
    recipe: Recipe
    clock: Clock
    journal: Journal
    on_step: OnStep
    summed: dict[int, list[Sums]] = field(default_factory=dict)

    @property
    def windows(self) -> range:
        """Those of this rank."""
        return ranks.share(len(self.tokens))

    def start(self) -> Stream:
        """The tokens before the first block."""
        return capture(self.model, self.blocks, self.tokens, self.recipe, self.clock, self.journal.folder)

    def sites_of(self, index: int) -> list[Site]:
        return [s for s in self.sites if s.block == index]


def _there(visit: _Visit) -> None:
    """Curves without gradients, in one pass."""
    blocks, clock, journal, windows = visit.blocks, visit.clock, visit.journal, visit.windows
    first, state = journal.last_state(windows)
    if first == len(blocks):
        return
    stream = visit.start()
    if first:
        stream.hidden.copy_(state["hidden"])
    nothing_held = torch.zeros(len(visit.tokens), dtype=torch.bool)
    for index in range(first, len(blocks)):
        block, here = blocks[index], visit.sites_of(index)
        outs = [linear(block, s.out_projection) for s in here]
        sums = [
            empty_sums(s.name, out, clock.device, stream.shelf, drifting=False, holding_out=False)
            for s, out in zip(here, outs, strict=True)
        ]
        seen: dict[nn.Module, Tensor] = {}

        run = partial(_run, block, stream.hidden, stream.calls[index])
        keepers: Watchers = {out: partial(_keep, seen, out) for out in outs}
        with on_device(block, clock.device):
            with clock.phase("forward passes"), watch_inputs(keepers):
                for at, output in in_batches(len(windows), stream.batch, run):
                    check_finite(output, index)
                    with clock.phase("Gram matrices"):
                        sums = [
                            add_batch(s, seen[out], None, nothing_held[at]) for s, out in zip(sums, outs, strict=True)
                        ]
                    stream.hidden[at] = output
                seen.clear()  # its memory goes to the algebra
            _settle(visit, index, sums, nothing_held, last=index == len(blocks) - 1)
        if not visit.summed:
            done = index + 1
            journal.save_state(done, {"hidden": stream.hidden}, windows, last=done == len(blocks))
        visit.on_step(f"block {index}: curves of the dense model")


def _there_and_back(visit: _Visit) -> None:
    """Curves and gradients, in a pass forwards that keeps what enters each block, and one back."""
    blocks, clock, journal, windows = visit.blocks, visit.clock, visit.journal, visit.windows
    device = clock.device
    done, state = journal.last_state(windows)
    if done == len(blocks):
        return
    stream = visit.start()
    inputs: list[Tensor] = []
    hidden = stream.hidden
    for index, block in enumerate(blocks[: len(blocks) - done]):
        inputs.append(hidden)
        if done and index == len(blocks) - done - 1:
            break  # what comes after it has been visited
        hidden = stream.like_hidden()
        with on_device(block, device), clock.phase("forward passes"):
            advance(block, index, inputs[index], hidden, stream.calls[index], stream.batch)
    if done:
        gradients = stream.like_hidden().copy_(state["gradients"])
    else:
        gradients = hidden
        mine = visit.tokens[windows.start : windows.stop]
        with clock.phase(ONCE), rest_on_device(visit.model, blocks, device):
            for window, states in zip(mine.split(1), hidden.split(1), strict=True):  # logits are large
                states.copy_(loss_gradient(visit.model, blocks, window.to(device), states.to(device)))
    held = held_out(len(visit.tokens), one_of=HELD_OUT_OF)
    held_here = held[windows.start : windows.stop]
    for index in range(len(blocks) - done - 1, -1, -1):
        block, entering, here = blocks[index], inputs.pop(), visit.sites_of(index)
        outs = [linear(block, s.out_projection) for s in here]
        sums = [
            empty_sums(s.name, out, device, stream.shelf, drifting=False, holding_out=True, with_gradient=True)
            for s, out in zip(here, outs, strict=True)
        ]
        seen: dict[nn.Module, Tensor] = {}
        backwards: dict[nn.Module, Tensor] = {}
        watchers: Watchers = {out: partial(_keep, backwards, out) for out in outs}
        keepers: Watchers = {out: partial(_keep, seen, out) for out in outs}
        back = partial(_back, block, entering, stream.calls[index], gradients, watchers, device)
        with on_device(block, device):
            with clock.phase("forward passes"), watch_inputs(keepers):
                for at, gradient in in_batches(len(windows), stream.batch, back):
                    with clock.phase("Gram matrices"):
                        sums = [add_batch(s, seen[o], None, held_here[at]) for s, o in zip(sums, outs, strict=True)]
                        sums = [add_gradient(s, backwards[o]) for s, o in zip(sums, outs, strict=True)]
                    gradients[at] = gradient
                for last in (seen, backwards):
                    last.clear()  # its memory goes to the algebra
            _settle(visit, index, sums, held, last=index == 0)
        if not visit.summed:
            journal.save_state(len(blocks) - index, {"gradients": gradients}, windows, last=index == 0)
        visit.on_step(f"block {index}: curves and gradients of the dense model")


def _run(block: nn.Module, hidden: Tensor, call: BlockCall, at: slice) -> Tensor:
    return run_block(block, hidden[at], call)


def _back(
    block: nn.Module,
    entering: Tensor,
    call: BlockCall,
    gradients: Tensor,
    watchers: Watchers,
    device: torch.device,
    at: slice,
) -> Tensor:
    return input_gradient(block, entering[at], call, gradients[at].to(device), watchers)


def _settle(visit: _Visit, index: int, sums: list[Sums], held: Tensor, *, last: bool) -> None:
    """Adds a block's sums up over all ranks, and factorises blocks once there is one for each rank, all at a time.

    Args:
        visit: the sums go to those that wait.
        index: of the block.
        sums: of its sites.
        held: which of all windows are held out, (windows,), bool.
        last: no other block will come.
    """
    clock, summed = visit.clock, visit.summed
    with clock.phase("Gram matrices"):
        sums = [over_all_ranks(s, held, visit.tokens.shape[1]) for s in sums]
    owner = index % ranks.rank_count()
    summed[index] = sums if owner == ranks.rank() else []
    if len(summed) < ranks.rank_count() and not last:
        return
    curves: dict[int, dict[str, Tensor]] = {}
    with clock.phase("factorisation"):
        for block_index, found in summed.items():
            if found:
                block = visit.blocks[block_index]
                with on_device(block, clock.device):
                    curves[block_index] = _curves(
                        block, visit.family, visit.sites_of(block_index), found, visit.recipe, clock
                    )
    for block_index, tensors in curves.items():
        visit.journal.put(block_index, tensors)
    if visit.journal.folder is None:  # on disk all ranks can read them
        for others in ranks.from_all(
            {i: {k: t for k, t in c.items() if not k.endswith("gradient")} for i, c in curves.items()}
        ):
            for block_index, tensors in others.items():
                if block_index not in curves:
                    visit.journal.put(block_index, tensors)
    ranks.wait()
    summed.clear()


def _curves(
    block: nn.Module, family: Family, sites: Sequence[Site], sums: Sequence[Sums], recipe: Recipe, clock: Clock
) -> dict[str, Tensor]:
    """By kind of site and name: what `SiteCurves` holds."""
    found: dict[str, Tensor] = {}
    for site, site_sums in reversed([*zip(sites, sums, strict=True)]):
        gradient = None
        if site_sums.gradient is not None:
            gradient = _per_token(site_sums.gradient, site)
            found[f"{site.kind} gradient"] = gradient.float().cpu()
        if recipe.allocation not in NEEDS_CURVES:
            continue
        apart = for_algebra(
            site.name,
            Statistics(
                site_sums.moments, held_moments=site_sums.held_moments, gradient=gradient, files=site_sums.files
            ),
        )
        factored = factor_site(block, family, site, apart, recipe, clock)[0]
        found[f"{site.kind} energy"] = energy_curve(factored.subspace.D, site.unit_size).cpu()
        loss = factored.loss_curve(apart)
        if loss is not None:
            found[f"{site.kind} loss"] = loss[:: site.unit_size].cpu()
    return found


def _per_token(moments: Moments, site: Site) -> Tensor:
    if not torch.isfinite(moments.first).all():
        raise SnpError(f"{site.name}: the loss gradient holds NaN or Inf; expected finite. Try --dtype float32.")
    return gram_matrix(moments, centred=False) / moments.tokens


def _keep(seen: dict[nn.Module, Tensor], module: nn.Module, values: Tensor) -> None:
    seen[module] = values.detach()
