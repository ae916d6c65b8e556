"""What a block's out-projections should put out, from the dense model's own stream. Knows blocks, not how they are cut.

A site's output is added to the stream. Under `dense` it should be what the dense model's site puts out; under
`residual` whatever makes the stream after the site that of the dense model, so that what earlier cuts spoilt is made
good as far as this site can.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.blocks import run_block, watch_outputs
from snp_llm.models.calls import move
from snp_llm.models.projections import projection
from snp_llm.models.site import Site, site_weight
from snp_llm.models.staying import has_more
from snp_llm.pruning.refine import refined_windows
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import enough_windows
from snp_llm.pruning.stream import Stream, check_finite
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.storage import store

log = logging.getLogger(__name__)


# Relative distance between what a block adds to its stream and its sites' outputs, up to which they are the same: in
# half precision an update of a stream a hundred times its size is only known to a few percent.
SAME_STREAM = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.25, torch.bfloat16: 0.25}

SCALES = ("residual_multiplier", "residual_scale")  # attributes of blocks: what outputs are multiplied with when added


@dataclass(frozen=True)
class Reference:
    """What the sites of one block should put out, where the hidden states wait, for the first calibration windows.

    Attributes:
        outputs: by site, (windows, T, d); with `stream_scale` they include the stream before the block. Sites whose
            inputs are those of the dense model have none: they give what they should until they are cut.
        windows: on all ranks together.
        stream_scale: what the stream is divided by to be in the measure of a site's output; None under `dense`.
        behind: the stream that the block as a whole should put out, for as many windows as it is refined on; None where
            it is not to be refined.
    """

    outputs: dict[Site, Tensor]
    windows: int
    stream_scale: float | None
    behind: Stream | None

    def of(self, site: Site, at: slice, hidden: Tensor, before: Sequence[Tensor]) -> Tensor | None:
        """What a site's out-projection should put out, for those of the windows `at` that have a reference.

        Args:
            site: of the block.
            at: some of this rank's windows.
            hidden: the stream before the block, (batch, T, d), where the result is to be.
            before: what the sites of earlier stages put out in this block, (batch, T, d) each.
        """
        if site not in self.outputs:
            return None
        wanted: Tensor = move(self.outputs[site][at], hidden.device)
        if self.stream_scale:
            wanted = wanted - hidden[: len(wanted)] / self.stream_scale
            for output in before:
                wanted = wanted - output[: len(wanted)]
        return wanted


@dataclass
class DenseStream:
    """The first calibration windows on their way through the dense model, beside those that go through the pruned one.

    Attributes:
        anatomy: of the dense model.
        run: of the phase.
        stream: before the block that comes next; None where no site is repaired to give anything but its own output,
            and no block refined.
        referred: of all windows so many have a reference at the sites.
        residual: whether blocks add to their stream, which sites are then repaired to give; None: not known yet.
            Blocks that add more than their sites put out are never asked for that.
    """

    anatomy: Anatomy
    run: Run
    stream: Stream | None
    referred: int
    residual: bool | None

    @classmethod
    def beside(cls, stream: Stream, anatomy: Anatomy, run: Run) -> "DenseStream":
        """The dense model's stream beside one that has not yet entered the first block."""
        wanted, seq_len = run.recipe.reference, stream.hidden.shape[1]
        refined = refined_windows(run.recipe, stream.total, seq_len)
        if wanted == "self":
            return cls(anatomy, run, stream.first(refined) if refined else None, 0, False)
        if wanted == "residual" and (others := [i for i in range(len(anatomy.blocks)) if has_more(anatomy, i)]):
            log.warning(
                "reference residual: %d of %d blocks add more than their sites put out, mixers or experts; reference "
                "dense there",
                len(others),
                len(anatomy.blocks),
            )
        widest = max(site.channels for site in anatomy.sites)
        referred = min(stream.total, enough_windows(widest, seq_len))
        return cls(
            anatomy, run, stream.first(max(referred, refined)), referred, None if wanted == "residual" else False
        )

    def state(self) -> dict[str, Tensor]:
        """What is needed to go on after the process was killed."""
        known = {} if self.residual is None else {"residual": torch.tensor(self.residual)}
        return known if self.stream is None else {**known, "dense": self.stream.hidden}

    def go_on(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        if self.stream is not None:
            self.stream.hidden.copy_(state["dense"])
        self.residual = bool(state["residual"]) if "residual" in state else self.residual

    def follow(self, pruned: Stream) -> None:
        """Takes over the pruned model's stream, where the two are the same."""
        if self.stream is not None:
            self.stream.hidden.copy_(pruned.hidden[: len(self.stream.hidden)])

    def reference(self, index: int, widths: Sequence[int]) -> Reference | None:
        """What the sites of a block should put out; None where the streams are the same behind the block as well.

        Args:
            index: of the block; its weights are on the compute device.
            widths: of all sites.
        """
        kept = [width == site.units for site, width in zip(self.anatomy.sites, widths, strict=True)]
        sites = [site for site in self.anatomy.sites_of(index) if site.has_reference] if self.referred else []
        begin = 0 if self.referred else index  # where a block's own output counts, earlier ones change nothing
        entered, untouched = (
            all(whole for site, whole in zip(self.anatomy.sites, kept, strict=True) if begin <= site.block < end)
            for end in (index, index + 1)
        )
        if self.stream is None or untouched:
            return None
        block, dense, device = self.anatomy.blocks[index], self.stream.before(index), self.run.clock.device
        with self.run.clock.phase("forward passes"):
            only_sites = bool(sites) and not has_more(self.anatomy, index)
            last = index == len(self.anatomy.blocks) - 1  # which may have something of its own, as a bias
            if only_sites and (self.residual is None or (self.residual and last)):
                self.residual = adds_to_stream(block, sites, dense, device)
            residual = bool(self.residual and only_sites)
            found = block_reference(block, sites, dense, self.referred, residual=residual, device=device)
        if entered:
            for site in next(stage for stage in self.anatomy.stages(index) if not stage[0].whole_block):
                found.outputs.pop(site, None)
        return found


def block_reference(
    block: nn.Module, sites: Sequence[Site], dense: Stream, referred: int, *, residual: bool, device: torch.device
) -> Reference:
    """Runs a dense block over the dense model's stream, which moves on to what the block puts out.

    Args:
        block: dense, on `device`.
        sites: of the block, in the order of its stages.
        dense: the dense model's hidden states before it; overwritten by those after it.
        referred: of all windows so many have a reference at the sites.
        residual: whether the stream is part of the reference.
        device: to compute on.
    """
    known = len(dense.among_first(referred))
    shape, dtype = (known, dense.hidden.shape[1]), dense.hidden.dtype
    wanted = {s: dense.storage.empty(*shape, len(site_weight(block, s)), dtype=dtype) for s in sites}
    scale = _stream_scale(block) if residual else None
    for at, (hidden, output, outputs) in _outputs(block, sites, dense, len(dense.hidden), device):
        check_finite(output, dense.index)
        if scale is not None:
            stream = hidden / scale
            for number, added in enumerate(outputs[:-1]):
                outputs[number] = stream = stream + added
            outputs[-1] = output / scale
        here = slice(min(at.start, known), min(at.stop, known))
        for site, value in zip(sites, outputs, strict=True):
            store(wanted[site], here, value[: here.stop - here.start])
        store(dense.hidden, at, output)
    return Reference(wanted, min(referred, dense.total) if referred else dense.total, scale, dense)


def adds_to_stream(block: nn.Module, sites: Sequence[Site], dense: Stream, device: torch.device) -> bool:
    """Whether a dense block puts out the sum of its stream and of what its sites put out, as the first window has it.

    A block that normalises what its sites put out, or the sum, has no stream that they could repair. A log line
    says that dense outputs take its place.
    """

    def same() -> bool:
        [(_, (hidden, output, outputs))] = _outputs(block, sites, dense, 1, device)
        if output.shape != outputs[0].shape:  # more than one hidden state, or other things that go along
            return False
        added = output - hidden
        whole = outputs[0]
        for other in outputs[1:]:
            whole = whole + other
        whole = whole * _stream_scale(block)
        whole, added = whole.cpu().double(), added.cpu().double()  # some devices have no such type
        return bool((whole - added).norm() <= SAME_STREAM[dense.hidden.dtype] * added.norm())

    adds = ranks.from_rank(0, same)
    if not adds:
        log.warning("reference residual: blocks of this model normalise what is added; reference dense instead")
    return adds


def _stream_scale(block: nn.Module) -> float:
    return float(next((getattr(block, name) for name in SCALES if hasattr(block, name)), 1.0))


def _outputs(
    block: nn.Module, sites: Sequence[Site], dense: Stream, windows: int, device: torch.device
) -> Iterator[tuple[slice, tuple[Tensor, Tensor, list[Tensor]]]]:
    """What a block gets, what it and each of its sites put out, for the first windows of the stream, in batches."""
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, output: Tensor) -> None:
        seen[site] = output.clone()  # some blocks add to it in place

    watchers: dict[nn.Module, Callable[[Tensor], None]] = {
        projection(block, site.consumers[0]): partial(keep, site) for site in sites
    }

    def run(at: slice) -> tuple[Tensor, Tensor, list[Tensor]]:
        hidden: Tensor = move(dense.hidden[at], device)
        output = run_block(block, hidden, dense.call)
        outputs = [seen[site].reshape(*output.shape[:2], -1) for site in sites]  # some blocks flatten windows inside
        return hidden, output, outputs

    with watch_outputs(watchers):
        yield from in_batches(windows, dense.batch, run)
