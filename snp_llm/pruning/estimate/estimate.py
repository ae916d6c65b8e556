"""What a run will take: memory, disk and work, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.pruning.estimate.memory import (
    Part,
    always_held,
    curve_memory,
    disk_needed,
    gradient_memory,
    peak_part,
    prune_memory,
)
from snp_llm.pruning.estimate.shapes import read_shapes
from snp_llm.pruning.estimate.work import ALGEBRA_SPEED, Work, work_by_phase
from snp_llm.recipe.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """What a prune takes at its peak. Where the device is the CPU, host memory holds the device's part as well.

    Attributes:
        device_bytes, host_bytes, disk_bytes: the largest of the phases' sums.
        breakdown: all parts.
        work: all FLOPs.
    """

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    breakdown: tuple[Part, ...]
    work: tuple[Work, ...]

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.work)

    def parts(self, place: str) -> list[Part]:
        """The parts that make up the peak of a place, largest first."""
        return sorted(peak_part(self.breakdown, place), key=lambda part: -part.bytes)

    def seconds(self, rates: Mapping[torch.dtype, float]) -> float:
        """Roughly how long, from FLOPs a second by dtype (`matmul_rates`)."""
        return sum(w.flops / rates[w.dtype] / (ALGEBRA_SPEED if w.algebra else 1.0) for w in self.work)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {work.dtype for work in self.work}


def estimate(model: PreTrainedModel, recipe: Recipe) -> Estimate:
    """What `recipe` takes on a model; weights are not looked at, so that a skeleton on the meta device will do.

    Evaluation is left out: it takes a whole model on the device where that fits, and is skipped where it does not.

    Args:
        model: dense model, or its skeleton.
        recipe: all settings, resolved (`pipeline.resolve`).
    """
    assert recipe.seq_len is not None
    shapes = read_shapes(model, recipe)
    parts = [*always_held(shapes, recipe), *prune_memory(shapes, recipe), *disk_needed(shapes, recipe)]
    if recipe.needs_gradients:
        parts += gradient_memory(shapes, recipe)
    if recipe.allocation in NEEDS_CURVES:
        parts += curve_memory(shapes, recipe)
    parts = [part for part in parts if part.bytes]
    on_cpu = shapes.device == "cpu"
    if on_cpu:
        parts = [replace(part, place="host") if part.place == "device" else part for part in parts]
    sums = {place: sum(part.bytes for part in peak_part(parts, place)) for place in ("device", "host", "disk")}
    work = tuple(w for w in work_by_phase(shapes, recipe) if w.flops)
    return Estimate(sums["device"], sums["host"], sums["disk"], tuple(parts), work)
