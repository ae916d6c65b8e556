"""Windows so many at a time, fewer where they do not fit. Knows nothing of what is computed from them."""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from snp_llm.runtime.device import hand_back, ran_out
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class BatchSize:
    """Windows that are run at a time; what turned out not to fit is remembered."""

    windows: int = sys.maxsize


def in_batches(
    windows: int, batch: BatchSize, compute: Callable[[slice], T], give_way: Callable[[], bool] = lambda: False
) -> Iterator[tuple[slice, T]]:
    """Slices of so many windows, one after the other, each with what `compute` makes of it.

    Where a batch does not fit into the device's memory, the batch size is halved, for the rest of the run, and the
    batch repeated: `compute` must leave no trace when it fails. Where one window does not, `give_way` may make room: it
    says whether it did.

    Raises:
        SnpError: not even one window fits.
    """
    start = 0
    while start < windows:
        at = slice(start, min(start + batch.windows, windows))
        try:
            result = compute(at)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            if batch.windows == 1 and not give_way():
                raise SnpError(
                    "not enough memory on the device for one calibration window. Use a smaller --seq-len or --dtype "
                    f"bfloat16 ({str(error).splitlines()[0][:200]})."
                ) from error
        else:
            yield at, result
            del result  # before the next is made
            start = at.stop
            continue
        if batch.windows > 1:
            batch.windows //= 2
            log.warning("batch of %d windows did not fit; going on with %d at a time", at.stop - start, batch.windows)
        hand_back(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
