"""A model as an ONNX graph: tokens or pixels in, logits out, of any batch and any length, with a cache or without."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from snp_llm.engines.extras import needed
from snp_llm.models.calls import with_cache, without_cache
from snp_llm.models.task import TEXT, image_shape, task_of
from snp_llm.runtime.errors import SnpError, reason

FILE = "model.onnx"

LONGEST, LARGEST_BATCH = 1 << 20, 4096  # that the graph takes

# What is compared, windows and tokens: a batch of one, a single token, and more of both than was traced.
SHAPES = ((2, 16), (1, 7), (3, 40), (1, 1))

BEFORE = 9  # of the traced tokens are those that a cache holds


class Logits(nn.Module):
    """Tokens or pixels in, logits out, which is all that a graph has."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.options = model, without_cache(model)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of (batch, T) tokens or (batch, channels, height, width) pixels."""
        logits: Tensor = self.model(inputs, **self.options).logits
        return logits


class WithCache(nn.Module):
    """Tokens with keys and values of all before them in, logits of these tokens with keys and values of all out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits of (batch, T) tokens after others, and what the next ones want to know of all.

        Args:
            inputs: tokens.
            past: keys and values, in turns, of every block: (batch, heads, tokens before, channels).
        """
        cache = DynamicCache(config=self.model.config)
        for block, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, block)
        logits = self.model(inputs, **with_cache(self.model, cache)).logits
        return logits, kept(cache)


def kept(cache: DynamicCache) -> list[Tensor]:
    """Keys and values, in turns, of every block."""
    layers: list[Any] = cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


@dataclass(frozen=True)
class Graph:
    """What is traced, and as what.

    Attributes:
        module: that is run.
        given: what it is run on, by the names of its arguments.
        sizes: which dimensions of that are of any size, likewise.
        inputs, outputs: names in the graph, in order.
    """

    module: nn.Module
    given: dict[str, Any]
    sizes: dict[str, Any]
    inputs: list[str]
    outputs: list[str]


def input_name(model: PreTrainedModel) -> str:
    """What the graph's first input is called."""
    return "input_ids" if task_of(model.config) is TEXT else "pixel_values"


def plain(model: PreTrainedModel) -> Graph:
    """The graph of a model without a cache."""
    dim = torch.export.Dim
    batch = dim("batch", max=LARGEST_BATCH)
    sizes = {0: batch, 1: dim("tokens", max=LONGEST)} if task_of(model.config) is TEXT else {0: batch}
    return Graph(Logits(model), {"inputs": examples(model)[0]}, {"inputs": sizes}, [input_name(model)], ["logits"])


@torch.no_grad()
def cached(model: PreTrainedModel) -> Graph:
    """The graph of a model of texts with a cache, its keys and values named as optimum names them.

    Raises:
        SnpError: some block keeps something else.
    """
    graph, dim = plain(model), torch.export.Dim
    inputs = graph.given["inputs"]
    cache = DynamicCache(config=model.config)
    model(inputs[:, :BEFORE], **with_cache(model, cache))
    layers: list[Any] = cache.layers
    others = {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}
    others |= {"no attention" for layer in layers if not layer.is_initialized}
    if others:
        raise SnpError(
            f"--with-cache: expected keys and values of all tokens in every block, got {', '.join(sorted(others))}. "
            "Such models are written without a cache."
        )
    past = kept(cache)
    names = [f"{block}.{what}" for block in range(len(cache.layers)) for what in ("key", "value")]
    size = {0: graph.sizes["inputs"][0], 2: dim("past", max=LONGEST)}
    return Graph(
        WithCache(model),
        {"inputs": inputs[:, BEFORE:], "past": past},
        {**graph.sizes, "past": [size] * len(past)},
        [*graph.inputs, *(f"past_key_values.{name}" for name in names)],
        [*graph.outputs, *(f"present.{name}" for name in names)],
    )


def write_onnx(model: PreTrainedModel, folder: Path, *, cache: bool = False) -> None:
    """Writes the graph of a model, with its weights beside it, into a folder.

    Args:
        model: in float32, on the CPU.
        folder: to write `model.onnx` and `model.onnx.data` into.
        cache: the graph also takes keys and values of the tokens before, of none or any number, and puts out those of
            all.

    Raises:
        SnpError: torch cannot trace the model, or it has another kind of cache.
    """
    needed("onnx", "onnx")
    needed("onnxscript", "onnx")
    graph = cached(model) if cache else plain(model)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph.module.eval(),
                (*graph.given.values(),),
                folder / FILE,
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=graph.sizes,
                dynamo=True,
                verbose=False,
                external_data=True,
            )
    except Exception as error:  # torch.export has dozens of kinds, none of which users could do anything about
        raise SnpError(f"--to onnx: torch cannot trace {type(model).__name__} ({reason(error)}).") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxscript say about passes of their own."""
    import logging

    names = ("torch.onnx", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def examples(model: PreTrainedModel) -> list[Tensor]:
    """Inputs of several shapes, random; the first is what is traced."""
    draw = torch.Generator().manual_seed(0)
    if task_of(model.config) is TEXT:
        longest = int(getattr(model.config, "max_position_embeddings", LONGEST))
        words = int(getattr(model.get_input_embeddings(), "num_embeddings", 2))
        return [torch.randint(words, (b, min(t, longest)), generator=draw) for b, t in SHAPES]
    return [torch.randn(count, *image_shape(model.config), generator=draw) for count in (2, 1, 5)]


@torch.no_grad()
def difference(model: PreTrainedModel, folder: Path) -> float:
    """The largest difference of a logit between onnxruntime's and torch's, over the largest logit.

    Args:
        model: that the graph was made of.
        folder: that it is in.
    """
    runtime = needed("onnxruntime", "onnx")
    session = runtime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in examples(model):
        wanted = Logits(model)(inputs).double()
        found = torch.from_numpy(said(session, inputs.numpy())).double()
        apart = float((wanted - found).abs().max() / wanted.abs().max())
        worst = max(worst, apart if apart == apart else float("inf"))
    return worst


def said(session: Any, inputs: Any) -> Any:
    """Logits that a graph puts out; one with a cache gets half of the tokens, then the others, then the last one alone.

    Args:
        session: onnxruntime's.
        inputs: tokens or pixels, as a numpy array.
    """
    import numpy as np

    first, *past = session.get_inputs()
    if not past:
        return session.run(None, {first.name: inputs})[0]
    batch, length = inputs.shape
    cache = [np.zeros((batch, one.shape[1], 0, one.shape[3]), np.float32) for one in past]
    found = []
    for part in np.split(inputs, sorted({length // 2, length - 1} - {0}), axis=1):
        named = {one.name: tensor for one, tensor in zip(past, cache, strict=True)}
        logits, *cache = session.run(None, {first.name: part, **named})
        found.append(logits)
    return np.concatenate(found, axis=1)
