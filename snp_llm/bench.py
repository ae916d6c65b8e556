"""How fast two models are and what they take, measured in turns so that drift cancels. Knows nothing of pruning."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm import checkpoint
from snp_llm.device import compute_device, synchronize
from snp_llm.errors import SnpError
from snp_llm.measure import ModelSize, model_size
from snp_llm.models.families import embedding_rows, find_blocks, find_family, find_sites
from snp_llm.models.layouts import KERNEL_MULTIPLE
from snp_llm.options import BenchRecipe
from snp_llm.report import read_card, read_report, update_card, versions, write_text
from snp_llm.skeleton import check_tokenizer, load_skeleton
from snp_llm.terminal import table_of
from snp_llm.version import __version__

BENCH = "bench.json"
MODELS = ("dense", "pruned")


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        kind: "prefill": a batch of prompts up to the logits of the next token, with a cache as for generating.
            "decode": after that prompt, tokens one at a time.
        batch: prompts at a time.
        length: tokens of a prompt.
        new_tokens: decoded after it.
    """

    kind: Literal["prefill", "decode"]
    batch: int
    length: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """That a pass goes through."""
        return self.batch * (self.length if self.kind == "prefill" else self.new_tokens)

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill, {self.batch} x {self.length:,}"
        return f"decode, {self.batch} after {self.length:,}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one model in one cell: a whole prefill, or one step of decoding.

    Attributes:
        seconds: median.
        low, high: quartiles.
        tokens_per_second: at the median.
    """

    seconds: float
    low: float
    high: float
    tokens_per_second: float


@dataclass(frozen=True)
class Comparison:
    """Both models in one cell.

    Attributes:
        cell: what was measured.
        dense, pruned: their times.
        speedup: median of how many times as fast the pruned model was than the dense one just beside it.
        speedup_low, speedup_high: quartiles of the same.
        flops_ratio: how many times the pruned model's FLOPs the dense model's are.
        bytes_ratio: the same of the weights that are read, on which decoding in small batches depends.
    """

    cell: Cell
    dense: Timing
    pruned: Timing
    speedup: float
    speedup_low: float
    speedup_high: float
    flops_ratio: float
    bytes_ratio: float


def cells(recipe: BenchRecipe) -> list[Cell]:
    """Every batch size at every prompt length, prefill first."""
    shapes = [*itertools.product(recipe.batch_sizes, recipe.prompt_lengths)]
    found = [Cell("prefill", batch, length, 0) for batch, length in shapes]
    return found + [Cell("decode", batch, length, recipe.new_tokens) for batch, length in shapes if recipe.new_tokens]


def bench(recipe: BenchRecipe, command: str, on_step: Callable[[str], None]) -> dict[str, Any]:
    """Everything that `snp-llm bench` measures, ready for JSON.

    Args:
        recipe: all settings.
        command: that was typed.
        on_step: called with a line a measurement.

    Raises:
        SnpError: a model that cannot be loaded, prompts longer than its positions, too little memory, no compiler.
    """
    device = compute_device(recipe.device)
    wanted = cells(recipe)
    names = (recipe.dense, recipe.pruned)
    skeletons = [load_skeleton(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code) for name in names]
    for name, skeleton in zip(names, skeletons, strict=True):
        check_positions(name, skeleton.config, wanted)
        check_tokenizer(name)
    # Before anything is loaded here, so that there is memory for them.
    memory = [peak_memory(name, wanted, device, recipe) if recipe.memory else None for name in names]
    if recipe.memory:
        on_step("peak memory measured")
    models = [checkpoint.load(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code)[0] for name in names]
    disks = [disk_bytes(name, model) for name, model in zip(names, models, strict=True)]
    sizes = [model_size(model, 1) for model in models]
    modules: list[nn.Module] = [*models]
    try:
        for module in modules:
            module.to(device)
        results = []
        for cell in wanted:
            results.append(compare(models, cell, device, recipe))
            on_step(f"{cell.name}: {results[-1].speedup:.2f} times as fast")
    except torch.OutOfMemoryError as error:
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
        "remarks": remarks(results, models, sizes),
    }


def check_positions(name: str, config: PretrainedConfig, wanted: Sequence[Cell]) -> None:
    """Raises SnpError if a model has no positions for a prompt and what is decoded after it."""
    positions = int(getattr(config, "max_position_embeddings", sys.maxsize))
    longest = max(cell.length + cell.new_tokens for cell in wanted)
    if longest > positions:
        raise SnpError(
            f"--prompt-lengths: expected at most the {positions:,} positions of {name} with --new-tokens counted in, "
            f"got {longest:,}."
        )


def disk_bytes(name: str, model: PreTrainedModel) -> int:
    """Bytes of the weight files, or of the weights where there is no folder of safetensors."""
    return checkpoint.folder_bytes(Path(name)) or model_size(model, 1).bytes


def compare(models: Sequence[PreTrainedModel], cell: Cell, device: torch.device, recipe: BenchRecipe) -> Comparison:
    """Times both models in turns, starting with the other one every time."""
    tokens = [random_tokens(model, cell, device) for model in models]
    forwards: list[Callable[..., Any]] = [compiled(model) if recipe.compile else model for model in models]
    passes: list[Callable[[], float]] = [
        partial(timed, forward, given, cell, device) for forward, given in zip(forwards, tokens, strict=True)
    ]
    try:
        for once in passes:  # the first warms up, and compiles
            once()
            once()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not recipe.compile:
            raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SnpError(
            f"--compile: torch.compile failed on {cell.name}: {first_line[:200]}. On the CPU it needs a C++ compiler; "
            "leave out --compile."
        ) from error
    times: list[list[float]] = [[], []]
    for turn in range(recipe.repeats):
        for at in (0, 1) if turn % 2 == 0 else (1, 0):
            times[at].append(passes[at]())
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = quartiles(ratios)
    flops = [cell_flops(model, cell) for model in models]
    read = [weights_read(model) for model in models]
    steps = 1 if cell.kind == "prefill" else cell.new_tokens
    timings = []
    for seconds in times:
        least, median, most = (value / steps for value in quartiles(seconds))
        timings.append(Timing(median, least, most, cell.tokens / steps / median))
    return Comparison(cell, timings[0], timings[1], middle, low, high, flops[0] / flops[1], read[0] / read[1])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def compiled(model: PreTrainedModel) -> Callable[..., Any]:
    """The model through torch.compile, with nothing of earlier shapes left over."""
    torch.compiler.reset()
    # Past that limit torch goes on without compiling and says so in a log only.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model)


def random_tokens(model: PreTrainedModel, cell: Cell, device: torch.device) -> Tensor:
    """A prompt and what is decoded after it, the same for models of one vocabulary, (batch, length + new_tokens)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding_rows(model), (cell.batch, cell.length + cell.new_tokens), generator=generator)
    return tokens.to(device)


