"""How fast two models are and what they take, measured in turns so that drift cancels. Knows nothing of pruning."""

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm import checkpoint
from snp_llm.checkpoint.skeleton import check_reader, load_config, load_skeleton
from snp_llm.evaluate.cells import MODELS, Cell, Comparison, Timing
from snp_llm.evaluate.memory import peak_memory
from snp_llm.evaluate.turns import in_turns, quartiles, ratio_of, speed_words, timed
from snp_llm.evaluate.work import bytes_read, cell_flops
from snp_llm.models.anatomy import embedding_rows, find_anatomy
from snp_llm.models.calls import with_cache
from snp_llm.models.layouts import KERNEL_MULTIPLE
from snp_llm.models.size import model_size
from snp_llm.models.task import image_shape, task_of
from snp_llm.models.text_part import text_config
from snp_llm.recipe.checks import flag
from snp_llm.recipe.commands import BenchRecipe
from snp_llm.runtime.device import compute_device, ran_out, versions
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.signs import Signs
from snp_llm.runtime.version import __version__


def cells(recipe: BenchRecipe) -> list[Cell]:
    """What is measured, by what the dense model is for.

    Raises:
        SnpError: a setting that such models do not have.
    """
    return CELLS[task_of(load_config(recipe.dense, trust_remote_code=recipe.trust_remote_code)).name](recipe)


def text_cells(recipe: BenchRecipe) -> list[Cell]:
    """Cells of every batch size at every prompt length, prefill first."""
    shapes = [*itertools.product(recipe.batch_sizes, recipe.prompt_lengths)]
    found = [Cell("prefill", batch, length, 0) for batch, length in shapes]
    return found + [Cell("decode", batch, length, recipe.new_tokens) for batch, length in shapes if recipe.new_tokens]


def image_cells(recipe: BenchRecipe) -> list[Cell]:
    """Cells of every batch size."""
    for name in ("prompt_lengths", "new_tokens"):
        if getattr(recipe, name) != getattr(BenchRecipe, name):
            raise SnpError(f"{flag(name)}: expected models of texts; {recipe.dense} is one of images. Leave it out.")
    return [Cell("classify", batch, 1, 0) for batch in recipe.batch_sizes]


CELLS = {"text": text_cells, "images": image_cells}


