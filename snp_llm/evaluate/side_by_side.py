"""Several models by one protocol: perplexity, tasks, size, side by side. Knows nothing of pruning."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import checkpoint
from snp_llm.checkpoint.skeleton import check_reader, load_skeleton
from snp_llm.data.sources import Dataset, check_dataset
from snp_llm.data.windows import BOS_REMARKS, evaluation_text, evaluation_windows
from snp_llm.evaluate.perplexity import Sliding, perplexity, strided_perplexity
from snp_llm.evaluate.tasks import Tasks, check_harness, find_tasks, run_tasks
from snp_llm.models.size import model_size
from snp_llm.models.text import LONGEST_DEFAULT_WINDOW, check_tokens, resolve_bos, window_length
from snp_llm.models.text_part import text_config
from snp_llm.recipe.commands import EvaluationRecipe
from snp_llm.recipe.recipe import usual_text
from snp_llm.runtime.device import compute_device
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.signs import Watch


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


def evaluate(recipe: EvaluationRecipe, watch: Watch) -> list[Evaluated]:
    """Evaluates every model of a recipe, with one in memory at a time.

    Args:
        recipe: all settings.
        watch: opens the signs of a piece of work by what it is.

    Raises:
        SnpError: a model, dataset or task that cannot be used.
    """
    device = compute_device(recipe.device)
    if recipe.perplexity:
        check_dataset(dataset_of(recipe), "evaluation")
    if recipe.include_path is not None and not Path(recipe.include_path).is_dir():
        raise SnpError(f"--include-path {recipe.include_path}: no such folder; expected one with task files (.yaml).")
    positions = []
    for name in recipe.models:
        config = load_skeleton(name, recipe.dtype, trust_remote_code=recipe.trust_remote_code).config
        positions.append(int(getattr(text_config(config), "max_position_embeddings", LONGEST_DEFAULT_WINDOW)))
        check_reader(name, config)
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
            with watch(f"{name}: perplexity") as signs:
                value, text, digest = measure_perplexity(model, tokenizer, recipe, seq_len, device, signs.share)
        found: dict[str, dict[str, float]] = {}
        if tasks is not None:
            with watch(f"{name}: {', '.join(tasks.names)}"):
                found = run_tasks(model, tokenizer, tasks, manager, batch_size=recipe.batch_size, device=device)
        size = model_size(model, seq_len)
        stored = checkpoint.folder_bytes(Path(name)) or size.bytes
        results.append(Evaluated(name, value, text, digest, size.parameters, stored, found))
    return results


def dataset_of(recipe: EvaluationRecipe) -> Dataset:
    """Dataset that perplexity is measured on."""
    return Dataset(recipe.dataset or usual_text(recipe.models[0]), recipe.split, recipe.text_column)


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: EvaluationRecipe,
    seq_len: int,
    device: torch.device,
    on_share: Callable[[float], None],
) -> tuple[float, str, str]:
    """Perplexity, the exact protocol for people, and the hash of the tokens."""
    dataset = dataset_of(recipe)
    bos = resolve_bos(recipe.bos, model, tokenizer)
    where: dict[str, Any] = {"batch_size": recipe.batch_size, "device": device, "on_share": on_share}
    if recipe.stride is None:
        windows = evaluation_windows(tokenizer, dataset, seq_len=seq_len, max_windows=recipe.max_windows, bos=bos)
        check_tokens(windows, model)
        value = perplexity(model, windows.tokens, **where)
        return value, f"{windows.description}, {windows.tokens.numel():,} tokens", windows.digest
    if bos == "always" and recipe.stride == seq_len:
        raise SnpError(f"--stride: expected at most the {seq_len - 1:,} tokens after a window's BOS, got {seq_len:,}.")
    text = evaluation_text(tokenizer, dataset, bos=bos)
    check_tokens(text, model)
    before = tokenizer.bos_token_id if bos == "always" else None
    sliding = Sliding(seq_len, recipe.stride, before, recipe.max_windows)
    value, counted = strided_perplexity(model, text.tokens[0], sliding, **where)
    protocol = (
        f"{text.description}, windows of {seq_len:,} that begin every {recipe.stride:,}{BOS_REMARKS[bos]}, "
        f"{counted:,} tokens counted once each, given {seq_len - recipe.stride:,} to {seq_len - 1:,} before them "
        "(fewer at the start)"
    )
    return value, protocol, text.digest


def comparable(results: Sequence[Evaluated]) -> bool:
    """Whether all perplexities are of the same tokens."""
    return len({result.sha256 for result in results}) == 1
