"""Where a run computes, what is free there and how fast it is, and how long each phase takes. Knows torch only."""

import ctypes
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from snp_llm.runtime.errors import SnpError

ONCE = "embeddings and head"  # what a model runs once, however many blocks it has

PHASES = (
    *("loading", ONCE, "forward passes", "Gram matrices", "ordering", "factorisation", "reconstruction", "surgery"),
    "saving",
)

PROBE_SECONDS = 0.2


def devices_here() -> list[str]:
    """Kinds of device that can compute on this machine, the fastest first."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [kind for kind, there in present.items() if there]


def device_name(name: str) -> str:
    """The kind of device that a recipe's `device` stands for, here or not."""
    return devices_here()[0] if name == "auto" else name


def compute_device(name: str) -> torch.device:
    """The device a recipe's `device` stands for.

    Raises:
        SnpError: it is not there.
    """
    if device_name(name) not in devices_here():
        raise SnpError(f"--device {name}: not available here; expected one of {', '.join(devices_here())}.")
    return torch.device(device_name(name))


def describe_device(device: torch.device) -> str:
    """What a speed was measured on, in a few words."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"{device.type}, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type


def has_room(device: torch.device, size: int) -> bool:
    """Whether so many bytes are free on a device, without what torch holds in reserve; always true of the host."""
    if device.type != "cuda":
        return True
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return size <= torch.cuda.mem_get_info(device)[0] + reserved


def free_host_bytes() -> int:
    """Memory that a process may still take, without swapping where the system says so, within its control group."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


def trim_host_memory() -> None:
    """Hands memory that was freed back to the system, where the C library (glibc) would keep it.

    What lies below something that is still used it keeps for good: a block's worth of holes for every block.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def synchronize(device: torch.device) -> None:
    """Waits for the device, so that a clock read next to it tells the truth."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_rates(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, float]:
    """FLOPs a second of a large product, by dtype, probed for a fifth of a second in all."""
    wanted = list(dtypes)
    rates = {}
    for dtype in wanted:
        if dtype == torch.float64 and device.type == "mps":
            rates[dtype] = matmul_rates(torch.device("cpu"), [dtype])[dtype]  # where its float64 is computed
            continue
        size = 512 if device.type == "cpu" else 4096
        a = torch.randn(size, size, device=device).to(dtype)
        a @ a
        synchronize(device)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < PROBE_SECONDS / len(wanted):
            a @ a
            synchronize(device)
            count += 1
        rates[dtype] = 2 * size**3 * count / (time.perf_counter() - start)
    return rates


@dataclass
class Clock:
    """Seconds by phase; time in a phase within another counts for the inner one alone."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    within: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside to a phase."""
        synchronize(self.device)
        start, before, self.within = time.perf_counter(), self.within, 0.0
        yield
        synchronize(self.device)
        elapsed = time.perf_counter() - start
        self.seconds[name] += elapsed - self.within
        self.within = before + elapsed


def versions() -> dict[str, str]:
    """Versions of what a figure depends on besides this package."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
