"""Calibration tokens on their way through the blocks. Knows how to run blocks, not what is computed from them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.blocks import capture_calls, run_block
from snp_llm.models.calls import BlockCall
from snp_llm.models.offload import rest_on_device
from snp_llm.models.window import capture_window
from snp_llm.pruning.run import Run
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import BatchSize, in_batches
from snp_llm.runtime.device import ONCE
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.storage import Storage, store


@dataclass
class Stream:
    """Calibration windows of this rank before some block.

    Attributes:
        hidden: hidden states, (windows, T, d), on the storage; further channels hold what else blocks read of it. Of a
            convolutional network feature maps.
        calls: every block's other arguments, for one window; windows are equally long, so they hold for any batch.
        index: of the block that comes next.
        coming: what that block has put out so far, where it is of another shape.
        windows: which of all calibration windows these are.
        total: how many there are on all ranks together.
        batch: windows at a time.
        storage: where hidden states wait.
    """

    hidden: Tensor
    calls: list[BlockCall]
    windows: range
    total: int
    batch: BatchSize
    storage: Storage
    index: int = 0
    coming: Tensor | None = None

    @property
    def call(self) -> BlockCall:
        """Other arguments of the block that comes next."""
        return self.calls[self.index]

    def before(self, index: int) -> "Stream":
        """The stream, where the block of that number comes next."""
        self.index = index
        return self

    def put(self, at: slice, output: Tensor, *, apart: bool = False) -> None:
        """Takes what a block puts out for the windows `at`, batch after batch, in place of what went in.

        Hidden states of another shape get room of their own, and with `apart` all do, so that those before are kept.
        """
        if output.shape[1:] == self.hidden.shape[1:] and not apart:
            store(self.hidden, at, output)
            return
        if self.coming is None:
            self.coming = self.storage.empty(len(self.windows), *output.shape[1:], dtype=output.dtype)
        store(self.coming, at, output)
        if at.stop == len(self.windows):
            self.hidden, self.coming = self.coming, None

    def go_on(self, hidden: Tensor) -> None:
        """Takes up hidden states that were kept."""
        if hidden.shape == self.hidden.shape:
            self.hidden.copy_(hidden)
        else:
            self.hidden = self.storage.empty(*hidden.shape, dtype=hidden.dtype).copy_(hidden)

    def room_for(self, channels: int) -> Tensor:
        """Room for so many values a token, (windows, T, channels), on the storage."""
        return self.storage.empty(*self.hidden.shape[:2], channels, dtype=self.hidden.dtype)

    def among_first(self, count: int) -> range:
        """Which of the first so many of all windows are this rank's."""
        return range(self.windows.start, max(self.windows.start, min(self.windows.stop, count)))

    def first(self, count: int) -> "Stream":
        """Stream of the first so many of all windows, this rank's among them, with hidden states of its own."""
        mine = self.among_first(count)
        hidden = self.storage.empty(len(mine), *self.hidden.shape[1:], dtype=self.hidden.dtype)
        return replace(self, hidden=hidden.copy_(self.hidden[: len(mine)]), windows=mine, total=min(self.total, count))


@dataclass(frozen=True)
class Visit:
    """One pass through the dense model: through which, with which tokens and tools."""

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


def capture(anatomy: Anatomy, tokens: Tensor, run: Run, *, everywhere: bool = False) -> Stream:
    """Embeds this rank's share of the calibration tokens and records how the model calls its blocks.

    Args:
        anatomy: of the model, dense or pruned before.
        tokens: all calibration windows, (windows, T), int64.
        run: of this phase; its journal's folder takes hidden states on disk, or the system's for temporary files.
        everywhere: every rank takes all of them.
    """
    place = run.recipe.hidden_device
    if place == "auto":  # nobody has looked for room
        place = "cpu"
    on_gpu = run.clock.device.type == "cuda"
    storage = Storage(
        None if place == "disk" else torch.device(place), run.journal.folder, pinned=on_gpu and place == "cpu"
    )
    if len(tokens) < ranks.rank_count() and not everywhere:
        raise SnpError(
            f"calibration: expected a window or more for each of {ranks.rank_count()} ranks, got {len(tokens)}. Use "
            "more --num-samples or fewer ranks."
        )
    mine = range(len(tokens)) if everywhere else ranks.share(len(tokens))
    model, blocks = anatomy.model, anatomy.blocks
    run.batch.windows = min(run.batch.windows, run.recipe.batch_size)
    size = run.recipe.batch_size
    with run.clock.phase(ONCE), rest_on_device(model, blocks, torch.device("cpu")):
        first, calls = capture_window(model, blocks, tokens[:1])
        hidden = storage.empty(len(mine), *first.shape[1:], dtype=first.dtype)
        for start in range(0, len(mine), size):
            stop = min(start + size, len(mine))
            hidden[start:stop] = capture_calls(model, blocks, tokens[mine.start + start : mine.start + stop])[0]
    return Stream(hidden, calls, mine, len(tokens), run.batch, storage)


def advance(block: nn.Module, stream: Stream) -> None:
    """Runs a block over the stream, which moves on to what it puts out; what went in is kept.

    Raises:
        SnpError: that is not finite.
    """
    hidden, call = stream.hidden, stream.call
    for at, output in in_batches(len(hidden), stream.batch, lambda at: run_block(block, hidden[at], call)):
        check_finite(output, stream.index)
        stream.put(at, output, apart=True)


def check_finite(output: Tensor, index: int) -> None:
    """Raises SnpError if hidden states after a block are not finite."""
    if not torch.isfinite(output).all():
        raise SnpError(f"block {index}: activations hold NaN or Inf. Try --dtype float32.")
