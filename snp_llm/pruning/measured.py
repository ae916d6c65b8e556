"""Cuts of one site each, tried on the dense model: how far they take its predictions, and what that says of widths.

A predicted loss is a quadratic model of one layer's error. What later blocks make of that error it does not know: by
how much it is off differs from site to site, and a cut or two that are measured tell.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from snp_llm.checkpoint.journal import Journal
from snp_llm.linalg.least_squares import absorb_mean
from snp_llm.models.anatomy import Anatomy
from snp_llm.models.blocks import logits_of, run_block
from snp_llm.models.offload import copy_unhooked, on_device, rest_on_device
from snp_llm.models.segments import Segments
from snp_llm.models.site import Site, block_dtype, site_bias
from snp_llm.models.surgery import prune_site
from snp_llm.models.task import TEXT, task_of
from snp_llm.pruning.factor import FactoredSite
from snp_llm.pruning.statistics import held_out
from snp_llm.pruning.stream import Stream, Visit, advance, capture
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.device import ONCE, where_it_fits
from snp_llm.runtime.storage import store

TOKENS = 1024  # at least, that divergences are means over

TRUST = 0.5  # of the way, in logarithms, from the median factor to a site's: other texts ask for more than one shows

FARTHEST = 10.0  # times the median that a correction may be, or a tenth: the least of losses are lost in rounding


def measures(anatomy: Anatomy, recipe: Recipe) -> bool:
    """Whether cuts are measured: of models of texts all whose units belong to one block, and to no expert of several.

    Losses of sites are compared with each other, so that all are corrected or none.
    """
    plain = all(site.mixture is None and site.shared is None for site in anatomy.sites)
    text = task_of(anatomy.model.config) is TEXT and not isinstance(anatomy.blocks, Segments)
    return bool(recipe.measured_cuts and recipe.allocation == "loss" and plain and text)


def measured_windows(tokens: Tensor, *, one_of: int) -> Tensor:
    """The first of the windows that are held out, of which one is in so many, (w, T); the first of all of none is."""
    held = held_out(len(tokens), one_of=one_of)
    return tokens[held if held.any() else slice(0, 1)][: windows_needed(tokens.shape[1])]


def windows_needed(seq_len: int) -> int:
    """How many windows are measured on, if there are as many."""
    return -(-TOKENS // seq_len)


def measured_widths(site: Site, recipe: Recipe) -> list[int]:
    """Widths at which a site's cut is measured, ascending, evenly between none and all: whole units of every group.

    None at all, too, where all of them may go.
    """
    if not site.prunable:
        return []
    parts = recipe.measured_cuts + 1
    found = {round(part * site.units / parts / site.step) * site.step for part in range(1, parts)}
    return [0] * site.droppable + sorted(width for width in found if 0 < width < site.units)


def all_cuts(anatomy: Anatomy, recipe: Recipe) -> list[tuple[Site, int]]:
    """Sites and widths that are measured, in the order of blocks."""
    if not measures(anatomy, recipe):
        return []
    return [(site, width) for site in anatomy.sites for width in measured_widths(site, recipe)]


def tried_cuts(block: nn.Module, site: Site, factored: FactoredSite, recipe: Recipe) -> dict[str, Tensor]:
    """Units, repaired weights and biases of the cuts that `measure` tries, by name, on the CPU.

    Args:
        block: dense.
        site: of it.
        factored: the site.
        recipe: all settings.
    """
    found: dict[str, Tensor] = {}
    for width in [] if site.whole_block else measured_widths(site, recipe):
        parted = factored.cut(width * site.unit_size, repaired=True)
        assert parted.repair is not None
        weight, bias = parted.W[:, parted.kept] + parted.repair, site_bias(block, site)
        named = {"units": factored.unit_order[:width].sort().values, "weight": weight.to(block_dtype(block))}
        if bias is not None and parted.mean is not None:
            wide = bias.to(parted.W.device).to(parted.W.dtype)
            named["bias"] = absorb_mean(wide, parted.W, weight, parted.kept, parted.mean).to(block_dtype(block))
        found.update({_name(site, width, part): tensor.cpu() for part, tensor in named.items()})
    return found


def measure(visit: Visit, cuts: Journal) -> None:
    """Puts into the journal, for every site, widths and the divergence at each: `KL(dense || cut)` in nats, mean over
    the visit's tokens, (widths, 2), float64.

    The windows pass through the dense model once, and through each cut one from its cut on: block after block, so that
    one is on the device at a time. Ranks share the cuts.

    Args:
        visit: of the dense model, with the windows to measure on.
        cuts: has those of `tried_cuts`, by block.
    """
    anatomy, run = visit.anatomy, visit.run
    here = range(len(visit.tokens))
    if run.journal.last_state(here, len(here))[0]:
        run.signs.skip(len(anatomy.blocks))
        return
    stream = capture(anatomy, visit.tokens, run, everywhere=True)
    mine = [cut for cut in all_cuts(anatomy, run.recipe) if ranks.owner(cut[0].block) == ranks.rank()]
    hidden = stream.storage.empty(len(mine) * len(here), *stream.hidden.shape[1:], dtype=stream.hidden.dtype)
    begun = 0
    for index, block in enumerate(anatomy.blocks):
        with on_device(block, run.clock.device), run.clock.phase("forward passes"):
            _pass(block, hidden[: begun * len(here)], hidden, 0, stream.before(index))
            for site, width in (cut for cut in mine if cut[0].block == index):
                _pass(_with_cut(block, site, width, cuts), stream.hidden, hidden, begun * len(here), stream)
                begun += 1
            advance(block, stream)
        run.signs.step(f"block {index}: measured cuts of the dense model")
    with run.clock.phase(ONCE):
        found = _divergences(visit, stream.hidden, hidden.unflatten(0, (len(mine), len(here))))
    by_site: dict[str, list[tuple[float, float]]] = {}
    for (site, width), divergence in zip(mine, found.tolist(), strict=True):
        by_site.setdefault(site.name, []).append((float(width), divergence))
    tensors = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in by_site.items()}
    merged = {name: tensor for others in ranks.from_all(tensors) for name, tensor in others.items()}
    if run.journal.folder is None or ranks.rank() == 0:
        run.journal.put(0, merged)
    run.journal.save_state(1, {}, here, last=True)
    ranks.wait()


def corrected(losses: Sequence[Tensor], measured: Sequence[Tensor | None]) -> list[Tensor]:
    """Predicted losses times what measured cuts cost over what was predicted of them, as far as that is trusted.

    `loss * m * (f / m)^TRUST`, with f the site's factor, measured over predicted, and m the median of all. Between two
    measured widths f is interpolated, in logarithms, and constant beyond. Where nothing was measured, or nothing
    predicted, it is m, and nowhere further from m than `FARTHEST`. Trusted fully, factors of one text lift the floor
    under F from what that text does not use: on another text twice the divergence was seen. A block has no widths but
    none and all, so that nothing is predicted of it any more: its loss is what was measured, and so is that of an
    attention or an FFN that is not there at all.

    Args:
        losses: of every site, at every width, (units + 1,).
        measured: of every site, as of `measure`.
    """
    known = [_factors(loss, rows) for loss, rows in zip(losses, measured, strict=True)]
    logs = [log for widths, found in known for width, log in zip(widths, found, strict=True) if width]
    median, most = float(np.median(logs)) if logs else 0.0, float(np.log(FARTHEST))
    result = []
    for loss, (widths, found) in zip(losses, known, strict=True):
        factors = np.interp(np.arange(len(loss)), widths, found) if widths else np.full(len(loss), median)
        trusted = median + TRUST * np.clip(factors - median, -most, most)
        trusted[:1] = factors[:1] if widths[:1] == [0] else trusted[:1]
        result.append(loss * torch.from_numpy(np.exp(trusted)).to(loss))
    return result


def _factors(loss: Tensor, measured: Tensor | None) -> tuple[list[int], list[float]]:
    """Widths, and the logarithm of measured over predicted at each, where both are more than nothing."""
    rows = [] if measured is None else [(round(width), cost) for width, cost in measured.tolist()]
    pairs = [(width, cost / float(loss[width])) for width, cost in rows if cost > 0 and float(loss[width]) > 0]
    pairs = [(width, factor) for width, factor in pairs if np.isfinite(factor)]
    return [width for width, _ in pairs], [float(np.log(factor)) for _, factor in pairs]


def _name(site: Site, width: int, part: str) -> str:
    return f"{site.path} cut to {width} {part}"


def _with_cut(block: nn.Module, site: Site, width: int, cuts: Journal) -> nn.Module | None:
    """A copy of a block with one site cut; nothing, where that is all of it."""
    if site.whole_block:
        return None
    units, weight, bias = (cuts.get(site.block, _name(site, width, part)) for part in ("units", "weight", "bias"))
    assert units is not None and weight is not None
    narrow, device = copy_unhooked(block), next(block.parameters()).device
    prune_site(narrow, site, units, weight.to(device), site_bias(block, site) if bias is None else bias.to(device))
    return narrow


def _pass(block: nn.Module | None, inputs: Tensor, into: Tensor, start: int, stream: Stream) -> None:
    """Puts what a block makes of some windows among others, from number `start` on; without a block themselves."""
    call = stream.call

    def run(at: slice) -> Tensor:
        return inputs[at] if block is None else run_block(block, inputs[at], call)

    for at, output in in_batches(len(inputs), stream.batch, run):
        store(into, slice(start + at.start, start + at.stop), output)


@torch.no_grad()
def _divergences(visit: Visit, dense: Tensor, hidden: Tensor) -> Tensor:
    """Mean divergence of each cut from the dense model, (cuts,), float64.

    Args:
        visit: of the dense model.
        dense: what its last block puts out, (windows, T, d).
        hidden: likewise of every cut, (cuts, windows, T, d).
    """
    model, blocks = visit.anatomy.model, visit.anatomy.blocks
    total = torch.zeros(len(hidden), dtype=torch.float64)

    def add(device: torch.device) -> None:
        total.zero_()

        def predictions(tokens: Tensor, states: Tensor) -> Tensor:
            return functional.log_softmax(logits_of(model, blocks, tokens, states.to(device)).float(), -1)

        with rest_on_device(model, blocks, device):
            for window in range(len(dense)):  # one at a time: logits are large
                tokens, at = visit.tokens[window : window + 1].to(device), slice(window, window + 1)
                wanted = predictions(tokens, dense[at])
                weights = wanted.exp()
                for number, states in enumerate(hidden):
                    found = predictions(tokens, states[at])
                    total[number] += torch.sub(wanted, found, out=found).mul_(weights).sum().cpu()

    where_it_fits("logits of a window", visit.run.clock.device, add)
    return total / visit.tokens.numel()
