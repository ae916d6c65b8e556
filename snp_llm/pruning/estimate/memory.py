"""Bytes that each phase of a run holds, on the device, in host memory and on disk.

Adds up what modules say of what they hold; knows what is held at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from snp_llm.data.windows import BYTES_A_TOKEN
from snp_llm.models.anatomy import embedding_rows
from snp_llm.models.site import Site
from snp_llm.models.size import activation_bytes
from snp_llm.pruning.estimate.shapes import Shapes
from snp_llm.pruning.factor import algebra_bytes
from snp_llm.pruning.refine import STATE, steps_windows
from snp_llm.pruning.statistics import sums_bytes, wants_files
from snp_llm.pruning.widths.costs import pruned_bytes

LIBRARIES = 600_000_000  # bytes that Python, torch, transformers and the dataset library take with nothing loaded

CUDA_WORKSPACES = 100_000_000  # bytes that cuBLAS and cuSOLVER take on a device, once they are used


@dataclass(frozen=True)
class Part:
    """Bytes of one thing during one phase.

    Attributes:
        phase: of the run, and all whose names begin with it: "" is always. Sums and algebra are phases of their own,
            for activations have gone when a site is factored.
        place: "device", "host" or "disk".
        kind: key of `REMEDIES`.
        what: for people.
        bytes: of it.
    """

    phase: str
    place: str
    kind: str
    what: str
    bytes: int


def peak_parts(parts: Sequence[Part], place: str) -> list[Part]:
    """The parts of the phase that takes most in a place, largest first."""
    here = sorted((part for part in parts if part.place == place), key=lambda part: -part.bytes)
    phases = ([part for part in here if phase.startswith(part.phase)] for phase in sorted({p.phase for p in here}))
    return max(phases, key=lambda phase: sum(part.bytes for part in phase), default=[])


def memory_parts(shapes: Shapes) -> Iterator[Part]:
    """All parts, those of no bytes among them. Where the device is the CPU, the host holds the device's."""
    recipe, model, d, block = shapes.recipe, shapes.anatomy.model, shapes.hidden, shapes.block_bytes
    device, waiting, apart = shapes.device_place, shapes.waiting_place, shapes.device != "cpu"
    states, referred, visited = (shapes.waiting(n) for n in (recipe.num_samples, shapes.referred, shapes.visited))
    dense = shapes.waiting(max(shapes.referred, shapes.refined))
    # Beside a GPU the process that will reload the model reads its own meanwhile.
    yield Part("", "host", "libraries", "Python and its libraries", LIBRARIES * (1 + (shapes.device == "cuda")))
    yield Part("", device, "libraries", "workspaces of CUDA's libraries", CUDA_WORKSPACES * (shapes.device == "cuda"))
    yield Part("", "host", "rest", "embeddings, norms and head", shapes.rest_bytes)
    yield Part("", "host", "block", "a block read and a block written", 2 * block * apart)
    yield Part("", "host", "tokens", "calibration text", recipe.num_samples * recipe.seq_len * BYTES_A_TOKEN)
    written = 2 * pruned_bytes(shapes.size, recipe)
    yield Part("", "disk", "model", "the pruned model, block by block and then in shards", written)
    yield Part("", "disk", "hidden", "hidden states, from which to resume", states + dense)
    all_at_hand = apart and recipe.hidden_device == shapes.device  # as a visit has them
    visited_blocks, at_hand = ("all dense blocks", shapes.blocks_bytes) if all_at_hand else ("a dense block", block)
    if shapes.gone_back:
        entering = (len(shapes.anatomy.blocks) + 2) * shapes.waiting(shapes.gone_back)
        logits = recipe.seq_len * embedding_rows(model) * (model.dtype.itemsize + 3 * 4)
        yield Part("", "disk", "gradients", "gradients of all sites", len(shapes.anatomy.sites) * 4 * d * d)
        yield Part("gradients", waiting, "visit", "what enters every block, kept for the way back", entering)
        yield Part("gradients, back", device, "block", visited_blocks, at_hand)
        yield Part("gradients, back", device, "sums", "gradient moments of both sites", 2 * 4 * d * d)
        yield Part("gradients, back", "host", "gradients", "gradients of a block's sites", 2 * 2 * 4 * d * d)
        yield _activations("gradients, back", shapes)
        # The loss comes between the ways there and back, when no block is there.
        yield Part("gradients, loss", device, "rest", "embeddings, norms and head", shapes.rest_bytes * apart)
        yield Part("gradients, loss", device, "logits", "logits of one window and their gradient", logits)
    if shapes.visited:
        yield Part("curves", device, "block", visited_blocks, at_hand)
        arriving = visited * any(site.mixture is not None for site in shapes.anatomy.sites)
        yield Part("curves", waiting, "visit", "hidden states of the visit", visited + arriving)
        yield from _sites("curves", shapes, shapes.widest, drifting=False, holding_out=recipe.needs_gradients)
    yield from _measured(shapes, visited_blocks, at_hand)
    kept = [site for site in shapes.widest[:-1] if not site.whole_block]
    inputs = sum(shapes.waiting(recipe.num_samples, site.channels) for site in kept)
    yield Part("prune", device, "block", "a dense block and its copy", 2 * block)
    yield Part("prune", waiting, "hidden", "hidden states of the calibration tokens", 2 * states + inputs)
    arriving = states * any(site.mixture is not None for site in shapes.anatomy.sites)
    yield Part("prune", waiting, "hidden", "what arrives at experts", arriving)
    yield Part("prune", waiting, "hidden", "hidden states of the dense model", dense + 2 * referred)
    widest = max(shapes.widest, key=lambda site: site.channels)
    yield from _sites("prune", shapes, [widest], drifting=referred > 0, holding_out=recipe.holds_out)
    if shapes.refined:
        parameters = block // model.dtype.itemsize
        yield Part(
            "prune, refined", device, "block", "a block's parameters with the optimizer's state", 4 * STATE * parameters
        )
        batch = steps_windows(recipe.seq_len)
        alive = sum(activation_bytes(model, site, batch, recipe.seq_len) for site in shapes.widest)
        wide = 4 // min(4, model.dtype.itemsize)
        yield Part("prune, refined", device, "activations", "activations of one step", 3 * wide * alive)


