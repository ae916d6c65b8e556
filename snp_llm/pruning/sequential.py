"""The sequential loop: stage after stage of block after block is gathered, cut and fixed. Chooses no widths."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from snp_llm.models.anatomy import Anatomy, by_now
from snp_llm.models.blocks import arrived_at, run_block
from snp_llm.models.calls import move
from snp_llm.models.experts import Arrived, find_experts
from snp_llm.models.offload import copy_unhooked, on_device
from snp_llm.models.site import Site, site_weight
from snp_llm.models.surgery import NoBlock
from snp_llm.pruning.cut import cut_site
from snp_llm.pruning.experts import Arrivals, cut_experts, uncut_experts
from snp_llm.pruning.finished import facts_of, finished_block, keep_block, result_of
from snp_llm.pruning.fixed import FixedSite, fix, fixing, returned_form
from snp_llm.pruning.norms import estimate, norms_left, norms_of
from snp_llm.pruning.reference import DenseStream, Reference
from snp_llm.pruning.refine import gains_nothing, refine_block
from snp_llm.pruning.result import SiteResult, nothing_left
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import Sums, add_inputs, empty_sums, give_way, held_out, over_all_ranks
from snp_llm.pruning.stream import Stream, check_finite
from snp_llm.pruning.taps import inputs_at
from snp_llm.pruning.whole_experts import cut_whole
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.storage import store

# Gradient of a site by its number, read when its turn comes.
Gradients = Callable[[int], Tensor | None]


def prune_blocks(
    anatomy: Anatomy, stream: Stream, widths: Sequence[int], gradients: Gradients, run: Run
) -> tuple[nn.ModuleList, list[SiteResult]]:
    """Pruned copies of all blocks; each is calibrated on what the pruned blocks before it put out.

    Args:
        anatomy: of the dense model; left as it was.
        stream: the calibration tokens before the first block; used up.
        widths: units to keep at every site.
        gradients: F of every site, or None.
        run: of this phase; its journal keeps finished blocks, and knows those that an interrupted run has finished.
    """
    clock, journal, blocks = run.clock, run.journal, anatomy.blocks
    dense = DenseStream.beside(stream, anatomy, run)
    first, state = journal.last_state(stream.windows, stream.total)
    run.signs.skip(first * steps_a_block(run.recipe))
    if state:
        stream.go_on(state["hidden"])
        dense.go_on(state)
    pruned_blocks: list[nn.Module] = []
    results: list[SiteResult] = []
    for index in range(first):
        pairs = zip(anatomy.sites_of(index), journal.facts(index), strict=True)
        found = [result_of(site, facts) for site, facts in pairs]
        pruned_blocks.append(finished_block(blocks[index], found, journal.file(index)))
        results += found
    for index in range(first, len(blocks)):
        home = next(blocks[index].parameters()).device
        with on_device(blocks[index], clock.device):
            reference = dense.reference(index, widths)
            if reference is not None and gains_nothing([result.refinement for result in results]):
                reference = replace(reference, behind=None)
            before, copied = stream.before(index), copy_unhooked(blocks[index])
            block, found = prune_block(Cutting(copied, anatomy, before, widths, gradients, reference, run))
        if reference is None or not dense.referred:
            dense.follow(stream)
        results += found
        with clock.phase("saving"):
            block = block.to("cpu" if home.type == "meta" else home)
            pruned_blocks.append(keep_block(block, index, journal, [facts_of(result) for result in found]))
            state = {"hidden": stream.hidden, **dense.state()}
            journal.save_state(index + 1, state, stream.windows, last=index == len(blocks) - 1)
    return nn.ModuleList(pruned_blocks), results


def steps_a_block(recipe: Recipe) -> int:
    """How often a block is spoken of: once for each of its sites, and once more where it is refined."""
    return 2 + bool(recipe.refine_steps)


@dataclass(frozen=True)
class Cutting:
    """A block that is being cut.

    Attributes:
        block: a copy of the dense one, changed in place.
        anatomy: of the dense model.
        stream: what arrives at the block.
        widths: units to keep at every site of the model.
        gradients: F of every site, or None.
        reference: what the block is to put out, or None.
        run: of this phase.
        fixed: sites that have been cut, in stages that others come after.
    """

    block: nn.Module
    anatomy: Anatomy
    stream: Stream
    widths: Sequence[int]
    gradients: Gradients
    reference: Reference | None
    run: Run
    fixed: list[FixedSite] = field(default_factory=list)

    def width(self, site: Site) -> int:
        """Units that a site keeps."""
        return self.widths[self.anatomy.sites.index(site)]

    def gradient(self, site: Site) -> Tensor | None:
        """F of a site, or None."""
        return self.gradients(self.anatomy.sites.index(site))

    def goes_on(self, stage: Sequence[Site]) -> bool:
        """Whether a later stage reads what the sites of this one put out."""
        sites = self.anatomy.sites_of(self.stream.index)
        return any(not later.nested for later in sites if later.stage > stage[0].stage)


def prune_block(cutting: Cutting) -> tuple[nn.Module, list[SiteResult]]:
    """The block with its sites cut, stage after stage; the stream moves on to what it then puts out.

    A block costs little more than one forward pass: the inputs of an out-projection are computed once and kept, so that
    after its cut only the out-projection has to run, and the next stage sees exactly what the pruned block will give
    it. Of a dense out-projection no output is computed: what that lacks is known from the sums.
    """
    block, stream, run = cutting.block, cutting.stream, cutting.run
    results: list[SiteResult] = []
    mixed: list[SiteResult] = []
    for stage in cutting.anatomy.stages(stream.index):
        if stage[0].whole_block:
            (whole,) = stage
            width = cutting.width(whole)
            if not width:
                return NoBlock(), [nothing_left(site) for site in cutting.anatomy.sites_of(stream.index)]
            results.append(SiteResult(whole, torch.arange(width), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
            continue
        for result in cut_stage(cutting, stage):
            (results if result.site.mixture is None else mixed).append(result)
    if run.recipe.norm_statistics == "pass":
        with run.clock.phase("forward passes"):
            estimate(block, norms_of(block), stream)

    if run.recipe.refine_steps:
        results = refine(cutting, results)
        if results and (results[-1].refinement or 1) < 1:
            cutting.fixed.clear()  # what they put out is no longer what the block does

    def run_on(at: slice) -> Tensor:
        with fixing(cutting.fixed, at, run.clock.device):
            return run_block(block, stream.hidden[at], stream.call)

    with run.clock.phase("forward passes"):
        for at, output in in_batches(len(stream.windows), stream.batch, run_on):
            check_finite(output, stream.index)
            stream.put(at, output)
    return block, results + mixed


def cut_stage(cutting: Cutting, stage: Sequence[Site]) -> list[SiteResult]:
    """Cuts the sites of a stage, which see the same stream: first those of experts."""
    block, stream, fixed, run = cutting.block, cutting.stream, cutting.fixed, cutting.run
    start = time.perf_counter()
    keep = cutting.goes_on(stage)
    mixtures = [site for site in stage if site.mixture is not None]
    plain = [site for site in stage if site.mixture is None]
    with run.clock.phase("forward passes"), torch.no_grad():
        forms = [returned_form(block, site, stream, fixed) if keep and site.module else None for site in plain]
        sums, inputs = gather(cutting, plain, keep=keep) if plain else ([], [])
        going = [site for site in mixtures if cutting.width(site) < site.units]
        arrivals = {site: gather_arrivals(cutting, site) for site in going}
    for earlier in fixed:
        earlier.inputs = None if plain or arrivals else earlier.inputs
    results = []

    def done(result: SiteResult, site: Site) -> None:
        results.append(replace(result, site=site, seconds=time.perf_counter() - start))
        run.signs.step(str(results[-1]))

    for site in mixtures:
        done(cut_mixture(cutting, site, arrivals.pop(site, None)), site)
    for site in plain:
        with run.clock.phase("Gram matrices"):
            summed = over_all_ranks(sums.pop(0))
        done(cut_site(block, site, summed, cutting.width(site), partial(cutting.gradient, site), run), site)
        form, seen = forms.pop(0), inputs.pop(0)
        if seen is not None:
            fixed.append(fix(block, results[-1], form, seen, stream))
    with run.clock.phase("forward passes"):
        estimate(block, norms_left(results[len(mixtures) :]), stream)
    return results


def cut_mixture(cutting: Cutting, site: Site, arrivals: Arrivals | None) -> SiteResult:
    """Cuts a site of experts by what arrives there; None: nothing of it goes."""
    if arrivals is None:
        return uncut_experts(site)
    block, windows = cutting.block, cutting.stream.windows
    held = held_out(cutting.stream.total)[windows.start : windows.stop]
    width, gradient = cutting.width(site), cutting.gradient(site)
    given = (block, by_now(block, site), arrivals, held, width, gradient, cutting.run)
    return cut_whole(*given, partial(gather_arrivals, cutting)) if site.whole else cut_experts(*given)


def refine(cutting: Cutting, results: list[SiteResult]) -> list[SiteResult]:
    """Refines a block after its last cut, where there is something to refine it towards; the last of its results says
    how much that gained."""
    stream, run = cutting.stream, cutting.run
    behind = None if cutting.reference is None else cutting.reference.behind
    if behind is None:
        run.signs.step(f"block {stream.index}: not refined")
        return results
    with run.clock.phase("refinement"):
        gain = refine_block(cutting.block, stream, behind, run)
    run.signs.step(f"block {stream.index}: refined, error {gain:.3f} of what it was")
    return [*results[:-1], *(replace(last, refinement=gain) for last in results[-1:])]  # some blocks have no site


def gather(cutting: Cutting, stage: Sequence[Site], *, keep: bool) -> tuple[list[Sums], list[Tensor | None]]:
    """Sums over the inputs of a stage's consumers, in one pass; with `keep` also the inputs, of sites to be fixed."""
    block, stream, fixed, run = cutting.block, cutting.stream, cutting.fixed, cutting.run
    reference = cutting.reference
    device, windows = run.clock.device, len(stream.windows)
    weights = [site_weight(block, site) for site in stage]
    referred = stream.total if reference is None else reference.windows  # the first of all windows
    held = held_out(referred)[stream.windows.start : stream.windows.stop]
    held = nn.functional.pad(held, (0, windows - len(held)))
    sums = []
    for site, W in zip(stage, weights, strict=True):
        drifting = reference is not None and site in reference.outputs
        missing = drifting and referred < stream.total
        options = {"drifting": drifting, "holding_out": run.recipe.holds_out, "some_unreferred": missing}
        sums.append(empty_sums(site.name, W, device, stream.storage, **options))
    shape = (windows, stream.hidden.shape[1])
    kept = [
        stream.storage.empty(*shape, site.channels, dtype=stream.hidden.dtype) if keep and site.module else None
        for site in stage
    ]

    def to_consumers(at: slice) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
        hidden: Tensor = move(stream.hidden[at], device)
        with fixing(fixed, at, device) as before:
            return hidden, before, inputs_at(block, stage, hidden, stream.call)

    for at, (hidden, before, inputs) in in_batches(windows, stream.batch, to_consumers, partial(give_way, sums)):
        for number, (site, given) in enumerate(zip(stage, inputs, strict=True)):
            wanted = None if reference is None else reference.of(site, at, hidden, before)
            with run.clock.phase("Gram matrices"):
                sums[number] = add_inputs(sums[number], site, given, wanted, held[at])
            whole = kept[number]
            if whole is not None and given is not None:
                store(whole, at, given)
            del given, wanted
        del hidden, before, inputs  # before those of the next windows are made
    return sums, kept  # and nothing of the last batch: its memory goes to the algebra


def gather_arrivals(cutting: Cutting, site: Site) -> Arrivals:
    """What arrives at a site of experts, in one pass."""
    block, stream, device = cutting.block, cutting.stream, cutting.run.clock.device
    mixture = find_experts(block)  # as many as there are now
    assert mixture is not None
    arrivals = Arrivals.awaited(block, site, stream)

    def to_experts(at: slice) -> Arrived:
        hidden: Tensor = move(stream.hidden[at], device)
        with fixing(cutting.fixed, at, device):
            return arrived_at(mixture, block, hidden, stream.call)

    for at, came in in_batches(len(stream.windows), stream.batch, to_experts):
        arrivals.put(at, came)
    return arrivals
