"""One visit to the dense model before the first cut: what every site's widths would cost, and the loss's gradients.

Knows blocks and sites, cuts nothing and chooses nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from snp_llm.checkpoint.journal import Journal
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.linalg.gram import Moments, add_moments, empty_moments, gram_matrix
from snp_llm.models.anatomy import Anatomy
from snp_llm.models.blocks import (
    frozen,
    loss_gradient,
    on_device,
    rest_on_device,
    run_block,
)
from snp_llm.models.calls import move
from snp_llm.models.site import Site, block_dtype, outputs_of, site_weight
from snp_llm.models.task import task_of
from snp_llm.pruning.experts import Arrivals, experts_curves
from snp_llm.pruning.factor import FactoredSite, factor_site
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import (
    Statistics,
    Sums,
    add_inputs,
    empty_sums,
    enough_windows,
    held_out,
    over_all_ranks,
    with_algebra,
)
from snp_llm.pruning.stream import Stream, advance, capture, check_finite
from snp_llm.pruning.taps import gradients_at, tapped
from snp_llm.pruning.whole_experts import whole_curves
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.device import ONCE, Clock, where_it_fits
from snp_llm.runtime.errors import SnpError

TOKENS_AN_OUTPUT = 8  # for each channel that a block puts out, from which gradients are read

GRADIENT_TOKENS = 32_768  # at most: what of these enters every block is kept for the way back

FEWEST_WINDOWS = 4  # at least, so that up to so many ranks read the same

IMAGES = 128  # at least, where what gradients of an image have in common counts as well

HELD_OUT_OF = 4  # one window of so many is held out


@dataclass(frozen=True)
class SiteCurves:
    """What the dense model says of a site.

    Attributes:
        energy: share of the latent energy at every width, (units + 1,); None where no curve was asked for.
        loss: predicted rise of the mean loss at every width, (units + 1,); None without gradients.
        order, rises: of units that several sites share, most important first, and what each of them, the last that has
            gone, adds to that loss, or to the relative error; (units,) both, None elsewhere.
        read_gradient: reads F, second moment of the loss gradient at the site's output, (d_out, d_out), summed over as
            many positions as there is a loss for: a token of a text, an image with all of its positions.
        distances: of a whole block, where another score than the loss is asked for: how far it moves the stream, and it
            and each of the blocks behind it together; (1,) or as many as there are blocks.
    """

    energy: Tensor | None
    loss: Tensor | None
    order: Tensor | None
    rises: Tensor | None
    read_gradient: Callable[[], Tensor | None]
    distances: Tensor | None = None

    @property
    def gradient(self) -> Tensor | None:
        """F, read now, or None where none was asked for; without files, only on the rank that cuts the block."""
        return self.read_gradient()


def visit_passes(recipe: Recipe, sites: Sequence[Site] = ()) -> int:
    """How many times the dense model's blocks are visited before the first cut: for gradients, for curves, or both."""
    return recipe.needs_gradients + needs_curves(recipe, sites)


def needs_curves(recipe: Recipe, sites: Sequence[Site]) -> bool:
    """Whether widths follow from curves, or the order of units that several sites share."""
    return recipe.allocation in NEEDS_CURVES or any(site.kind == "stream" for site in sites)


def visit_windows(
    widest: int, hidden: int, seq_len: int, recipe: Recipe, sites: Sequence[Site] = ()
) -> tuple[int, int]:
    """Windows that a visit reads gradients from, and curves; none where the recipe does not need them.

    Args:
        widest: inputs of the widest site.
        hidden: channels that a block puts out.
        seq_len: tokens a window has.
        recipe: what is needed.
        sites: as of `needs_curves`.
    """
    gradients = gradient_windows(hidden, seq_len) if recipe.needs_gradients else 0
    return gradients, enough_windows(widest, seq_len) if needs_curves(recipe, sites) else 0


