"""What the widths of every site of the dense model would cost, in one pass. Chooses nothing."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.blocks import run_block
from snp_llm.models.calls import move
from snp_llm.models.offload import on_device
from snp_llm.models.site import Site, site_weight
from snp_llm.pruning.algebra import with_algebra
from snp_llm.pruning.experts import Arrivals, experts_curves
from snp_llm.pruning.factor import FactoredSite, factor_site
from snp_llm.pruning.measured import measures, tried_cuts
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import Statistics, Sums, add_inputs, empty_sums, give_way, held_out, over_all_ranks
from snp_llm.pruning.stream import Stream, Visit, check_finite
from snp_llm.pruning.taps import tapped
from snp_llm.pruning.whole_experts import whole_curves
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.device import Clock

HELD_OUT_OF = 4  # one window of so many is held out


def read_curves(visit: Visit, gradients: Journal) -> None:
    """Puts energy and loss curves of every site into the journal, in one pass.

    Args:
        visit: of the model.
        gradients: has F of the sites, or nothing.
    """
    blocks, clock, journal, windows = visit.anatomy.blocks, visit.run.clock, visit.run.journal, visit.windows
    first, state = journal.last_state(windows, len(visit.tokens))
    visit.run.signs.skip(first)
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
        with on_device(block, clock.device):
            weights = [site_weight(block, site) for site in here]
            sums = [
                empty_sums(
                    s.name, W, clock.device, stream.storage, drifting=False, holding_out=holding_out, means=s.spatial
                )
                for s, W in zip(here, weights, strict=True)
            ]
            arrivals = {site: Arrivals.awaited(block, site, stream) for site in mixtures[:1]}  # at all of its experts
            sums = sum_up(block, here, sums, stream.before(index), held_here, clock, arrivals)
            known[index] = {}
            for came in arrivals.values():
                known[index] = curves_of_experts(block, mixtures, came, held_here, gradients, visit.run)
            with clock.phase("Gram matrices"):
                sums = [over_all_ranks(s) for s in sums]
            if ranks.owner(index) == ranks.rank():
                summed[index] = sums
            done = index + 1
            if done % ranks.rank_count() == 0 or done == len(blocks):  # a block for each rank, all at a time
                _factorise(visit, summed, gradients, known)
                journal.save_state(done, {"hidden": stream.hidden}, windows, last=done == len(blocks))
        visit.run.signs.step(f"block {index}: curves of the dense model")


def curves_of_experts(
    block: nn.Module, sites: Sequence[Site], came: Arrivals, held: Tensor, gradients: Journal, run: Run
) -> dict[str, Tensor]:
    """Curves of a block's sites of experts, those of whole ones first, from what arrives at them."""
    found: dict[str, Tensor] = {}
    for site in sites:
        gradient = gradients.get(site.block, site.path)
        if site.whole:
            found |= whole_curves(block, site, came, gradient, run)
        else:
            order = found.get(f"{site.mixture.module} order") if site.mixture is not None else None
            found |= experts_curves(block, site, came, held, gradient, run, order)
    return found


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
        for at, (output, inputs) in in_batches(len(stream.windows), stream.batch, run, partial(give_way, sums)):
            check_finite(output, stream.index)
            with clock.phase("Gram matrices"):
                triples = zip(sums, sites, inputs, strict=True)
                sums[:] = [add_inputs(s, site, x, None, held[at]) for s, site, x in triples]
            for site, came in arrivals.items():
                came.put(at, taps.arrived[site])
            stream.put(at, output)
            del output, inputs, triples  # before those of the next windows are made
    return sums


def _factorise(
    visit: Visit, summed: dict[int, list[Sums]], gradients: Journal, known: dict[int, dict[str, Tensor]]
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


def _curves(visit: Visit, index: int, sums: list[Sums], gradients: Journal) -> dict[str, Tensor]:
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
            tried = tried_cuts(block, site, factored, recipe) if measures(visit.anatomy, recipe) else {}
            return site_curves(site, factored, statistics) | tried

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
