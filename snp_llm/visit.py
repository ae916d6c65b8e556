"""One visit to the dense model before the first cut: what every site's widths would cost, and the loss's gradients.

Knows blocks and sites, cuts nothing and chooses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from snp_llm.stream import advance, capture, check_finite, in_batches
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
        way(model, family, blocks, sites, tokens, recipe, clock, journal, on_step)
    return [
        SiteCurves(
            energy=journal.get(site.block, f"{site.kind} energy"),
            loss=journal.get(site.block, f"{site.kind} loss"),
            read_gradient=partial(journal.get, site.block, f"{site.kind} gradient"),
        )
        for site in sites
    ]


def _there(
    model: PreTrainedModel,
    family: Family,
    blocks: nn.ModuleList,
    sites: Sequence[Site],
    tokens: Tensor,
    recipe: Recipe,
    clock: Clock,
    journal: Journal,
    on_step: OnStep,
) -> None:
    """Curves without gradients, in one pass."""
    windows = ranks.share(len(tokens))
    first, state = journal.last_state(windows)
    if first == len(blocks):
        return
    stream = capture(model, blocks, tokens, recipe, clock, journal.folder)
    if first:
        stream.hidden.copy_(state["hidden"])
    summed: list[tuple[int, list[Sums]]] = []
    for index in range(first, len(blocks)):
        block = blocks[index]
        here = [s for s in sites if s.block == index]
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
                    none_held = torch.zeros(at.stop - at.start, dtype=torch.bool)
                    with clock.phase("Gram matrices"):
                        sums = [add_batch(s, seen[out], None, none_held) for s, out in zip(sums, outs, strict=True)]
                    stream.hidden[at] = output
                seen.clear()  # its memory goes to the algebra
                sums = [over_all_ranks(s, torch.zeros(len(tokens), dtype=torch.bool), tokens.shape[1]) for s in sums]
            _settle(summed, index, sums, index == len(blocks) - 1, blocks, family, sites, recipe, clock, journal)
        if not summed:
            done = index + 1
            journal.save_state(done, {"hidden": stream.hidden}, windows, last=done == len(blocks))
        on_step(f"block {index}: curves of the dense model")


def _there_and_back(
    model: PreTrainedModel,
    family: Family,
    blocks: nn.ModuleList,
    sites: Sequence[Site],
    tokens: Tensor,
    recipe: Recipe,
    clock: Clock,
    journal: Journal,
    on_step: OnStep,
) -> None:
    """Curves and gradients, in a pass forwards that keeps what enters each block, and one back."""
    windows, device = ranks.share(len(tokens)), clock.device
    done, state = journal.last_state(windows)
    if done == len(blocks):
        return
    stream = capture(model, blocks, tokens, recipe, clock, journal.folder)
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
        mine = tokens[windows.start : windows.stop]
        with clock.phase(ONCE), rest_on_device(model, blocks, device):
            for window, states in zip(mine.split(1), hidden.split(1), strict=True):  # logits are large
                states.copy_(loss_gradient(model, blocks, window.to(device), states.to(device)))
    held = held_out(len(tokens), one_of=HELD_OUT_OF)
    held_here = held[windows.start : windows.stop]
    summed: list[tuple[int, list[Sums]]] = []
    for index in range(len(blocks) - done - 1, -1, -1):
        block, entering = blocks[index], inputs.pop()
        here = [s for s in sites if s.block == index]
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
                sums = [over_all_ranks(s, held, tokens.shape[1]) for s in sums]
            _settle(summed, index, sums, index == 0, blocks, family, sites, recipe, clock, journal)
        if not summed:
            journal.save_state(len(blocks) - index, {"gradients": gradients}, windows, last=index == 0)
        on_step(f"block {index}: curves and gradients of the dense model")


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


def _settle(
    summed: list[tuple[int, list[Sums]]],
    index: int,
    sums: list[Sums],
    last: bool,
    blocks: nn.ModuleList,
    family: Family,
    sites: Sequence[Site],
    recipe: Recipe,
    clock: Clock,
    journal: Journal,
) -> None:
    """Factorises blocks once there is one for each rank, so that all ranks do so at the same time.

    Args:
        summed: blocks that wait for it; of other ranks' blocks nothing is held.
        index: of the block that is added.
        sums: of its sites.
        last: no other block will come.
    """
    owner = index % ranks.rank_count()
    summed.append((index, sums if owner == ranks.rank() else []))
    if len(summed) < ranks.rank_count() and not last:
        return
    curves: dict[int, dict[str, Tensor]] = {}
    with clock.phase("factorisation"):
        for block_index, found in summed:
            if found:
                here = [s for s in sites if s.block == block_index]
                with on_device(blocks[block_index], clock.device):
                    curves[block_index] = _curves(blocks[block_index], family, here, found, recipe, clock)
    for block_index, tensors in curves.items():
        journal.put(block_index, tensors)
    if journal.folder is None:  # on disk all ranks can read them
        for others in ranks.from_all(
            {i: {k: t for k, t in c.items() if not k.endswith("gradient")} for i, c in curves.items()}
        ):
            for block_index, tensors in others.items():
                if block_index not in curves:
                    journal.put(block_index, tensors)
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