def gradient_windows(hidden: int, seq_len: int) -> int:
    """Windows that gradients are read from: of these there are moments over pairs of a block's output channels alone.

    Args:
        hidden: channels that a block puts out.
        seq_len: tokens a window has.
    """
    return max(FEWEST_WINDOWS, min(-(-TOKENS_AN_OUTPUT * hidden // seq_len), GRADIENT_TOKENS // seq_len))


def visit_dense(anatomy: Anatomy, tokens: Tensor, run: Run) -> list[SiteCurves]:
    """Curves and gradients of every site, in the order of `anatomy.sites`, each only where the recipe needs them.

    The model is visited block by block, on the first windows of the draw. For gradients there and back: forwards,
    keeping what enters each block, and backwards, where each block runs once more to pass the gradient on. For curves
    forwards, with one block's moments held at a time. Where there are gradients, losses are predicted on windows that
    are held out: on those that a repair was computed from its error looks smaller than it is, the more so the more
    channels a site has for its tokens.

    Args:
        anatomy: of the dense model; left as it was.
        tokens: calibration windows, (windows, T), int64.
        run: of this phase; its journal keeps curves and gradients.
    """
    sites, gradients, curves = anatomy.sites, run.phase("gradients"), run.phase("curves")
    widest, hidden = max(s.load for s in sites), outputs_of(anatomy.blocks[sites[0].block], sites[0])
    read_back, read_once = visit_windows(widest, hidden, run.recipe.seq_len, run.recipe, sites)
    if any(site.spatial for site in sites):
        read_back = max(read_back, read_back and IMAGES)

    def first_windows(count: int, run: Run) -> _Visit:
        return _Visit(anatomy, tokens[: max(count, ranks.rank_count())], run)

    with frozen(anatomy.model), _at_hand(anatomy, run):
        if read_back:
            _read_gradients(first_windows(read_back, gradients))
        if read_once:
            _read_curves(first_windows(read_once, curves), gradients.journal)
    return [
        SiteCurves(
            energy=curves.journal.get(site.block, f"{site.path} energy"),
            loss=curves.journal.get(site.block, f"{site.path} loss"),
            order=curves.journal.get(site.block, f"{site.path} order"),
            rises=curves.journal.get(site.block, f"{site.path} rises"),
            read_gradient=partial(gradients.journal.get, site.block, site.path),
        )
        for site in sites
    ]


@contextmanager
def _at_hand(anatomy: Anatomy, run: Run) -> Iterator[None]:
    """Has all blocks on a GPU where hidden states wait there too: a visit then reads weights once, not three times."""
    device = run.clock.device
    with ExitStack() as stack:
        if device.type != "cpu" and run.recipe.hidden_device == device.type:
            with run.clock.phase("loading"):
                for block in anatomy.blocks:
                    stack.enter_context(on_device(block, device))
        yield


@dataclass(frozen=True)
class _Visit:
    """One pass of the visit: through which model, with which tokens and tools."""

    anatomy: Anatomy
    tokens: Tensor
    run: Run

    @property
    def windows(self) -> range:
        """Windows of this rank."""
        return ranks.share(len(self.tokens))

    def start(self) -> Stream:
        """The tokens before the first block."""
        return capture(self.anatomy, self.tokens, self.run)


def _read_gradients(visit: _Visit) -> None:
    """Puts F of every site into the journal, in a pass forwards that keeps what enters each block, and one back."""
    blocks, clock, journal, windows = visit.anatomy.blocks, visit.run.clock, visit.run.journal, visit.windows
    device = clock.device
    done, state = journal.last_state(windows, len(visit.tokens))
    if done == len(blocks):
        return
    stream = visit.start()
    inputs: list[Tensor] = []
    for index, block in enumerate(islice(blocks, len(blocks) - done)):
        inputs.append(stream.hidden)
        if done and index == len(blocks) - done - 1:
            break  # what comes after it has been visited
        with on_device(block, device), clock.phase("forward passes"):
            advance(block, stream.before(index))
    back_again = replace(stream)
    if done:
        kept = state["gradients"]
        back_again.hidden = stream.storage.empty(*kept.shape, dtype=kept.dtype).copy_(kept)
    else:
        with clock.phase(ONCE):
            _to_loss_gradients(visit, stream.hidden)
    for index in range(len(blocks) - done - 1, -1, -1):
        block, here = blocks[index], visit.anatomy.sites_of(index)
        sums = [empty_moments(outputs_of(block, s), block_dtype(block), device) for s in here]
        whole = {s: empty_moments(outputs_of(block, s), block_dtype(block), device) for s in here if s.spatial}
        entering = replace(stream, hidden=inputs.pop(), index=index)
        back = partial(_back, block, here, entering, back_again.hidden, device)
        with on_device(block, device), clock.phase("forward passes"):
            for at, (gradient, found) in in_batches(len(windows), stream.batch, back):
                with clock.phase("Gram matrices"):
                    sums = [s if g is None else add_moments(s, g) for s, g in zip(sums, found, strict=True)]
                    for site, g in zip(here, found, strict=True):
                        if g is not None and site in whole:
                            whole[site] = add_moments(whole[site], g.reshape(len(g), -1, g.shape[-1]).sum(1))
                back_again.put(at, gradient)
        with clock.phase("Gram matrices"):
            ranks.add_up([t for moments in (*sums, *whole.values()) for t in (moments.second, moments.first)])
            if ranks.owner(index) == ranks.rank():
                count = task_of(visit.anatomy.model.config).losses(visit.tokens)
                moments = {s.path: _per_loss(m, count, s) for s, m in zip(here, sums, strict=True)}
                moments.update({f"{s.path} whole": _per_loss(m, count, s) for s, m in whole.items()})
                journal.put(index, moments)
        journal.save_state(len(blocks) - index, {"gradients": back_again.hidden}, windows, last=index == 0)
        visit.run.on_step(f"block {index}: gradients of the dense model")
    ranks.wait()


def _to_loss_gradients(visit: _Visit, hidden: Tensor) -> None:
    """What the last block puts out, (windows, T, d), becomes the gradient of the loss there, in place."""
    model, blocks, windows = visit.anatomy.model, visit.anatomy.blocks, visit.windows
    left = list(zip(visit.tokens[windows.start : windows.stop].split(1), hidden.split(1), strict=True))

    def go_on(device: torch.device) -> None:
        with rest_on_device(model, blocks, device):
            while left:  # window by window: logits are large
                tokens, states = left[-1]
                states.copy_(loss_gradient(model, blocks, tokens.to(device), states.to(device)))
                left.pop()

    where_it_fits("logits of a window", visit.run.clock.device, go_on)


def _read_curves(visit: _Visit, gradients: Journal) -> None:
    """Puts energy and loss curves of every site into the journal, in one pass.

    Args:
        visit: of the model.
        gradients: has F of the sites, or nothing.
    """
    blocks, clock, journal, windows = visit.anatomy.blocks, visit.run.clock, visit.run.journal, visit.windows
    first, state = journal.last_state(windows, len(visit.tokens))
    if first == len(blocks):
        return
    stream = visit.start()
    if first:
        stream.go_on(state["hidden"])
    held = held_out(len(visit.tokens), one_of=HELD_OUT_OF) & visit.run.recipe.needs_gradients
    holding_out, held_here = bool(held.any()), held[windows.start : windows.stop]
    summed: dict[int, list[Sums]] = {}  # by block: those that wait for this rank to factorise them
    known: dict[int, dict[str, Tensor]] = {}  # curves of experts
    for index in range(first, len(blocks)):
        block, (here, mixtures) = blocks[index], _apart(visit.anatomy.sites_of(index))
        weights = [site_weight(block, site) for site in here]
        sums = [
            empty_sums(
                s.name, W, clock.device, stream.storage, drifting=False, holding_out=holding_out, means=s.spatial
            )
            for s, W in zip(here, weights, strict=True)
        ]
        with on_device(block, clock.device):
            arrivals = {site: Arrivals.awaited(block, site, stream) for site in mixtures}
            sums = sum_up(block, here, sums, stream.before(index), held_here, clock, arrivals)
            known[index] = {}
            for site, came in arrivals.items():
                gradient = gradients.get(index, site.path)
                if site.whole:
                    known[index].update(whole_curves(block, site, came, gradient, visit.run))
                else:
                    known[index].update(experts_curves(block, site, came, held_here, gradient, visit.run))
            with clock.phase("Gram matrices"):
                sums = [over_all_ranks(s) for s in sums]
            if ranks.owner(index) == ranks.rank():
                summed[index] = sums
            done = index + 1
            if done % ranks.rank_count() == 0 or done == len(blocks):  # a block for each rank, all at a time
                _factorise(visit, summed, gradients, known)
                journal.save_state(done, {"hidden": stream.hidden}, windows, last=done == len(blocks))
        visit.run.on_step(f"block {index}: curves of the dense model")


def _apart(sites: Sequence[Site]) -> tuple[list[Site], list[Site]]:
    """Sites whose inputs are summed as they arrive, and those of experts, whose inputs are kept until each is."""
    return [s for s in sites if s.mixture is None], [s for s in sites if s.mixture is not None]


def sum_up(
    block: nn.Module,
    sites: Sequence[Site],
    sums: list[Sums],
    stream: Stream,
    held: Tensor,
    clock: Clock,
    arrivals: Mapping[Site, Arrivals],
) -> list[Sums]:
    """Adds all windows to the sums of a block's sites, and keeps what arrives at its experts; the stream moves on to
    what the block puts out."""

    def run(at: slice) -> tuple[Tensor, list[Tensor | None]]:
        hidden: Tensor = move(stream.hidden[at], clock.device)
        output = run_block(block, hidden, stream.call)
        return output, taps.read(hidden, output)

    with tapped(block, [*sites, *arrivals]) as taps, clock.phase("forward passes"):
        for at, (output, inputs) in in_batches(len(stream.windows), stream.batch, run):
            check_finite(output, stream.index)
            with clock.phase("Gram matrices"):
                triples = zip(sums, sites, inputs, strict=True)
                sums = [add_inputs(s, site, x, None, held[at]) for s, site, x in triples]
            for site, came in arrivals.items():
                came.put(at, taps.arrived[site])
            stream.put(at, output)
    return sums


def _back(
    block: nn.Module, sites: Sequence[Site], entering: Stream, gradients: Tensor, device: torch.device, at: slice
) -> tuple[Tensor, list[Tensor | None]]:
    return gradients_at(block, sites, entering.hidden[at], entering.call, move(gradients[at], device))


def _factorise(
    visit: _Visit, summed: dict[int, list[Sums]], gradients: Journal, known: dict[int, dict[str, Tensor]]
) -> None:
    """Puts the curves of the blocks that all ranks have summed into the journal.

    Args:
        visit: of the model.
        summed: this rank's blocks; emptied.
        gradients: has F of the sites, or nothing.
        known: curves of experts, by block.
    """
    curves: dict[int, dict[str, Tensor]] = {}
    while summed:
        index, sums = summed.popitem()
        with on_device(visit.anatomy.blocks[index], visit.run.clock.device), visit.run.clock.phase("factorisation"):
            curves[index] = {**_curves(visit, index, sums, gradients), **known.pop(index)}
    if visit.run.journal.folder is None:  # on disk all ranks can read them
        curves = {index: found for others in ranks.from_all(curves) for index, found in others.items()}
    for index, found in curves.items():
        visit.run.journal.put(index, found)
    ranks.wait()


def _curves(visit: _Visit, index: int, sums: list[Sums], gradients: Journal) -> dict[str, Tensor]:
    """Curves of a block's sites as `SiteCurves` holds them, by kind of site and name; sums are used up."""
    found: dict[str, Tensor] = {}
    block, recipe = visit.anatomy.blocks[index], visit.run.recipe
    for site in reversed(_apart(visit.anatomy.sites_of(index))[0]):  # the wider one first, whose sums are then gone
        of_site = sums.pop()
        apart = Statistics(
            of_site.fitted.moments,
            held=of_site.held,
            gradient=gradients.get(index, site.path),
            whole=gradients.get(index, f"{site.path} whole"),
            means=of_site.means,
            files=of_site.files,
        )

        def curves(statistics: Statistics, site: Site = site) -> dict[str, Tensor]:
            factored = factor_site(block, site, statistics, recipe, visit.run.clock)[0]
            return site_curves(site, factored, statistics)

        found.update(with_algebra(site.name, apart, curves))
    return found


def site_curves(site: Site, factored: FactoredSite, statistics: Statistics) -> dict[str, Tensor]:
    """What `SiteCurves` holds of a site, by kind of site and name."""
    loss = factored.loss_curve(statistics)
    found = {f"{site.path} energy": factored.energies().cpu()}
    if loss is not None:
        found[f"{site.path} loss"] = loss[:: site.unit_size].cpu()
    if site.kind == "stream":
        errors = factored.errors() if loss is None else loss
        found[f"{site.path} order"] = factored.unit_order.cpu()
        found[f"{site.path} rises"] = -errors[:: site.unit_size].diff().cpu()
    return found


def _per_loss(moments: Moments, losses: int, site: Site) -> Tensor:
    """Second moment F of a site's gradient, on the CPU, from sums over what so many losses are of."""
    if not torch.isfinite(moments.first).all():
        raise SnpError(f"{site.name}: the loss gradient holds NaN or Inf; expected finite. Try --dtype float32.")
    return (gram_matrix(moments, centred=False) / losses).float().cpu()
