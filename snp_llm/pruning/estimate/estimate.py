"""What a run will take: memory, disk and work, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from snp_llm.models.anatomy import find_blocks
from snp_llm.models.segments import Segments
from snp_llm.models.size import routed_weights
from snp_llm.models.task import TEXT, task_of
from snp_llm.pruning.estimate.memory import Part, memory_parts, peak_parts
from snp_llm.pruning.estimate.segments import segments_estimate
from snp_llm.pruning.estimate.shapes import read_shapes
from snp_llm.pruning.estimate.work import ALGEBRA_SPEED, Work, work_by_phase
from snp_llm.pruning.refine import FEWEST_STEPS, MOST_STEPS
from snp_llm.recipe.recipe import ResolvedRecipe
from snp_llm.runtime.device import device_name, devices_here, has_room

STEPS_SPEED = 0.6  # of the rate of large products that steps of refinement reach, which are of few tokens

ROOM = 1.25  # of the estimated peak, that has to be free: workspaces of libraries and fragments come on top


@dataclass(frozen=True)
class Estimate:
    """What a prune takes. Where the device is the CPU, host memory holds the device's part as well.

    Attributes:
        breakdown: bytes of everything, phase by phase.
        work: all FLOPs.
    """

    breakdown: tuple[Part, ...]
    work: tuple[Work, ...]

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.work)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {work.dtype for work in self.work}

    def parts(self, place: str) -> list[Part]:
        """The parts that make up the peak of a place, "device", "host" or "disk", largest first."""
        return peak_parts(self.breakdown, place)

    def peak(self, place: str) -> int:
        """Bytes that a place holds at most."""
        return sum(part.bytes for part in self.parts(place))

    def seconds(self, rates: Mapping[torch.dtype, float]) -> float:
        """Roughly how long, from FLOPs a second by dtype (`matmul_rates`)."""
        return sum(w.flops / rates[w.dtype] / (ALGEBRA_SPEED if w.algebra else 1.0) for w in self.work)


def estimate(model: PreTrainedModel, recipe: ResolvedRecipe) -> Estimate:
    """What `recipe` takes on a model; weights are not looked at, so that a skeleton on the meta device will do.

    Evaluation is left out: it takes a whole model on the device where that fits, and is skipped where it does not.

    Args:
        model: dense model, or its skeleton.
        recipe: all settings.
    """
    recipe = decide(model, recipe)
    if isinstance(find_blocks(model), Segments):
        parts, work = segments_estimate(model, recipe)
        return Estimate(tuple(part for part in parts if part.bytes), tuple(work))
    shapes = read_shapes(model, recipe)
    return Estimate(tuple(part for part in memory_parts(shapes) if part.bytes), tuple(work_by_phase(shapes)))


def decide(model: PreTrainedModel, recipe: ResolvedRecipe) -> ResolvedRecipe:
    """The recipe with what follows from an estimate made definite: where hidden states wait, and steps of refinement.

    Hidden states wait on a GPU that has room for the whole run, else on the CPU.

    Args:
        model: dense model, or its skeleton.
        recipe: all settings.
    """
    if recipe.refine_steps is None:
        recipe = replace(recipe, refine=affordable_steps(model, recipe) or "none")
    if recipe.hidden_device != "auto":
        return recipe
    device = device_name(recipe.device)
    if device == "cuda" and device in devices_here():
        on_device = replace(recipe, hidden_device="cuda")
        if has_room(torch.device(device), ROOM * estimate(model, on_device).peak("device")):
            return on_device
    return replace(recipe, hidden_device="cpu")


def affordable_steps(model: PreTrainedModel, recipe: ResolvedRecipe) -> int:
    """Steps of refinement that are worth taking and take no longer than the rest of the run; 0 where there are none.

    Models of images, and those with experts that tokens are routed to, are not refined unless that is asked for: what
    is right for them was not measured.
    """
    if task_of(model.config) is not TEXT or routed_weights(model):
        return 0
    resting = replace(recipe, hidden_device="cpu")
    recipes = [replace(resting, refine="none"), *(replace(resting, refine=steps) for steps in (1, 2))]
    estimates = (estimate(model, recipe) for recipe in recipes)
    rest, once, more = (sum(w.flops / (ALGEBRA_SPEED if w.algebra else 1.0) for w in e.work) for e in estimates)
    steps = 1 + int(((1 + STEPS_SPEED) * rest - once) / (more - once))
    return 0 if steps < FEWEST_STEPS else min(steps, MOST_STEPS)
