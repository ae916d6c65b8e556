"""Refuses a run that cannot fit, naming the option that helps."""

import os
import shutil
from pathlib import Path

import torch

from snp_llm.pruning.estimate.estimate import Estimate
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.numbers import human_bytes

REMEDIES = {
    "block": "--dtype bfloat16",
    "activations": "a smaller --batch-size or --seq-len",
    "logits": "a smaller --seq-len",
    "sums": "--ordering zca --reference self --dampening 0.1, which hold fewer sums; on a CPU, --hidden-device disk",
    "algebra": "a device with more memory; matrices as wide as the FFN cannot be smaller",
    "rest": "--dtype bfloat16",
    "hidden": "--hidden-device disk, or fewer --num-samples",
    "hidden on device": "--hidden-device cpu, or fewer --num-samples",
    "hidden on disk": "fewer --num-samples or a smaller --seq-len",
    "visit": "--hidden-device disk, or --allocation uniform --metric error",
    "tokens": "fewer --num-samples",
    "libraries": "a machine with more memory",
    "model": "--dtype bfloat16, or an --output on another disk",
    "gradients": "--allocation uniform --metric error, or an --output on another disk",
}


def refuse_what_cannot_fit(needed: Estimate, device: torch.device, hidden_device: str, output_folder: Path) -> None:
    """Compares an estimate with what is free now.

    Args:
        needed: by a run.
        device: that it computes on.
        hidden_device: where its hidden states wait.
        output_folder: that it writes, there or not yet.

    Raises:
        SnpError: something does not fit, with the option that helps.
    """
    parent = output_folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = {"host": free_host_bytes(), "disk": shutil.disk_usage(parent).free}
    if device.type == "cuda":
        free["device"] = torch.cuda.mem_get_info(device)[0]
    names = {"device": f"memory of {device}", "host": "host memory", "disk": f"disk at {parent}"}
    wanted = {"device": needed.device_bytes, "host": needed.host_bytes, "disk": needed.disk_bytes}
    for place in ("device", "host", "disk"):
        if place not in free or wanted[place] <= free[place]:
            continue
        parts = needed.parts(place)
        largest = parts[0]
        # What no option makes smaller is not worth naming while something else can give way enough.
        for part in parts:
            if part.kind not in ("libraries", "algebra") and wanted[place] - part.bytes <= free[place]:
                largest = part
                break
        remedy = REMEDIES[largest.kind]
        if largest.kind in ("hidden", "visit") and hidden_device == "disk":
            remedy = "fewer --num-samples or a smaller --batch-size"
        raise SnpError(
            f"{names[place]}: about {human_bytes(wanted[place])} needed, {human_bytes(free[place])} free. "
            f"{largest.what[0].upper()}{largest.what[1:]} takes {human_bytes(largest.bytes)} of it: use {remedy}."
        )


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
