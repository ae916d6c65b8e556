"""The loss's gradients at every site of the dense model: a pass forwards that keeps what enters each block, and one
back."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from snp_llm.linalg.gram import Moments, add_moments, empty_moments, gram_matrix
from snp_llm.models.blocks import loss_gradient
from snp_llm.models.calls import move
from snp_llm.models.offload import on_device, rest_on_device
from snp_llm.models.site import Site, block_dtype, outputs_of
from snp_llm.models.task import task_of
from snp_llm.pruning.stream import Stream, Visit, advance
from snp_llm.pruning.taps import gradients_at
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.device import ONCE, where_it_fits
from snp_llm.runtime.errors import SnpError


def read_gradients(visit: Visit) -> None:
    """Puts F of every site into the journal, in a pass forwards that keeps what enters each block, and one back."""
    blocks, clock, journal, windows = visit.anatomy.blocks, visit.run.clock, visit.run.journal, visit.windows
    device = clock.device
    done, state = journal.last_state(windows, len(visit.tokens))
    visit.run.signs.skip(done)
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
        visit.run.signs.step(f"block {index}: gradients of the dense model")
    ranks.wait()


def _to_loss_gradients(visit: Visit, hidden: Tensor) -> None:
    """What the last block puts out, (windows, T, d), becomes the gradient of the loss there, in place."""
    model, blocks, windows = visit.anatomy.model, visit.anatomy.blocks, visit.windows
    left = list(zip(visit.tokens[windows.start : windows.stop].split(1), hidden.split(1), strict=True))

    def go_on(device: torch.device) -> None:
        with rest_on_device(model, blocks, device):
            while left:  # window by window: logits are large
                tokens, states = left[-1]
                states.copy_(loss_gradient(model, blocks, tokens.to(device), states.to(device), visit.run.loss))
                left.pop()

    where_it_fits("logits of a window", visit.run.clock.device, go_on)


def _back(
    block: nn.Module, sites: Sequence[Site], entering: Stream, gradients: Tensor, device: torch.device, at: slice
) -> tuple[Tensor, list[Tensor | None]]:
    return gradients_at(block, sites, entering.hidden[at], entering.call, move(gradients[at], device))


def _per_loss(moments: Moments, losses: int, site: Site) -> Tensor:
    """Second moment F of a site's gradient, on the CPU, from sums over what so many losses are of."""
    if not torch.isfinite(moments.first).all():
        raise SnpError(f"{site.name}: the loss gradient holds NaN or Inf; expected finite. Try --dtype float32.")
    return (gram_matrix(moments, centred=False) / losses).float().cpu()
