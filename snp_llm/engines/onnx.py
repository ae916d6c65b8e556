"""A model as an ONNX graph: tokens or pixels in, logits out, of any batch and any length."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.engines.extras import needed
from snp_llm.models.calls import without_cache
from snp_llm.models.task import TEXT, image_shape, task_of
from snp_llm.runtime.errors import SnpError, reason

FILE = "model.onnx"

LONGEST, LARGEST_BATCH = 1 << 20, 4096  # that the graph takes

EXAMPLE = (2, 16)  # windows and tokens of what is traced

# What is compared, windows and tokens: a batch of one, a single token, and more of both than was traced.
SHAPES = ((2, 16), (1, 7), (3, 40), (1, 1))


class Logits(nn.Module):
    """Tokens or pixels in, logits out, which is all that a graph has."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.options = model, without_cache(model)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of (batch, T) tokens or (batch, channels, height, width) pixels."""
        logits: Tensor = self.model(inputs, **self.options).logits
        return logits


def input_name(model: PreTrainedModel) -> str:
    """What the graph's only input is called."""
    return "input_ids" if task_of(model.config) is TEXT else "pixel_values"


def write_onnx(model: PreTrainedModel, folder: Path) -> None:
    """Writes the graph of a model, with its weights beside it, into a folder.

    Args:
        model: in float32, on the CPU.
        folder: to write `model.onnx` and `model.onnx.data` into.

    Raises:
        SnpError: torch cannot trace the model.
    """
    needed("onnx", "onnx")
    needed("onnxscript", "onnx")
    dim = torch.export.Dim
    batch = dim("batch", max=LARGEST_BATCH)
    sizes = {0: batch, 1: dim("tokens", max=LONGEST)} if task_of(model.config) is TEXT else {0: batch}
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Logits(model).eval(),
                (examples(model)[0],),
                folder / FILE,
                input_names=[input_name(model)],
                output_names=["logits"],
                dynamic_shapes={"inputs": sizes},
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
        found = torch.from_numpy(session.run(None, {input_name(model): inputs.numpy()})[0]).double()
        apart = float((wanted - found).abs().max() / wanted.abs().max())
        worst = max(worst, apart if apart == apart else float("inf"))
    return worst
