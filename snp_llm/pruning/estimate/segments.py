"""What pruning a convolutional network takes: memory, disk and work, from its layers' shapes."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from snp_llm.linalg.gram import triangle_flops
from snp_llm.models.anatomy import Anatomy, find_anatomy
from snp_llm.models.positions import site_positions
from snp_llm.models.segments import Segments
from snp_llm.models.site import Site, outputs_of
from snp_llm.models.size import model_size
from snp_llm.models.task import image_shape
from snp_llm.pruning.algebra import algebra_dtype
from snp_llm.pruning.cut import cut_flops
from snp_llm.pruning.estimate.memory import LIBRARIES, Part
from snp_llm.pruning.estimate.work import Work
from snp_llm.pruning.factor import algebra_bytes, factor_flops, loss_curve_flops
from snp_llm.pruning.sensitivity import IMAGES, needs_curves
from snp_llm.pruning.statistics import sums_bytes
from snp_llm.pruning.widths.costs import pruned_bytes
from snp_llm.recipe.recipe import ResolvedRecipe
from snp_llm.runtime.device import device_name


def segments_estimate(model: PreTrainedModel, recipe: ResolvedRecipe) -> tuple[list[Part], list[Work]]:
    """Bytes of everything and FLOPs of every step.

    Args:
        model: a convolutional network, or its skeleton.
        recipe: all settings.
    """
    anatomy = find_anatomy(model)
    return [*_memory(anatomy, recipe)], [*_work(anatomy, recipe)]


def _memory(anatomy: Anatomy, recipe: ResolvedRecipe) -> Iterator[Part]:
    model, item = anatomy.model, anatomy.model.dtype.itemsize
    size, maps = model_size(model, recipe.seq_len), _maps(anatomy)
    device = "host" if device_name(recipe.device) == "cpu" else "device"
    waiting = {"disk": "disk", "cpu": "host"}.get(recipe.hidden_device, device)
    batch, gone_back = min(recipe.batch_size, recipe.num_samples), min(IMAGES, recipe.num_samples)
    yield Part("", "host", "libraries", "Python and its libraries", LIBRARIES)
    pixels = recipe.num_samples * torch.Size(image_shape(model.config)).numel() * item
    yield Part("", "host", "tokens", "calibration images", pixels)
    yield Part(
        "", "disk", "model", "the pruned model, block by block and then in shards", 2 * pruned_bytes(size, recipe)
    )
    yield Part("", device, "block", "the largest block and its copy", 2 * max(_block_bytes(anatomy)))
    both = max(a + b for a, b in zip([0, *maps], [*maps, 0], strict=True))
    yield Part("prune", waiting, "hidden", "feature maps of all images", recipe.num_samples * both * item)
    if recipe.needs_gradients:
        entering = gone_back * sum(maps) * item
        yield Part("gradients", waiting, "visit", "what enters every block, kept for the way back", entering)
    parts = {"drifting": False, "holding_out": recipe.holds_out}
    for site, d in _sites(anatomy):
        sums = sums_bytes(site.channels, d, model.dtype, **parts)
        yield Part(f"prune {site.name}", device, "sums", "sums of inputs", sums)
        algebra = algebra_bytes(d, site.channels, model.dtype, recipe)
        yield Part(f"prune {site.name}", device, "algebra", "linear algebra of a site", algebra)
        patches = 3 * batch * _positions(anatomy, site) * site.channels * 4
        yield Part(f"prune {site.name}", device, "activations", "patches of one batch", patches)


def _work(anatomy: Anatomy, recipe: ResolvedRecipe) -> Iterator[Work]:
    model, count = anatomy.model, recipe.num_samples
    dtype, forward = model.dtype, model_size(model, recipe.seq_len).flops
    sums = torch.promote_types(dtype, torch.float32)
    moments = sum(triangle_flops(site.channels) * _positions(anatomy, site) for site, _ in _sites(anatomy))
    if recipe.needs_gradients:
        yield Work("visit: there and back", 3 * forward * min(IMAGES, count), dtype)
    if needs_curves(recipe, anatomy.sites):
        yield Work("visit: forwards", forward * count, dtype)
        yield Work("visit: sums", moments * count, sums)
    yield Work("pruned pass", 2 * forward * count, dtype)
    yield Work("sums", moments * count, sums)
    for site, d in _sites(anatomy):
        n, kind = site.channels, algebra_dtype(site.channels, dtype)
        if needs_curves(recipe, anatomy.sites):
            curves = factor_flops(d, n, recipe) + (loss_curve_flops(d, n) if recipe.needs_gradients else 0)
            yield Work("visit: linear algebra", curves, kind, algebra=True)
        width = round((1 - recipe.sparsity_of(site.kind)) * site.units)
        yield Work("linear algebra", cut_flops(d, site, width, recipe), kind, algebra=True)


def _sites(anatomy: Anatomy) -> list[tuple[Site, int]]:
    """Sites, each with what is repaired to be right there: outputs or, where these are mixed, its own channels."""
    return [(s, s.channels if s.taps else outputs_of(anatomy.blocks[s.block], s)) for s in anatomy.sites]


def _positions(anatomy: Anatomy, site: Site) -> int:
    assert isinstance(anatomy.blocks, Segments)
    return site_positions(anatomy.model, anatomy.blocks, site)


def _maps(anatomy: Anatomy) -> list[int]:
    """Values that each block gets of an image, about: as its first layer puts out, or the image itself."""
    first = {site.block: site for site in reversed(anatomy.sites)}
    pixels = torch.Size(image_shape(anatomy.model.config)).numel()
    found = []
    for index in range(len(anatomy.blocks)):
        site = first.get(index)
        found.append(pixels if site is None else site.units * max(_positions(anatomy, site), 1))
    return found


def _block_bytes(anatomy: Anatomy) -> list[int]:
    return [sum(p.numel() * p.element_size() for p in block.parameters()) for block in anatomy.blocks]
