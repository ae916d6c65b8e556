"""What `snp-llm inspect` shows of a convolutional network. Prints, and parses no arguments."""

from typing import Any

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.positions import layer_positions
from snp_llm.models.segments import Segments
from snp_llm.models.size import model_size
from snp_llm.models.task import image_shape, task_of
from snp_llm.pruning.shared import readers
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.numbers import human_bytes
from snp_llm.runtime.terminal import print_table, table_of


def inspect_segments(anatomy: Anatomy, recipe: Recipe) -> dict[str, Any]:
    """Everything that is shown, ready for JSON, but for what a prune takes.

    Args:
        anatomy: of a network or its skeleton.
        recipe: of a prune.
    """
    model, blocks, counts = anatomy.model, anatomy.blocks, layer_positions(anatomy.model)
    assert isinstance(blocks, Segments)
    size, shared = model_size(model, 1), readers(anatomy)
    sites = [
        {
            "site": blocks.named(site.block, site.path),
            "kind": site.kind,
            "units": site.units,
            "columns_a_unit": site.taps or site.unit_size,
            "mixed": bool(site.taps),
            "positions": counts.get(blocks.named(site.block, site.path), 1),
            "shared": None if site.shared is None else site.shared.name,
            "readers": 1 if site.shared is None else len(shared[site.shared]),
        }
        for site in anatomy.sites
    ]
    return {
        "model": recipe.model,
        "task": task_of(model.config).name,
        "family": anatomy.family.name,
        "model_type": model.config.model_type,
        "segments": len(blocks),
        "image": list(image_shape(model.config)),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": {"all": size.parameters},
        "bytes": size.bytes,
        "flops_an_image": size.flops,
        "block_linear": size.block_linear,
        "sites": sites,
    }


def print_segments(facts: dict[str, Any]) -> None:
    """Prints an inspection for people."""
    image = " x ".join(map(str, facts["image"]))
    print(
        f"{facts['model']}: {facts['family']} ({facts['model_type']}), {facts['segments']} segments, images of "
        f"{image}, {facts['dtype']}, {facts['parameters']['all']:,} parameters, {human_bytes(facts['bytes'])} of "
        f"weights, {facts['flops_an_image'] / 1e6:,.1f} MFLOPs an image"
    )
    columns = ("read by", "kind", "channels", "columns each", "positions", "shared by")
    rows = [
        (
            site["site"],
            site["kind"],
            f"{site['units']:,}",
            f"{site['columns_a_unit']}{' mixed' if site['mixed'] else ''}",
            f"{site['positions']:,}",
            "-" if site["readers"] == 1 else f"{site['shared']}, {site['readers']} readers",
        )
        for site in facts["sites"]
    ]
    print_table(table_of(columns, rows))
    print(f"Sparsity is a share of the weights of all linear layers and convolutions: {facts['block_linear']:,}.")
    print(f"A prune on {facts['prune']['windows']} images, evaluation not counted:")
