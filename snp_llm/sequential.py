"""The sequential loop: statistics, ordering, reconstruction, surgery, block after block. Chooses no widths."""

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from snp_llm.device import Clock
from snp_llm.linalg.units import unit_channels
from snp_llm.models.blocks import (
    BlockCall,
    first_tensor,
    fixed_output,
    input_of,
    move,
    on_device,
    with_first_tensor,
)
from snp_llm.models.families import Family, Site, linear
from snp_llm.recipe import Recipe
from snp_llm.site import SiteResult, cut
from snp_llm.stream import Stream, advance, attention_passes
from snp_llm.sums import add_batch, empty_sums, held_out
from snp_llm.targets import Targets, block_targets
from snp_llm.visit import OnStep


def prune_blocks(
    blocks: nn.ModuleList,
    reference: nn.ModuleList,
    family: Family,
    sites: Sequence[Site],
    stream: Stream,
    widths: Sequence[int],
    gradients: Sequence[Tensor | None],
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> tuple[nn.ModuleList, list[SiteResult]]:
    """Pruned copies of all blocks; each is calibrated on what the pruned blocks before it put out.

    Args:
        blocks: to be cut; left as they are.
        reference: dense blocks, whose outputs are what sites are repaired to give; mostly the same.
        family: theirs.
        sites: attention and FFN of every block.
        stream: the calibration tokens before the first block.
        widths: units to keep at every site.
        gradients: F of every site, or None.
        recipe: all settings, resolved.
        clock: of the compute device.
        on_step: called with a line a site.
    """
    hidden, dense_hidden = list(stream.hidden), list(stream.hidden)
    pruned_blocks, results = [], []
    residual = recipe.target == "residual"
    for index, (old_block, dense_block) in enumerate(zip(blocks, reference, strict=True)):
        calls = [batch[index] for batch in stream.calls]
        targets = None
        uncut = all(w == s.units for s, w in zip(sites[: 2 * index + 2], widths, strict=False))
        untouched = uncut and old_block is dense_block  # so far the streams are the same
        if recipe.target != "self" and not untouched:
            with on_device(dense_block, clock.device), clock.phase("calibration"):
                targets = block_targets(
                    dense_block, family, dense_hidden, calls, residual=residual, device=clock.device
                )
            dense_hidden, residual = targets.hidden, targets.stream_scale is not None
        block = copy.deepcopy(old_block)
        with on_device(block, clock.device):
            found = prune_block(
                block,
                family,
                sites[2 * index : 2 * index + 2],
                hidden,
                calls,
                widths[2 * index : 2 * index + 2],
                gradients[2 * index : 2 * index + 2],
                targets,
                recipe,
                clock,
                on_step,
            )
        if targets is None:
            dense_hidden = list(hidden)
        pruned_blocks.append(block)
        results += found
    return nn.ModuleList(pruned_blocks), results


def prune_block(
    block: nn.Module,
    family: Family,
    sites: Sequence[Site],
    hidden: list[Tensor],
    calls: Sequence[BlockCall],
    widths: Sequence[int],
    gradients: Sequence[Tensor | None],
    targets: Targets | None,
    recipe: Recipe,
    clock: Clock,
    on_step: OnStep,
) -> list[SiteResult]:
    """Cuts a block's attention, then its FFN, in place, and replaces `hidden` by what the block then puts out.

    A block costs one forward pass and a third: attention's inputs to the out-projection are computed once and kept, so
    that after its cut only the out-projection runs again, and the FFN sees exactly what the pruned block will give it.
    """
    attention_site, ffn_site = sites
    device, attention = clock.device, block.get_submodule(family.attention)
    attention_out, ffn_out = linear(block, family.attention_out), linear(block, family.ffn_out)

    start = time.perf_counter()
    contexts, attended = [], []
    with clock.phase("calibration"), torch.no_grad():
        sums = empty_sums(attention_out, device, drifting=targets is not None, holding_out=recipe.holds_out)
        for b, (context, returned) in enumerate(attention_passes(block, family, hidden, calls)):
            home = hidden[b].device
            lacking = None
            if targets is not None:
                lacking = targets.lacking_attention(b, first_tensor(returned), hidden[b].to(device))
            sums = add_batch(sums, context, lacking, held_out(hidden, b))
            contexts.append(context.to(home))
            attended.append(with_first_tensor(returned, first_tensor(returned).to(home)))
    statistics = sums.statistics(gradients[0])
    attention_result = cut(block, family, attention_site, statistics, widths[0], recipe, clock, start)
    on_step(str(attention_result))

    start = time.perf_counter()
    channels = unit_channels(attention_result.kept, attention_site.unit_size).to(device)
    attention_out = linear(block, family.attention_out)
    with clock.phase("calibration"), torch.no_grad():
        sums = empty_sums(ffn_out, device, drifting=targets is not None, holding_out=recipe.holds_out)
        for b, batch in enumerate(hidden):
            output = attention_out(contexts[b].to(device)[..., channels])
            contexts[b] = batch.new_empty(0)  # not needed again
            attended[b] = with_first_tensor(attended[b], output.to(batch.device))
            with fixed_output(attention, move(attended[b], device)):
                inputs = input_of(ffn_out, block, batch, calls[b])
            lacking = None
            if targets is not None:
                lacking = targets.lacking_ffn(b, ffn_out(inputs).reshape(output.shape), batch.to(device), output)
            sums = add_batch(sums, inputs, lacking, held_out(hidden, b))
    statistics = sums.statistics(gradients[1])
    ffn_result = cut(block, family, ffn_site, statistics, widths[1], recipe, clock, start)
    on_step(str(ffn_result))

    with clock.phase("calibration"):
        for b, batch in enumerate(hidden):
            with fixed_output(attention, move(attended[b], device)):
                hidden[b] = advance(block, ffn_site.block, batch, calls[b])
    return [attention_result, ffn_result]