def timed(forward: Callable[..., Any], tokens: Tensor, cell: Cell, device: torch.device) -> float:
    """Seconds of one pass; of decoding, without the prefill before it."""
    if cell.kind == "decode":
        return decode(forward, tokens, cell.new_tokens, device)
    synchronize(device)
    start = time.perf_counter()
    prefill(forward, tokens)
    synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def prefill(forward: Callable[..., Any], tokens: Tensor) -> Any:
    """Prompts up to the logits of the next token; the cache that decoding needs."""
    return forward(tokens, use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def decode(forward: Callable[..., Any], tokens: Tensor, new_tokens: int, device: torch.device) -> float:
    """Seconds of `new_tokens` steps after a prefill of the tokens before them.

    The tokens are given, so that both models do the same whatever they would say.
    """
    length = tokens.shape[1] - new_tokens
    cache = prefill(forward, tokens[:, :length])
    synchronize(device)
    start = time.perf_counter()
    for at in range(length, length + new_tokens):
        cache = forward(tokens[:, at : at + 1], past_key_values=cache, use_cache=True).past_key_values
    synchronize(device)
    return time.perf_counter() - start


def cell_flops(model: PreTrainedModel, cell: Cell) -> float:
    """FLOPs of a prompt or of one step, for one sequence; the head runs on one token of either."""
    head = head_weights(model)
    linear = model_size(model, 1).flops - 4.0 * attention_channels(model) - 2.0 * head
    attended = 4.0 * attention_channels(model)
    if cell.kind == "prefill":
        return cell.length * (linear + attended * (cell.length + 1) / 2) + 2.0 * head
    return linear + attended * (cell.length + cell.new_tokens / 2) + 2.0 * head


def head_weights(model: PreTrainedModel) -> int:
    """Weights of the LM head, tied or not."""
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def attention_channels(model: PreTrainedModel) -> int:
    """Channels of all blocks' attention, whose scores cost FLOPs that are no weights'."""
    family = find_family(model.config)
    sites = find_sites(find_blocks(model, family), family)
    return sum(site.channels for site in sites if site.kind == "attention")


def weights_read(model: PreTrainedModel) -> float:
    """Bytes of weights that one step reads: all, without an embedding that is only looked up."""
    size = model_size(model, 1)
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    looked_up = 0 if tied else sum(p.numel() for p in model.get_input_embeddings().parameters())
    return size.bytes * (1 - looked_up / size.parameters)


def peak_memory(name: str, wanted: Sequence[Cell], device: torch.device, recipe: BenchRecipe) -> dict[str, Any]:
    """Peaks of one model in the largest prefill and the largest decode, in a fresh process.

    Returns:
        Bytes: `libraries` before and `loaded` after loading, `host` at the peak, `device` at the peak or None.

    Raises:
        SnpError: whatever went wrong there.
    """
    largest = [
        max((c for c in wanted if c.kind == kind), key=lambda c: c.batch * (c.length + c.new_tokens), default=None)
        for kind in ("prefill", "decode")
    ]
    asked = {
        "model": name,
        "dtype": recipe.dtype,
        "device": str(device),
        "trust_remote_code": recipe.trust_remote_code,
        "cells": [asdict(cell) for cell in largest if cell is not None],
    }
    root = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    process = subprocess.run(
        [sys.executable, "-m", "snp_llm.peak"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise SnpError(f"bench: the memory of {name} could not be measured: {reason[:300]} Use --no-memory.")
    result: dict[str, Any] = json.loads(lines[-1])
    if "error" in result:
        raise SnpError(result["error"])
    return result


def remarks(results: Sequence[Comparison], models: Sequence[PreTrainedModel], sizes: Sequence[ModelSize]) -> list[str]:
    """How far measured speed-ups are from what FLOPs promise, and why, as far as it can be told."""
    lines = []
    prefills = [r for r in results if r.cell.kind == "prefill"]
    decodes = [r for r in results if r.cell.kind == "decode"]
    linear = sizes[0].block_linear / sizes[1].block_linear
    one = max(prefills, key=lambda r: r.cell.tokens)
    reasons = []
    if one.flops_ratio < 0.98 * linear:
        reasons.append(
            f"block-linear parameters are {linear:.2f} times fewer, but attention scores and the head were not cut as "
            "much, which is in the FLOPs"
        )
    if odd := odd_widths(models[1]):
        reasons.append(f"{odd} of its FFN widths are no multiples of {KERNEL_MULTIPLE}, which kernels like less")
    if one.speedup < one.flops_ratio:
        reasons.append("norms, activation functions and memory traffic of the hidden states cost what they did")
    lines.append(
        f"Prefill of {one.cell.batch} x {one.cell.length:,} tokens is {one.speedup:.2f} times as fast, where FLOPs "
        f"alone would give {one.flops_ratio:.2f}: {_distance(one)}. {_sentence(reasons)}".strip()
    )
    if decodes:
        one = min(decodes, key=lambda r: (r.cell.batch, r.cell.length))
        lines.append(
            f"Decoding (batch {one.cell.batch} after {one.cell.length:,} tokens) is {one.speedup:.2f} times as fast, "
            f"where FLOPs alone would give {one.flops_ratio:.2f}: {_distance(one)}. In small batches it is bound by "
            f"reading weights, of which there are {one.bytes_ratio:.2f} times fewer bytes, head included, and by "
            "the overhead of many small kernels."
        )
    return lines


def _distance(result: Comparison) -> str:
    """Measured against promised, in words."""
    if result.flops_ratio <= 1:
        return "nothing to gain"
    if result.speedup <= 1:
        return "none of that gain"
    return f"{100 * (result.speedup - 1) / (result.flops_ratio - 1):.0f} % of that gain"


def _sentence(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    text = "; ".join(reasons)
    return f"{text[0].upper()}{text[1:]}."


def odd_widths(model: PreTrainedModel) -> int:
    """Blocks whose FFN width is no multiple of what kernels like."""
    family = find_family(model.config)
    sites = find_sites(find_blocks(model, family), family)
    return sum(site.kind == "ffn" and site.units % KERNEL_MULTIPLE > 0 for site in sites)


def bench_table(result: dict[str, Any]) -> Table:
    """Both models side by side, measured ratios beside that of the FLOPs."""
    rows = []
    for cell in result["cells"]:
        named = Cell(**cell["cell"])
        shown = []
        for model in MODELS:
            timing = cell[model]
            spread = 50 * (timing["high"] - timing["low"]) / timing["seconds"]
            shown.append(f"{1000 * timing['seconds']:,.1f} ms ± {spread:.0f} %, {timing['tokens_per_second']:,.0f}/s")
        ratio = f"{cell['speedup']:.2f} ({cell['speedup_low']:.2f} to {cell['speedup_high']:.2f})"
        rows.append((named.name, *shown, ratio, f"{cell['flops_ratio']:.2f}"))

    def row(name: str, values: Sequence[float], form: str) -> None:
        rows.append((name, *(format(v, form) for v in values), f"{values[0] / values[1]:.2f}", ""))

    if result["memory"]:
        memory = [result["memory"][model] for model in MODELS]
        row("peak host memory, MB", [m["host"] / 1e6 for m in memory], ",.0f")
        row("  above Python's own", [(m["host"] - m["libraries"]) / 1e6 for m in memory], ",.0f")
        if memory[0]["device"]:
            row("peak device memory, MB", [m["device"] / 1e6 for m in memory], ",.0f")
    row("size on disk, MB", [result["disk"][model] / 1e6 for model in MODELS], ",.2f")
    row("parameters", [result["parameters"][model] for model in MODELS], ",")
    return table_of(("", "dense", "pruned", "dense / pruned", "FLOPs"), rows)


def headline(result: dict[str, Any]) -> str:
    """Under which conditions, in one line."""
    threads = f", {result['threads']} threads" if result["threads"] else ""
    dtypes = "/".join(dict.fromkeys(result["dtype"]))
    how = "torch.compile" if result["compile"] else "eager"
    return (
        f"{result['models']['dense']} and {result['models']['pruned']} on {result['device']}{threads}, {dtypes}, "
        f"{how}: medians of {result['repeats']} passes in turns ± half the quartiles' distance; tokens a second"
    )


def check_folder(folder: Path) -> None:
    """Raises SnpError if a result could not be written into an output folder, before it is measured."""
    read_report(folder)
    read_card(folder)
    if not os.access(folder, os.W_OK) or (folder / BENCH).is_dir():
        raise SnpError(f"--save: expected a folder that {BENCH} can be written to; {folder} is not.")


def save(result: dict[str, Any], folder: Path) -> None:
    """Writes bench.json into an output folder, and the table into its model card."""
    write_text(folder / BENCH, json.dumps(result, indent=1, allow_nan=False) + "\n")
    table = bench_table(result)
    columns = [[*column.cells] for column in table.columns]
    head = "| " + " | ".join(str(column.header) for column in table.columns) + " |"
    rule = "|---|" + "---:|" * (len(columns) - 1)
    rows = ["| " + " | ".join(str(cell).strip() for cell in row) + " |" for row in zip(*columns, strict=True)]
    update_card(folder, "Speed", [f"{headline(result)}.", "", head, rule, *rows, "", *result["remarks"]])
