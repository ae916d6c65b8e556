"""Where large tensors wait: in a device's memory, or in files without a name. Knows neither what they are nor why."""

import logging
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snp_llm.runtime.device import hand_back, ran_out
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)

Files = Sequence[mmap.mmap]


@dataclass(frozen=True)
class Storage:
    """Where hidden states wait between blocks, and the sums of wide sites between two readings.

    Attributes:
        device: in whose memory; None: in memory maps of files. What finds no room on a GPU waits on the CPU.
        folder: of those files. They have no name, so nothing is left of them when the process ends, however it ends.
        pinned: whether a GPU reads and writes what waits on the CPU: it does so eight times as fast, and without the
            host having to wait, where the system may not move the memory.
    """

    device: torch.device | None
    folder: Path | None = None
    pinned: bool = False

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor to be filled."""
        if self.device is None:
            return self.file(*shape, dtype=dtype)[0]
        if self.device.type != "cpu":
            try:
                return torch.empty(shape, dtype=dtype, device=self.device)
            except RuntimeError as error:
                if not ran_out(error):
                    raise
            size = torch.Size(shape).numel() * dtype.itemsize
            log.info("no room on %s for %.1f GB of hidden states; they wait on the CPU", self.device, size / 1e9)
            hand_back(self.device)
        if self.pinned or self.device.type == "cuda":
            try:
                return torch.empty(shape, dtype=dtype, pin_memory=True)
            except RuntimeError as error:  # the system allows a process only so much of that
                log.warning("memory cannot be pinned, copies will be slow (%s)", str(error).splitlines()[0][:200])
        return torch.empty(shape, dtype=dtype)

    def file(self, *shape: int, dtype: torch.dtype) -> tuple[Tensor, mmap.mmap]:
        """A tensor of zeros in a file, and its memory map.

        Raises:
            SnpError: the folder cannot be written, or has no room.
        """
        count = torch.Size(shape).numel()
        if count == 0:  # no file has a map of nothing
            return torch.empty(shape, dtype=dtype), mmap.mmap(-1, 1)
        size = count * dtype.itemsize
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="hidden-") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # or a full disk kills us later
                pages = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise SnpError(f"--hidden-device disk: {self.folder} cannot be written ({error}).") from error
        return torch.frombuffer(pages, dtype=dtype, count=count).view(shape), pages


def store(into: Tensor, at: slice, values: Tensor) -> None:
    """Puts values into what waits on a storage; from a GPU into pinned memory without the host waiting for it.

    The host must not read them before it has synchronised with the device, as a clock does at the end of a phase.
    """
    into[at].copy_(values, non_blocking=values.device.type == "cuda" and into.is_pinned())


def let_go(files: Files) -> None:
    """Takes tensors in files out of memory until they are next read or written; they stay as they are."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for pages in files:
            pages.madvise(mmap.MADV_DONTNEED)
