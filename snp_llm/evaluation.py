"""Several models by one protocol: perplexity, tasks, size, side by side. Knows nothing of pruning."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import checkpoint
from snp_llm.data import BOS_REMARKS, Windows, check_dataset, evaluation_text, evaluation_windows
from snp_llm.device import compute_device
from snp_llm.errors import SnpError
from snp_llm.measure import model_size, perplexity, strided_perplexity
from snp_llm.pipeline import LONGEST_DEFAULT_WINDOW, check_tokens, resolve_bos, window_length
from snp_llm.recipe import EvaluationRecipe
from snp_llm.report import REPORT, read_report, write_text
from snp_llm.skeleton import check_tokenizer, load_skeleton
from snp_llm.tasks import Tasks, check_harness, find_tasks, run_tasks
from snp_llm.terminal import table_of


@dataclass(frozen=True)
class Evaluated:
    """What came out for one model.

    Attributes:
        model: as it was named.
        perplexity: or None if it was not asked for.
        text: the protocol, for people; empty without perplexity.
        sha256: of the tokens; perplexities of different tokens are not comparable.
        parameters: all.
        bytes: of its weight files, or of the weights where there is no folder of safetensors.
        tasks: metrics by task.
    """

    model: str
    perplexity: float | None
    text: str
    sha256: str
    parameters: int
    bytes: int
    tasks: dict[str, dict[str, float]]


def evaluate(recipe: EvaluationRecipe, on_step: Callable[[str], None]) -> list[Evaluated]:
    """Every model of a recipe, one in memory at a time.

    Raises:
        SnpError: a model, dataset or task that cannot be used.
    """
    device = compute_device(recipe.device)
    if recipe.perplexity:
        check_dataset(dataset_of(recipe), recipe.split, recipe.text_column, evaluation=True)
    if recipe.include_path is not None and not Path(recipe.include_path).is_dir():
        raise SnpError(f"--include-path {recipe.include_path}: no such folder; expected one with task files (.yaml).")
    positions = []
    for name in recipe.models:
        config = load_skeleton(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code).config
        positions.append(int(getattr(config, "max_position_embeddings", LONGEST_DEFAULT_WINDOW)))
        check_tokenizer(name)
    seq_len = window_length(recipe.seq_len, min(positions))
    if recipe.stride is not None and recipe.stride > seq_len:
        raise SnpError(f"--stride: expected at most the window's {seq_len:,} tokens, got {recipe.stride:,}.")
    tasks, manager = None, None
    if recipe.tasks is not None:
        check_harness()
        tasks = Tasks(recipe.task_names, recipe.include_path, recipe.limit, recipe.num_fewshot)
        manager = find_tasks(tasks)
    results = []
    for name in recipe.models:
        model, tokenizer = checkpoint.load(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
        value, text, digest = None, "", ""
        if recipe.perplexity:
            value, text, digest = measure_perplexity(model, tokenizer, recipe, seq_len, device)
            on_step(f"{name}: perplexity {value:.4f}")
        found: dict[str, dict[str, float]] = {}
        if tasks is not None:
            found = run_tasks(model, tokenizer, tasks, manager, batch_size=recipe.batch_size, device=device)
            on_step(f"{name}: {', '.join(found)}")
        size = model_size(model, seq_len)
        stored = checkpoint.folder_bytes(Path(name)) or size.bytes
        results.append(Evaluated(name, value, text, digest, size.parameters, stored, found))
    return results


def dataset_of(recipe: EvaluationRecipe) -> str:
    """That perplexity is measured on."""
    return recipe.dataset or ("bundled" if recipe.models[0] == checkpoint.TINY_OPT else "wikitext2")


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: EvaluationRecipe,
    seq_len: int,
    device: torch.device,
) -> tuple[float, str, str]:
    """Perplexity, the exact protocol for people, and the hash of the tokens."""
    dataset = dataset_of(recipe)
    bos = resolve_bos(recipe.bos, model, tokenizer)
    if recipe.stride is None:
        windows: Windows = evaluation_windows(
            tokenizer,
            dataset,
            split=recipe.split,
            column=recipe.text_column,
            seq_len=seq_len,
            max_windows=recipe.max_windows,
            bos=bos,
        )
        check_tokens(windows, model)
        value = perplexity(model, windows.tokens, batch_size=recipe.batch_size, device=device)
        return value, f"{windows.description}, {windows.tokens.numel():,} tokens", windows.digest
    if bos == "always" and recipe.stride == seq_len:
        raise SnpError(f"--stride: expected at most the {seq_len - 1:,} tokens after a window's BOS, got {seq_len:,}.")
    text = evaluation_text(tokenizer, dataset, split=recipe.split, column=recipe.text_column, bos=bos)
    check_tokens(text, model)
    value, counted = strided_perplexity(
        model,
        text.tokens[0],
        seq_len=seq_len,
        stride=recipe.stride,
        bos=tokenizer.bos_token_id if bos == "always" else None,
        max_windows=recipe.max_windows,
        batch_size=recipe.batch_size,
        device=device,
    )
    protocol = (
        f"{text.description}, windows of {seq_len:,} that begin every {recipe.stride:,}{BOS_REMARKS[bos]}, "
        f"{counted:,} tokens counted once each, given {seq_len - recipe.stride:,} to {seq_len - 1:,} before them "
        "(fewer at the start)"
    )
    return value, protocol, text.digest


def comparable(results: Sequence[Evaluated]) -> bool:
    """Whether all perplexities are of the same tokens."""
    return len({result.sha256 for result in results}) == 1


def evaluation_table(results: Sequence[Evaluated]) -> Table:
    """A row a model; a column a task, of its first metric."""
    tasks = list(dict.fromkeys(task for result in results for task in result.tasks))
    measured = results[0].perplexity is not None
    columns = ["", *(["perplexity", "ratio"] if measured else []), "parameters", "size, MB"]
    columns += [f"{task} {_first_metric(results[0].tasks[task])}".strip() for task in tasks]
    rows = []
    for result in results:
        row = [result.model]
        first = results[0].perplexity
        if result.perplexity is not None and first is not None:
            same = result.sha256 == results[0].sha256
            row += [f"{result.perplexity:,.4f}", f"{result.perplexity / first:.3f}" if same else "other tokens"]
        row += [f"{result.parameters:,}", f"{result.bytes / 1e6:,.2f}"]
        rows.append([*row, *(_shown(result.tasks[task]) for task in tasks)])
    return table_of(columns, rows)


def _first_metric(metrics: dict[str, float]) -> str:
    return next((name for name in metrics if name not in ("samples", "num_fewshot")), "")


def _shown(metrics: dict[str, float]) -> str:
    name = _first_metric(metrics)
    if not name:
        return ""
    base, bracket, rest = name.partition(" (")
    error = metrics.get(f"{base}_stderr{bracket}{rest}")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def as_json(results: Sequence[Evaluated]) -> dict[str, Any]:
    """The results, with the ratio to the first model's perplexity where the tokens are the same."""
    first = results[0]
    models = []
    for result in results:
        ratio = None
        if result.perplexity is not None and first.perplexity is not None and result.sha256 == first.sha256:
            ratio = result.perplexity / first.perplexity
        models.append({**asdict(result), "ratio": ratio})
    return {"models": models}


