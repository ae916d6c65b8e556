"""Calibration tokens on their way through the blocks. Knows how to run blocks, not what is computed from them."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.blocks import capture_calls, rest_on_device, run_block
from snp_llm.models.calls import BlockCall
from snp_llm.models.window import capture_window
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.device import ONCE, Clock
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.storage import Storage

log = logging.getLogger(__name__)


T = TypeVar("T")


@dataclass
class BatchSize:
    """Windows that are run at a time; what turned out not to fit is remembered."""

    windows: int


@dataclass(frozen=True)
class Stream:
    """Calibration windows of this rank before some block.

    Attributes:
        hidden: hidden states, (windows, T, d), on the storage.
        calls: every block's other arguments, for one window; windows are equally long, so they hold for any batch.
        index: of the block that comes next.
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

    @property
    def call(self) -> BlockCall:
        """Other arguments of the block that comes next."""
        return self.calls[self.index]

    def before(self, index: int) -> "Stream":
        """The stream, where the block of that number comes next."""
        return replace(self, index=index)

    def like_hidden(self) -> Tensor:
        """Room for as many hidden states, on the storage."""
        return self.storage.empty(*self.hidden.shape, dtype=self.hidden.dtype)

    def first(self, count: int) -> "Stream":
        """Stream of the first so many of all windows, this rank's among them, with hidden states of its own."""
        mine = range(self.windows.start, max(self.windows.start, min(self.windows.stop, count)))
        hidden = self.storage.empty(len(mine), *self.hidden.shape[1:], dtype=self.hidden.dtype)
        return replace(self, hidden=hidden.copy_(self.hidden[: len(mine)]), windows=mine, total=min(self.total, count))


def capture(
    anatomy: Anatomy,
    tokens: Tensor,
    recipe: Recipe,
    clock: Clock,
    folder: Path | None = None,
) -> Stream:
    """Embeds this rank's share of the calibration tokens and records how the model calls its blocks.

    Args:
        anatomy: of the model, dense or pruned before.
        tokens: all calibration windows, (windows, T), int64.
        recipe: batch size, and where hidden states wait.
        clock: of the compute device.
        folder: for hidden states on disk; None: the system's for temporary files.
    """
    storage = Storage(None if recipe.hidden_device == "disk" else torch.device(recipe.hidden_device), folder)
    if len(tokens) < ranks.rank_count():
        raise SnpError(
            f"calibration: expected a window or more for each of {ranks.rank_count()} ranks, got {len(tokens)}. Use "
            "more --num-samples or fewer ranks."
        )
    mine, model, blocks = ranks.share(len(tokens)), anatomy.model, anatomy.blocks
    size = recipe.batch_size
    with clock.phase(ONCE), rest_on_device(model, blocks, torch.device("cpu")):
        first, calls = capture_window(model, blocks, tokens[:1])
        hidden = storage.empty(len(mine), *first.shape[1:], dtype=first.dtype)
        for start in range(0, len(mine), size):
            stop = min(start + size, len(mine))
            hidden[start:stop] = capture_calls(model, blocks, tokens[mine.start + start : mine.start + stop])[0]
    return Stream(hidden, calls, mine, len(tokens), BatchSize(size), storage)


def in_batches(windows: int, batch: BatchSize, compute: Callable[[slice], T]) -> Iterator[tuple[slice, T]]:
    """Slices of so many windows, one after the other, each with what `compute` makes of it.

    Where a batch does not fit into the device's memory, the batch size is halved, for the rest of the run, and the
    batch repeated: `compute` must leave no trace when it fails.

    Raises:
        SnpError: not even one window fits.
    """
    start = 0
    while start < windows:
        at = slice(start, min(start + batch.windows, windows))
        try:
            result = compute(at)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if batch.windows == 1:
                raise SnpError(
                    "not enough memory on the device for one calibration window. Use a smaller --seq-len or --dtype "
                    f"bfloat16 ({str(error).splitlines()[0][:200]})."
                ) from error
        else:
            yield at, result
            start = at.stop
            continue
        batch.windows = max(1, batch.windows // 2)
        log.warning("batch of %d windows did not fit; going on with %d at a time", at.stop - at.start, batch.windows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def advance(block: nn.Module, index: int, hidden: Tensor, into: Tensor, call: BlockCall, batch: BatchSize) -> None:
    """Runs a block over hidden states, (windows, T, d); `into`, which may be the same, takes what it puts out.

    Raises:
        SnpError: that is not finite.
    """
    for at, output in in_batches(len(hidden), batch, lambda at: run_block(block, hidden[at], call)):
        check_finite(output, index)
        into[at] = output


def check_finite(output: Tensor, index: int) -> None:
    """Raises SnpError if hidden states after a block are not finite."""
    if not torch.isfinite(output).all():
        raise SnpError(f"block {index}: activations hold NaN or Inf. Try --dtype float32.")
