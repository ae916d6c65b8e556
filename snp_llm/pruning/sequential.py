"""The sequential loop: statistics, ordering, reconstruction, surgery, block after block. Chooses no widths."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snp_llm.checkpoint.journal import Journal
from snp_llm.linalg.units import unit_channels
from snp_llm.models.anatomy import Projection, Site, linear, weight_of
from snp_llm.models.blocks import fixed_output, input_of, move, on_device, output_of, run_block, with_first_tensor
from snp_llm.models.families.family import Family
from snp_llm.models.offload import copy_unhooked, leave_on_disk
from snp_llm.models.surgery import prune_site
from snp_llm.pruning.cut import cut
from snp_llm.pruning.reference import Targets, adds_to_stream, block_targets
from snp_llm.pruning.result import Curve, SiteResult
from snp_llm.pruning.sensitivity import OnStep
from snp_llm.pruning.statistics import (
    Sums,
    add_batch,
    empty_sums,
    enough_windows,
    for_algebra,
    held_out,
    over_all_ranks,
)
from snp_llm.pruning.stream import Stream, check_finite, in_batches
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.device import Clock

# Gradient of a site by its number, read when its turn comes.
Gradients = Callable[[int], Tensor | None]


def prune_blocks(
    blocks: nn.ModuleList,
    family: Family,
    sites: Sequence[Site],
    stream: Stream,
    widths: Sequence[int],
    gradients: Gradients,
    recipe: Recipe,
    clock: Clock,
    journal: Journal,
    on_step: OnStep,
) -> tuple[nn.ModuleList, list[SiteResult]]:
    """Pruned copies of all blocks; each is calibrated on what the pruned blocks before it put out.

    Args:
        blocks: dense, to be cut; left as they are.
        family: theirs.
        sites: attention and FFN of every block.
        stream: the calibration tokens before the first block; used up.
        widths: units to keep at every site.
        gradients: F of every site, or None.
        recipe: all settings, resolved.
        clock: of the compute device.
        journal: keeps finished blocks, and knows those that an interrupted run has finished.
        on_step: called with a line a site.
    """
    residual: bool | None = None if recipe.target == "residual" else False  # not known before a block is looked at
    dense = stream
    if recipe.target != "self":
        dense = stream.first(enough_windows(max(site.channels for site in sites), stream.hidden.shape[1]))
    first, state = journal.last_state(stream.windows, stream.total)
    if state:
        stream.hidden.copy_(state["hidden"])
        if dense is not stream:
            dense.hidden.copy_(state["dense"])
        residual = bool(state["residual"]) if "residual" in state else residual
    pruned_blocks: list[nn.Module] = []
    results: list[SiteResult] = []
    for index in range(first):
        here = slice(2 * index, 2 * index + 2)
        found = [_result(site, facts) for site, facts in zip(sites[here], journal.facts(index), strict=True)]
        pruned_blocks.append(finished_block(blocks[index], family, found, journal.file(index)))
        results += found
    for index in range(first, len(blocks)):
        dense_block = blocks[index]
        here = slice(2 * index, 2 * index + 2)
        # So far the streams are the same: before the block, and after it.
        entered, untouched = (
            all(w == s.units for s, w in zip(sites[:end], widths, strict=False)) for end in (here.start, here.stop)
        )
        home = next(dense_block.parameters()).device
        with on_device(dense_block, clock.device):
            targets = None
            if recipe.target != "self" and not untouched:
                with clock.phase("forward passes"):
                    if residual is None:
                        residual = adds_to_stream(dense_block, family, index, dense)
                    targets = block_targets(dense_block, family, index, dense, residual=residual, device=clock.device)
                if entered:
                    targets = replace(targets, attention=None)
            block = copy_unhooked(dense_block)
            found = prune_block(
                block, family, sites[here], stream, widths[here], gradients, targets, recipe, clock, on_step
            )
        if recipe.target != "self" and targets is None:
            dense.hidden.copy_(stream.hidden[: len(dense.hidden)])
        results += found
        with clock.phase("saving"):
            block = block.to("cpu" if home.type == "meta" else home)
            pruned_blocks.append(keep_block(block, found, index, journal))
            state = {"hidden": stream.hidden}
            if residual is not None:
                state["residual"] = torch.tensor(residual)
            if dense is not stream:
                state["dense"] = dense.hidden
            journal.save_state(index + 1, state, stream.windows, last=index == len(blocks) - 1)
    return nn.ModuleList(pruned_blocks), results


def prune_block(
    block: nn.Module,
    family: Family,
    sites: Sequence[Site],
    stream: Stream,
    widths: Sequence[int],
    gradients: Gradients,
    targets: Targets | None,
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> list[SiteResult]:
    """Cuts a block's attention, then its FFN, in place, and the stream moves on to what the block then puts out.

    A block costs little more than one forward pass: attention's inputs to the out-projection are computed once and
    kept, so that after its cut only the out-projection has to run, and the FFN sees exactly what the pruned block will
    give it. Of a dense out-projection no output is computed: what that lacks is known from the sums.
    """
    attention_site, ffn_site = sites
    index, device, attention = attention_site.block, clock.device, block.get_submodule(family.attention)
    attention_out, ffn_out = linear(block, family.attention_out), linear(block, family.ffn_out)
    hidden, call, windows = stream.hidden, stream.calls[index], len(stream.windows)
    targeted = stream.total if targets is None else targets.windows  # the first of all windows
    held = held_out(targeted)[stream.windows.start : stream.windows.stop]
    held = nn.functional.pad(held, (0, windows - len(held)))

    def new_sums(site: Site, out: Projection, *, drifting: bool) -> Sums:
        return empty_sums(
            site.name,
            out,
            device,
            stream.shelf,
            drifting=drifting,
            holding_out=recipe.holds_out,
            some_untargeted=drifting and targeted < stream.total,
        )

    def cut_site(site: Site, sums: Sums, width: int, start: float) -> SiteResult:
        with clock.phase("Gram matrices"):
            sums = over_all_ranks(sums)

        def cut_here() -> SiteResult:
            with clock.phase("Gram matrices"):
                gradient = gradients(2 * index + (site is ffn_site))
                statistics = sums.statistics(linear(block, site.out_projection), gradient)
                statistics = for_algebra(site.name, statistics)
            return cut(block, family, site, statistics, width, recipe, clock, start)

        result = cut_on_one_rank(block, family, site, cut_here)
        on_step(str(result))
        return result

    contexts = stream.shelf.empty(windows, hidden.shape[1], weight_of(attention_out).shape[1], dtype=hidden.dtype)
    attended = stream.like_hidden()

    def to_attention_out(at: slice) -> Tensor:
        return input_of(attention_out, block, hidden[at], call)

    def attention_sums() -> Sums:
        drifting = targets is not None and targets.attention is not None
        sums = new_sums(attention_site, attention_out, drifting=drifting)
        for at, context in in_batches(windows, stream.batch, to_attention_out):
            target = targets.of_attention(at, hidden, device) if targets is not None else None
            with clock.phase("Gram matrices"):
                sums = add_batch(sums, context, target, held[at])
            contexts[at] = context
        return sums  # and nothing of the last batch: its memory goes to the algebra

    start = time.perf_counter()
    with clock.phase("forward passes"), torch.no_grad():
        _, returned = next(in_batches(1, stream.batch, lambda at: output_of(attention, block, hidden[at], call)))
        form = with_first_tensor(returned, hidden.new_empty(0))  # a tensor, or what else there is beside it
        del returned
        sums = attention_sums()
    attention_result = cut_site(attention_site, sums, widths[0], start)

    start = time.perf_counter()
    channels = unit_channels(attention_result.kept, attention_site.unit_size).to(device)
    pruned_out = linear(block, family.attention_out)

    def to_ffn_out(at: slice) -> tuple[Tensor, Tensor]:
        output = pruned_out(contexts[at].to(device)[..., channels])
        with fixed_output(attention, with_first_tensor(form, output)):
            return output, input_of(ffn_out, block, hidden[at], call)

    def ffn_sums() -> Sums:
        sums = new_sums(ffn_site, ffn_out, drifting=targets is not None)
        for at, (output, inputs) in in_batches(windows, stream.batch, to_ffn_out):
            attended[at] = output
            target = None if targets is None else targets.of_ffn(at, hidden, output)
            with clock.phase("Gram matrices"):
                sums = add_batch(sums, inputs, target, held[at])
        return sums

    with clock.phase("forward passes"), torch.no_grad():
        sums = ffn_sums()
    ffn_result = cut_site(ffn_site, sums, widths[1], start)

    def run_ffn(at: slice) -> Tensor:
        with fixed_output(attention, move(with_first_tensor(form, attended[at]), device)):
            return run_block(block, hidden[at], call)

    with clock.phase("forward passes"):
        for at, output in in_batches(windows, stream.batch, run_ffn):
            check_finite(output, index)
            hidden[at] = output
    return [attention_result, ffn_result]


def cut_on_one_rank(block: nn.Module, family: Family, site: Site, cut_here: Callable[[], SiteResult]) -> SiteResult:
    """Cuts a site on the rank whose block it is; the others take over its result, so that all have the same bits."""

    def here() -> tuple[SiteResult, Tensor, Tensor | None]:
        result = cut_here()
        out = linear(block, site.out_projection)
        return result, weight_of(out), None if out.bias is None else out.bias.detach()

    owner = ranks.owner(site.block)
    result, weight, bias = ranks.from_rank(owner, here)
    if ranks.rank() != owner:
        prune_site(block, family, site, result.kept, weight, bias)
    return result


def keep_block(block: nn.Module, results: Sequence[SiteResult], index: int, journal: Journal) -> nn.Module:
    """The pruned block, which waits on disk from now on where the journal is there."""
    if journal.folder is None:
        return block
    if ranks.rank() == 0:
        journal.put(index, dict(block.state_dict()), [_facts(result) for result in results])
    leave_on_disk(block, journal.file(index))
    return block


def finished_block(block: nn.Module, family: Family, results: Sequence[SiteResult], file: Path) -> nn.Module:
    """A block that an interrupted run has finished. What was done to it is done again, to tensors that are not there.

    Args:
        block: as it was before the cut; left as it is.
        family: its family.
        results: what happened at its sites.
        file: that its tensors are in.
    """
    pruned = copy_unhooked(block)
    for result in results:
        site, out = result.site, linear(pruned, result.site.out_projection)
        weight = weight_of(out)[:, unit_channels(result.kept, site.unit_size).to(out.weight.device)]
        prune_site(pruned, family, site, result.kept, weight, out.bias)
    leave_on_disk(pruned, file)
    return pruned


def _facts(result: SiteResult) -> dict[str, Any]:
    facts = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "site"}
    return {**facts, "kept": result.kept.tolist(), "curve": result.curve and asdict(result.curve)}


def _result(site: Site, facts: dict[str, Any]) -> SiteResult:
    kept, curve = torch.tensor(facts["kept"], dtype=torch.int64), facts["curve"]
    return SiteResult(site=site, **{**facts, "kept": kept, "curve": curve and Curve(**curve)})