def _measured(shapes: Shapes, blocks: str, at_hand: int) -> Iterator[Part]:
    """Cuts that are measured on the dense model.

    Args:
        shapes: of the run.
        blocks, at_hand: which dense blocks a visit has on the device, for people, and their bytes.
    """
    if not shapes.measured:
        return
    model, device = shapes.anatomy.model, shapes.device_place
    waits = shapes.waiting(shapes.measured * (len(shapes.cuts) + 1))
    weights = shapes.hidden * model.dtype.itemsize * sum(width * site.unit_size for site, width in shapes.cuts)
    logits = 4 * 4 * shapes.recipe.seq_len * embedding_rows(model)
    rest = shapes.rest_bytes * (shapes.device != "cpu")
    yield Part("", "disk", "model", "what is kept of the cuts that are measured", weights)
    yield Part("measured", shapes.waiting_place, "visit", "hidden states of the cuts that are measured", waits)
    yield Part("measured, blocks", device, "block", f"{blocks}, and one with a cut", at_hand + shapes.block_bytes)
    yield _activations("measured, blocks", shapes)
    yield Part("measured, divergence", device, "rest", "embeddings, norms and head", rest)
    yield Part("measured, divergence", device, "logits", "predictions of a window, dense and cut", logits)


def _sites(phase: str, shapes: Shapes, sites: Sequence[Site], *, drifting: bool, holding_out: bool) -> Iterator[Part]:
    """Sums of sites, wherever they wait, and either activations, which come in batches, or algebra after the last."""
    recipe, d, dtype, device = shapes.recipe, shapes.hidden, shapes.anatomy.model.dtype, shapes.device_place
    parts = {"drifting": drifting, "holding_out": holding_out}
    parts["some_unreferred"] = drifting and shapes.referred < recipe.num_samples
    storage = None if recipe.hidden_device == "disk" else torch.device("cpu")
    size = {device: 0, "disk": 0}
    for n in (site.channels for site in sites):
        size["disk" if wants_files(n, storage, shapes.device) else device] += sums_bytes(n, d, dtype, **parts)
    for place, count in size.items():
        yield Part(phase, place, "sums", "sums of inputs", count)
    yield _activations(f"{phase}, sums", shapes)
    algebra = algebra_bytes(d, max(site.channels for site in sites), dtype, recipe)
    yield Part(f"{phase}, algebra", device, "algebra", "linear algebra of a site", algebra)


def _activations(phase: str, shapes: Shapes) -> Part:
    """Activations of one batch: all of a block's for the way back, else only those alive at the widest place.

    Sums are taken in float32: a copy of the inputs, split into windows held out and others. (Where half precision is
    multiplied as it is, a product of column blocks takes the place of one copy, and is smaller.)
    """
    batch, model = min(shapes.recipe.batch_size, shapes.recipe.num_samples), shapes.anatomy.model
    copies = max(site.channels for site in shapes.widest) * (4 + model.dtype.itemsize)
    alive = [activation_bytes(model, site, batch, shapes.recipe.seq_len) for site in shapes.widest]
    size = batch * shapes.recipe.seq_len * copies + (2 * sum(alive) if phase.endswith("back") else max(alive))
    return Part(phase, shapes.device_place, "activations", "activations of one batch", size)