def check_folder(folder: Path) -> None:
    """Raises SnpError if results could not be recorded in an output folder, before they are measured."""
    report = read_report(folder)
    entries = report.get("perplexities", [])
    kinds = (
        isinstance(entries, list)
        and isinstance(report.get("tasks", {}), dict)
        and isinstance(report.get("versions"), dict)
    )
    if not kinds or not all(isinstance(entry, dict) and "text" in entry for entry in entries):
        raise SnpError(
            f"{folder / REPORT}: expected a list of `perplexities`, and `tasks` and `versions` by name, got others. "
            "Prune again."
        )
    if not os.access(folder, os.W_OK):
        raise SnpError(f"--save: expected a folder that can be written to; {folder} is not.")


def save(result: Evaluated, recipe: EvaluationRecipe, folder: Path) -> None:
    """Records one model's results in its report: `perplexities` by protocol, `tasks` by name; later ones replace."""
    report = read_report(folder)
    if result.perplexity is not None:
        entry = {"text": result.text, "sha256": result.sha256, "perplexity": result.perplexity}
        others = [e for e in report.get("perplexities", []) if e["text"] != result.text]
        report["perplexities"] = [*others, entry]
    if result.tasks:
        from importlib.metadata import version

        limited = {} if recipe.limit is None else {"limit": recipe.limit}
        found = {task: {**metrics, **limited} for task, metrics in result.tasks.items()}
        report["tasks"] = {**report.get("tasks", {}), **found}
        report["versions"]["lm_eval"] = version("lm_eval")
    write_text(folder / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
