"""Convolutional networks as blocks, each from feature map to feature map, and the sites in and between them.

The first block takes pixels, the last puts out logits. Channels between two convolutions of a block are a site like
those of an FFN. Channels that one block puts out and others read, as the stream of a ResNet's stage, are shared: each
reader is a site, and all of these keep the same units.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from snp_llm.models.projections import Projection, projection, weight_of
from snp_llm.models.site import Producer, Rows, Shared, Site
from snp_llm.runtime.errors import SnpError

WIDEST_PATCH = 4608  # columns of a convolution, from which on its channels are repaired, and not their patches


class Segments(nn.ModuleList):
    """Blocks that are all of a model.

    Attributes:
        prefixes: what stands in the model's names of tensors before those of each block.
        chain: of the layers in them.
    """

    def __init__(self, blocks: Sequence[tuple[str, nn.Module]], chain: "Chain") -> None:
        super().__init__([block for _, block in blocks])
        self.prefixes = [prefix for prefix, _ in blocks]
        self.chain = chain

    def named(self, block: int, path: str) -> str:
        """What is at a path of a block, by its path in the model."""
        return f"{self.prefixes[block]}.{path}".removeprefix(".")


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer in a block.

    Attributes:
        block: its number.
        path: from the block.
        norm: path of the batch norm on its output; empty without.
    """

    block: int
    path: str
    norm: str = ""


@dataclass
class Chain:
    """Which layers make channels, and which read them.

    Attributes:
        inner: pairs of layers in one block, in the order in which they are run.
        shared: by name, the layers that make channels and those that read them.
    """

    inner: list[tuple[Layer, Layer]] = field(default_factory=list)
    shared: dict[str, tuple[list[Layer], list[Layer]]] = field(default_factory=dict)


def find_segments(model: PreTrainedModel) -> Segments | None:
    """The blocks of a convolutional network; None for a model of another kind.

    Raises:
        SnpError: it has layers that cannot lose channels.
    """
    make = SEGMENTS.get(str(model.config.model_type).removeprefix("snp_"))
    if make is None:
        return None
    _check_apart(model)
    return make(model)


def resnet_segments(model: Any) -> Segments:
    """A ResNet of transformers: its stem, its residual blocks, and its head."""
    resnet, chain = model.resnet, Chain()
    blocks: list[tuple[str, nn.Module]] = [("resnet.embedder", resnet.embedder)]
    made = [Layer(0, "embedder.convolution", "embedder.normalization")]
    stream: tuple[list[Layer], list[Layer]] = (made, [])
    chain.shared["stem"] = stream
    for stage, module in enumerate(resnet.encoder.stages):
        for number, block in enumerate(module.layers):
            index = len(blocks)
            blocks.append((f"resnet.encoder.stages.{stage}.layers.{number}", block))
            layers = [
                Layer(index, f"layer.{i}.convolution", f"layer.{i}.normalization") for i in range(len(block.layer))
            ]
            stream[1].append(layers[0])
            chain.inner += pairwise(layers)
            if not isinstance(block.shortcut, nn.Identity):
                if not isinstance(getattr(block.shortcut, "convolution", None), nn.Conv2d):
                    raise SnpError(
                        f"{blocks[-1][0]}.shortcut: is a {type(block.shortcut).__name__}; expected a convolution, or "
                        "none. Shortcuts that fill up with zeros cannot lose channels."
                    )
                shortcut = Layer(index, "shortcut.convolution", "shortcut.normalization")
                stream[1].append(shortcut)
                stream = ([shortcut], [])
                chain.shared[f"stage {stage + 1}"] = stream
            stream[0].append(layers[-1])
    stream[1].append(Layer(len(blocks), "classifier.1"))
    head = nn.Sequential(OrderedDict(pooler=resnet.pooler, classifier=model.classifier))
    return Segments([*blocks, ("", head)], chain)


def vgg_segments(model: Any) -> Segments:
    """A VGG: a block for each convolution and what comes after it, and its head."""
    chain, blocks = Chain(), []
    parts: list[OrderedDict[str, nn.Module]] = []
    for name, module in model.features.named_children():
        if isinstance(module, nn.Conv2d):
            parts.append(OrderedDict())
        parts[-1][name] = module
    last: Layer | None = None
    for index, part in enumerate(parts):
        names = list(part)
        norm = next((name for name in names if isinstance(part[name], nn.BatchNorm2d)), "")
        layer = Layer(index, names[0], norm)
        if last is not None:
            chain.shared[f"convolution {index}"] = ([last], [layer])
        blocks.append(("features", nn.Sequential(part)))
        last = layer
    assert last is not None
    head: OrderedDict[str, nn.Module] = OrderedDict(
        avgpool=model.avgpool, flatten=nn.Flatten(1), classifier=model.classifier
    )
    blocks.append(("", nn.Sequential(head)))
    linear = [f"classifier.{name}" for name, m in model.classifier.named_children() if isinstance(m, nn.Linear)]
    layers = [Layer(len(parts), path) for path in linear]
    chain.shared[f"convolution {len(parts)}"] = ([last], layers[:1])
    chain.inner += pairwise(layers)
    return Segments(blocks, chain)


