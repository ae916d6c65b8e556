"""What a prune will take, as JSON and in words. Parses no arguments."""

import itertools
from typing import Any

import torch
from transformers import PreTrainedModel

from snp_llm.pruning.estimate.estimate import Estimate, estimate
from snp_llm.recipe.recipe import ResolvedRecipe
from snp_llm.runtime.device import device_name, devices_here, matmul_rates
from snp_llm.runtime.numbers import human_bytes, human_flops, human_time


def resource_facts(model: PreTrainedModel, recipe: ResolvedRecipe) -> dict[str, Any]:
    """What a prune takes, ready for JSON."""
    name, needed = device_name(recipe.device), estimate(model, recipe)
    return {
        "windows": recipe.num_samples,
        "seq_len": recipe.seq_len,
        "device": name,
        **estimate_facts(needed, torch.device(name) if name in devices_here() else None),
    }


def estimate_facts(needed: Estimate, device: torch.device | None) -> dict[str, Any]:
    """An estimate ready for JSON, with a rough time for this device; without one that is here, without a time."""
    places = ("device", "host", "disk")
    work: dict[str, float] = {}
    for step in needed.work:
        work[step.what] = work.get(step.what, 0.0) + step.flops
    return {
        **{f"{place}_bytes": needed.peak(place) for place in places},
        "flops": needed.flops,
        "seconds_roughly": None if device is None else needed.seconds(matmul_rates(device, needed.dtypes)),
        "breakdown": {place: {part.what: part.bytes for part in needed.parts(place)} for place in places},
        "work": work,
    }


def estimate_line(facts: dict[str, Any], device: str) -> str:
    """An estimate's peaks on one line."""
    on_device = f"{human_bytes(facts['device_bytes'])} on {device}, " if facts["device_bytes"] else ""
    return (
        f"about {on_device}{human_bytes(facts['host_bytes'])} of host memory, {human_bytes(facts['disk_bytes'])} of "
        f"disk and {human_flops(facts['flops'])}: {human_time(facts['seconds_roughly'])}, very roughly"
    )


def print_estimate(facts: dict[str, Any], device: str) -> None:
    """Prints an estimate's peaks and what makes them up."""
    for place, name in (("device", f"memory of {device}"), ("host", "host memory"), ("disk", "disk")):
        if count := facts[f"{place}_bytes"]:
            most = list(itertools.islice(facts["breakdown"][place].items(), 3))
            parts = ", ".join(f"{what} {human_bytes(size)}" for what, size in most)
            print(
                f"  {name:16s} {human_bytes(count):>8s}: {parts}{', ...' if len(facts['breakdown'][place]) > 3 else ''}"
            )
    seconds = facts["seconds_roughly"]
    roughly = f"no time, for there is no {device} here" if seconds is None else f"{human_time(seconds)} on {device}"
    print(f"  {'work':16s} {human_flops(facts['flops'])}: {roughly}{'' if seconds is None else ', very roughly'}")
