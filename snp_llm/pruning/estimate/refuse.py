"""Refuses a run that cannot fit, naming the option that helps."""

import shutil
from pathlib import Path

import torch

from snp_llm.pruning.estimate.estimate import Estimate
from snp_llm.runtime.device import free_host_bytes
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.numbers import human_bytes

REMEDIES = {  # by kind, and where it differs by place
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
    "visit on disk": "--allocation uniform --metric error, or fewer --num-samples",
    "tokens": "fewer --num-samples",
    "libraries": "a machine with more memory",
    "model": "--dtype bfloat16, or an --output on another disk",
    "gradients": "--allocation uniform --metric error, or an --output on another disk",
}


def refuse_what_cannot_fit(needed: Estimate, device: torch.device, output_folder: Path) -> None:
    """Compares an estimate with what is free now.

    Args:
        needed: by a run.
        device: that it computes on.
        output_folder: that it writes, there or not yet.

    Raises:
        SnpError: something does not fit, with the option that helps.
    """
    parent = next(path for path in (output_folder.absolute() / "output").parents if path.exists())
    free = {"host": free_host_bytes(), "disk": shutil.disk_usage(parent).free}
    if device.type == "cuda":
        free = {"device": torch.cuda.mem_get_info(device)[0], **free}
    names = {"device": f"memory of {device}", "host": "host memory", "disk": f"disk at {parent}"}
    for place, there in free.items():
        wanted, parts = needed.peak(place), needed.parts(place)
        if wanted <= there:
            continue
        # What no option makes smaller is not worth naming while something else can give way enough.
        enough = [p for p in parts if p.kind not in ("libraries", "algebra") and wanted - p.bytes <= there]
        largest = (enough or parts)[0]
        remedy = REMEDIES.get(f"{largest.kind} on {place}", REMEDIES[largest.kind])
        raise SnpError(
            f"{names[place]}: about {human_bytes(wanted)} needed, {human_bytes(there)} free. "
            f"{largest.what[0].upper()}{largest.what[1:]} takes {human_bytes(largest.bytes)} of it: use {remedy}."
        )
