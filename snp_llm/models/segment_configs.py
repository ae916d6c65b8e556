"""Configs of pruned convolutional networks: a plain one where that can hold the widths, else shapes by module."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from snp_llm.models.modeling_snp_vgg import SnpVggConfig
from snp_llm.models.projections import Projection
from snp_llm.models.registry import auto_class, dense_type, pruned_config_class
from snp_llm.models.segments import Segments, find_segments
from snp_llm.models.site import Site

PRIVATE = ("pruned_shapes", "auto_map", "model_type", "architectures", "transformers_version", "dtype")

REDUCTION = 4  # how many times narrower a bottleneck of transformers' ResNet is than what it puts out


def segments_config(dense: PreTrainedModel, blocks: Segments, pruned: nn.ModuleList) -> PretrainedConfig:
    """The config that describes pruned blocks.

    Args:
        dense: as it was loaded.
        blocks: its own.
        pruned: in their place.
    """
    shapes: dict[str, list[int]] = {}
    widths: dict[str, int] = {}
    for index, (old, new) in enumerate(zip(blocks, pruned, strict=True)):
        modules = dict(new.named_modules())
        for path, module in old.named_modules():
            name = blocks.named(index, path)
            if isinstance(module, Projection | nn.BatchNorm2d):
                widths[name], shape = len(modules[path].weight), _shape(modules[path])
                if shape != _shape(module):
                    shapes[name] = shape
    values = {key: value for key, value in dense.config.to_dict().items() if key not in PRIVATE}
    if isinstance(dense.config, SnpVggConfig):
        return SnpVggConfig(**{**values, **_vgg_widths(dense, widths)})
    plain = _resnet_config(values, widths, dense)
    if plain is not None:
        return plain
    before = getattr(dense.config, "pruned_shapes", None) or {}
    name = f"modeling_snp.Snp{type(dense).__name__.removeprefix('Snp')}"
    described: dict[str, Any] = {
        "pruned_shapes": {**before, **shapes},
        "auto_map": {auto_class(dense.config).__name__: name},
    }
    return pruned_config_class(dense_type(dense.config))(**{**values, **described})


def _shape(module: Any) -> list[int]:
    """Rows and columns of a layer; a norm has no columns."""
    weight = module.weight
    return [*weight.shape[:2]] if weight.dim() > 1 else [len(weight), 0]


def _vgg_widths(dense: Any, widths: dict[str, int]) -> dict[str, Any]:
    convolutions = iter(
        [widths[f"features.{name}"] for name, m in dense.features.named_children() if isinstance(m, nn.Conv2d)]
    )
    linear = [widths[f"classifier.{name}"] for name, m in dense.classifier.named_children() if isinstance(m, nn.Linear)]
    layers = [layer if layer == "M" else next(convolutions) for layer in dense.config.layers]
    return {"layers": layers, "fc_sizes": linear[:-1]}


def _resnet_config(values: dict[str, Any], widths: dict[str, int], dense: PreTrainedModel) -> PretrainedConfig | None:
    """The plain config of a ResNet whose widths are those that a config makes, or None."""
    stem = widths["resnet.embedder.embedder.convolution"]
    stages, bottleneck = len(values["depths"]), values["layer_type"] == "bottleneck"
    hidden = [
        widths[f"resnet.encoder.stages.{stage}.layers.0.layer.{2 if bottleneck else 1}.convolution"]
        for stage in range(stages)
    ]
    for name, width in widths.items():
        if ".stages." not in name or name.split(".layer.")[-1].startswith("2") or "shortcut" in name:
            continue
        whole = hidden[int(name.split(".")[3])]
        if width != (whole // REDUCTION if bottleneck else whole):
            return None
    kept = {key: value for key, value in values.items() if key not in ("embedding_size", "hidden_sizes")}
    return AutoConfig.for_model(dense_type(dense.config), **kept, embedding_size=stem, hidden_sizes=hidden)


def tied_pools(dense: PreTrainedModel, sites: Sequence[Site]) -> list[str | None]:
    """What ties the units of sites to those of others in a plain config: the stage of a ResNet; None: nothing."""
    if isinstance(dense.config, SnpVggConfig):
        return [None] * len(sites)
    blocks = find_segments(dense)
    assert blocks is not None
    found: list[str | None] = []
    for site in sites:
        made = blocks.prefixes[site.shared.producers[0][0] if site.shared is not None else site.block]
        found.append(made.split(".")[3] if ".stages." in made else None)
    return found
