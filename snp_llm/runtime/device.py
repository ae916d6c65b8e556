"""Where a run computes, what is free there and how fast it is, and how long each phase takes. Knows torch only."""

import ctypes
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)

ONCE = "embeddings and head"  # what a model runs once, however many blocks it has

PHASES = (
    *("loading", ONCE, "forward passes", "Gram matrices", "ordering", "factorisation", "reconstruction", "surgery"),
    *("refinement", "saving"),
)

PROBE_SECONDS = 0.2

ANOTHERS_SHARE = 0.25  # of what is free on a GPU

# What errors say that have no class of their own. Libraries that find no room for their handle say that they are not
# initialised, or of an internal error. The last is the host's.
OUT_OF_MEMORY = (
    *("out of memory", "_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED", "`cublasCreate", "`cublasLtCreate"),
    *("`cusolverDnCreate", "CUDNN_STATUS_NOT_INITIALIZED", "DefaultCPUAllocator: can't allocate memory"),
)

T = TypeVar("T")


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


def free_bytes(device: torch.device) -> float:
    """Bytes free on a GPU, with what torch holds in reserve; no bound is known of anything else."""
    if device.type != "cuda":
        return math.inf
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + reserved)


@contextmanager
def rough_products(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices with ten bits of mantissa (TF32) on a GPU that has them, as long as the context
    lasts: many times as fast there. Elsewhere nothing changes."""
    with _products("tf32", torch.backends.cuda.matmul) if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32, on every device, as long as the context lasts.

    A program (`torch.set_float32_matmul_precision`) or its environment (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which
    NVIDIA's containers set) may have allowed less, which is right for a network and wrong for sums and factors.
    """
    on_cpu = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
    with _products("ieee", torch.backends.cuda.matmul, *([] if on_cpu is None else [on_cpu])):
        yield


@contextmanager
def _products(precision: str, *settings: Any) -> Iterator[None]:
    """Products of float32 matrices with a precision, "tf32" or "ieee", by settings of torch that are put back."""
    if all(hasattr(setting, "fp32_precision") for setting in settings):
        before = [setting.fp32_precision for setting in settings]
        try:
            for setting in settings:
                setting.fp32_precision = precision
            yield
        finally:
            for setting, value in zip(settings, before, strict=True):
                setting.fp32_precision = value
        return
    known = torch.get_float32_matmul_precision()  # until torch 2.8 one for all devices
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(known)


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64; on the CPU, where its device has no such type, as Apple's GPUs have none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def has_room(device: torch.device, size: float) -> bool:
    """Whether so many bytes are free on a device; always true of the host."""
    return size <= free_bytes(device)


def place_for_another(device: torch.device, size: float) -> torch.device:
    """Where another process may hold so many bytes while this one goes on: a GPU with plenty of room, else the CPU."""
    plenty = device.type == "cuda" and ANOTHERS_SHARE * torch.cuda.mem_get_info(device)[0] >= size
    return device if plenty else torch.device("cpu")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that a device, one of its libraries, or the host has no memory left."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    return said or isinstance(error, torch.OutOfMemoryError)


def place_for(name: str, what: str, size: int, device: torch.device) -> torch.device:
    """A device if it has room for so many bytes of what a site needs, else the CPU, said in a line."""
    if has_room(device, size):
        return device
    log.info("%s: no room for %s of %.1f GB on %s; computed on the CPU", name, what, size / 1e9, device)
    return torch.device("cpu")


def where_it_fits(what: str, device: torch.device, compute: Callable[[torch.device], T]) -> T:
    """What `compute` gives on a device, or on the CPU where that runs out of memory; a log line says so.

    Args:
        what: is computed, for people.
        device: to compute on.
        compute: takes the device, and leaves no trace that matters when it fails.
    """
    try:
        return compute(device)
    except RuntimeError as error:
        if device.type == "cpu" or not ran_out(error):
            raise
    # Here, where what the error held on to is gone.
    log.warning("%s: ran out of memory on %s; computed on the CPU", what, device)
    hand_back(device)
    return compute(torch.device("cpu"))


def hand_back(device: torch.device) -> None:
    """Gives memory that torch keeps for later back to the device, so that it can be cut anew, and pinned memory, which
    it keeps for tensors of the same size alone, to the host."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if (give_back := getattr(torch._C, "_host_emptyCache", None)) is not None:
            give_back()


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
        size = 512 if device.type == "cpu" else 4096 if dtype.itemsize == 2 else 2048  # a probe should not be the peak
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
    """Seconds by phase; time in a phase within another counts for the inner one alone.

    Attributes:
        device: whose work is waited for.
        own: of this process.
        earlier: of an interrupted one that this goes on from, up to where it does.
        within: of inner phases of the one that is on.
    """

    device: torch.device
    own: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    earlier: dict[str, float] = field(default_factory=dict)
    within: float = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """Of both."""
        return {name: seconds + self.earlier.get(name, 0.0) for name, seconds in self.own.items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside to a phase."""
        synchronize(self.device)
        start, before, self.within = time.perf_counter(), self.within, 0.0
        try:
            yield
            synchronize(self.device)
        finally:
            elapsed = time.perf_counter() - start
            self.own[name] += elapsed - self.within
            self.within = before + elapsed


def versions() -> dict[str, str]:
    """Versions of what a figure depends on besides this package."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