def bench(recipe: BenchRecipe, command: str, signs: Signs) -> dict[str, Any]:
    """Everything that `snp-llm bench` measures, ready for JSON.

    Args:
        recipe: all settings.
        command: that was typed.
        signs: told of every measurement.

    Raises:
        SnpError: a model that cannot be loaded, prompts longer than its positions, too little memory, no compiler.
    """
    device = compute_device(recipe.device)
    wanted = cells(recipe)
    names = (recipe.dense, recipe.pruned)
    skeletons = [load_skeleton(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code) for name in names]
    for name, skeleton in zip(names, skeletons, strict=True):
        if (task := task_of(skeleton.config)) is not task_of(skeletons[0].config):
            raise SnpError(f"bench: expected two models of one task; {name} is one of {task.name}, {names[0]} is not.")
        check_positions(name, skeleton.config, wanted)
        check_reader(name, skeleton.config)
    # Before anything is loaded here, so that there is memory for them.
    memory = []
    for which, name in zip(MODELS, names, strict=True) if recipe.memory else ():
        signs.begin(f"memory of the {which} model, in a process of its own")
        memory.append(peak_memory(name, wanted, device, recipe))
        signs.step(f"memory of the {which} model: measured")
    signs.begin("loading both models")
    models = [checkpoint.load(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code)[0] for name in names]
    sizes = [model_size(model, 1) for model in models]
    disks = [checkpoint.folder_bytes(Path(name)) or size.bytes for name, size in zip(names, sizes, strict=True)]
    modules: list[nn.Module] = [*models]
    try:
        for module in modules:
            module.to(device)
        results = []
        for cell in wanted:
            signs.begin(cell.name)
            found = compare(models, cell, device, recipe)
            signs.step(f"{cell.name}: {speed_words(found.speedup, found.speedup_low, found.speedup_high)}")
            results.append(found)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise SnpError(
            f"bench: both models do not fit on {device} together ({str(error).splitlines()[0]}). Use smaller "
            "--batch-sizes or --prompt-lengths, or --dtype bfloat16."
        ) from error
    return {
        "snp_llm": __version__,
        "versions": versions(),
        "command": command,
        "models": dict(zip(MODELS, (Path(name).name for name in names), strict=True)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "dtype": [str(model.dtype).removeprefix("torch.") for model in models],
        "compile": recipe.compile,
        "repeats": recipe.repeats,
        "parameters": dict(zip(MODELS, (size.parameters for size in sizes), strict=True)),
        "disk": dict(zip(MODELS, disks, strict=True)),
        "memory": dict(zip(MODELS, memory, strict=True)) if recipe.memory else None,
        "cells": [asdict(result) for result in results],
        "odd_widths": odd_widths(models[1]),
    }


def odd_widths(model: PreTrainedModel) -> int:
    """Blocks whose FFN width is no multiple of what kernels like."""
    return sum(site.kind == "ffn" and site.units % KERNEL_MULTIPLE > 0 for site in find_anatomy(model).sites)


def check_positions(name: str, config: PretrainedConfig, wanted: Sequence[Cell]) -> None:
    """Raises SnpError if a model has no positions for a prompt and what is decoded after it."""
    positions = int(getattr(text_config(config), "max_position_embeddings", sys.maxsize))
    longest = max(cell.length + cell.new_tokens for cell in wanted)
    if longest > positions:
        raise SnpError(
            f"--prompt-lengths: expected at most the {positions:,} positions of {name} with --new-tokens counted in, "
            f"got {longest:,}."
        )


def compare(models: Sequence[PreTrainedModel], cell: Cell, device: torch.device, recipe: BenchRecipe) -> Comparison:
    """Times both models in turns, starting with the other one every time."""
    inputs = [INPUTS[cell.kind](model, cell, device) for model in models]
    forwards: list[nn.Module] = [compiled(model) if recipe.compile else model for model in models]
    passes: list[Callable[[], float]] = [
        partial(seconds_of, forward, given, cell, device) for forward, given in zip(forwards, inputs, strict=True)
    ]
    try:
        for once in passes:  # the first warms up, and compiles
            once()
            once()
    except Exception as error:
        if ran_out(error) or not recipe.compile:
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SnpError(
            f"--compile: torch.compile failed on {cell.name}: {first_line[:200]}. On the CPU it needs a C++ compiler; "
            "leave out --compile."
        ) from error
    times = in_turns(passes, recipe.repeats)
    than = ratio_of(times)
    flops = [cell_flops(model, cell) for model in models]
    read = [bytes_read(model, cell) for model in models]
    steps = cell.new_tokens if cell.kind == "decode" else 1
    timings = []
    for seconds in times:
        least, median, most = (value / steps for value in quartiles(seconds))
        timings.append(Timing(median, least, most, cell.items / steps / median))
    work = flops[0] / flops[1], read[0] / read[1]
    return Comparison(cell, timings[0], timings[1], than.ratio, than.low, than.high, *work)


def compiled(model: PreTrainedModel) -> nn.Module:
    """The model through torch.compile, with nothing of earlier shapes left over."""
    torch.compiler.reset()
    # Past that limit torch goes on without compiling and says so in a log only.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return cast(nn.Module, torch.compile(model))


def random_tokens(model: PreTrainedModel, cell: Cell, device: torch.device) -> Tensor:
    """A prompt and what is decoded after it, the same for models of one vocabulary, (batch, length + new_tokens)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding_rows(model), (cell.batch, cell.length + cell.new_tokens), generator=generator)
    return tokens.to(device)


def random_images(model: PreTrainedModel, cell: Cell, device: torch.device) -> Tensor:
    """Images of noise, (batch, channels, height, width)."""
    shape = (cell.batch, *image_shape(model.config))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)


INPUTS: dict[str, Callable[[PreTrainedModel, Cell, torch.device], Tensor]] = {
    "prefill": random_tokens,
    "decode": random_tokens,
    "classify": random_images,
}


def seconds_of(forward: nn.Module, inputs: Tensor, cell: Cell, device: torch.device) -> float:
    """Seconds of one pass; of decoding, without the prefill before it."""
    if cell.kind == "decode":
        return decode(forward, inputs, cell.new_tokens, device)
    return timed(partial(PASSES[cell.kind], forward, inputs), device)


@torch.inference_mode()
def prefill(forward: Callable[..., Any], tokens: Tensor) -> Any:
    """Runs prompts up to the logits of the next token, and returns the cache that decoding needs."""
    return forward(tokens, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def classify(forward: Callable[..., Any], pixels: Tensor) -> Any:
    """Runs images up to the logits of their classes."""
    return forward(pixels).logits


PASSES: dict[str, Callable[[Callable[..., Any], Tensor], Any]] = {"prefill": prefill, "classify": classify}


@torch.inference_mode()
def decode(forward: nn.Module, tokens: Tensor, new_tokens: int, device: torch.device) -> float:
    """Seconds of `new_tokens` steps after a prefill of the tokens before them.

    The tokens are given, so that both models do the same whatever they would say.
    """
    length = tokens.shape[1] - new_tokens
    cache = prefill(forward, tokens[:, :length])

    def go_on() -> None:
        nonlocal cache
        for at in range(length, length + new_tokens):
            cache = forward(tokens[:, at : at + 1], **with_cache(forward, cache)).past_key_values

    return timed(go_on, device)