SEGMENTS: dict[str, Callable[[PreTrainedModel], Segments]] = {
    "resnet": resnet_segments,
    **dict.fromkeys(("vgg", "vgg_bn"), vgg_segments),
}


def segment_sites(blocks: Segments) -> list[Site]:
    """The sites in and between the blocks of a convolutional network, in the order in which they are cut.

    Raises:
        SnpError: with the layer's name, where its channels cannot go.
    """
    _check_layers(blocks)
    found: list[Site] = []
    order: dict[tuple[int, str], int] = {}
    for name, (makers, readers) in blocks.chain.shared.items():
        shared = Shared(name, tuple((made.block, p) for made in makers for p in _producers(blocks, made)))
        units = _outputs(blocks, makers[0])
        for made in makers:
            if _outputs(blocks, made) != units:
                raise SnpError(
                    f"{blocks.named(made.block, made.path)}: has {_outputs(blocks, made)} channels where {units} are "
                    "added to; expected as many. Shortcuts that fill up with zeros cannot lose channels."
                )
        for reader in readers:
            order[reader.block, reader.path] = 0
            found.append(_site(blocks, "stream" if len(readers) > 1 else "convolution", 0, (), reader, units, shared))
    for made, reader in blocks.chain.inner:
        stage = order[reader.block, reader.path] = order.get((made.block, made.path), 0) + 1
        kind = "convolution" if isinstance(_module(blocks, reader), nn.Conv2d) else "linear"
        found.append(_site(blocks, kind, stage, _producers(blocks, made), reader, _outputs(blocks, made), None))
    return sorted(found, key=lambda site: (site.block, site.stage))


def _site(
    blocks: Segments,
    kind: str,
    stage: int,
    producers: tuple[Producer, ...],
    reader: Layer,
    units: int,
    shared: Shared | None,
) -> Site:
    module = _module(blocks, reader)
    columns = weight_of(module).shape[1]
    if columns % units:
        name = blocks.named(reader.block, reader.path)
        raise SnpError(f"{name}: reads {columns:,} columns; expected a multiple of {units} channels.")
    taps = columns // units
    mixed = columns > WIDEST_PATCH and taps > 1
    return Site(
        block=reader.block,
        kind=kind,
        stage=stage,
        producers=producers,
        consumers=(reader.path,),
        module=None,
        units=units,
        unit_size=1 if mixed else taps,
        cost=taps * len(weight_of(module)),
        parameters=weight_of(module).numel(),
        taps=taps if mixed else 0,
        norm=reader.norm,
        shared=shared,
    )


def _producers(blocks: Segments, layer: Layer) -> tuple[Producer, ...]:
    rows = (Rows(_outputs(blocks, layer), 1),)
    return (Producer(layer.path, rows), *((Producer(layer.norm, rows),) if layer.norm else ()))


def _module(blocks: Segments, layer: Layer) -> Projection:
    return projection(blocks[layer.block], layer.path)


def _outputs(blocks: Segments, layer: Layer) -> int:
    return len(weight_of(_module(blocks, layer)))


def _check_apart(model: PreTrainedModel) -> None:
    """Refuses layers in two places, and two layers of one tensor: a cut of one would be one of the other."""
    seen: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Projection) and (other := seen.setdefault(id(module.weight), name)) != name:
            raise SnpError(f"{name}: shares its weights with {other}; expected a tensor of its own. Untie them first.")


def _check_layers(blocks: Segments) -> None:
    """Refuses layers whose channels belong together in another way than these sites say."""
    for index, block in enumerate(blocks):
        for path, module in block.named_modules():
            name = blocks.named(index, path)
            if isinstance(module, nn.Conv2d) and (module.groups > 1 or isinstance(module.padding, str)):
                what = "depthwise" if module.groups == module.in_channels else "grouped"
                raise SnpError(f"{name}: is a {what} convolution; expected one of one group. It is not supported.")
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is None:
                raise SnpError(f"{name}: is a batch norm without running statistics; expected them.")
