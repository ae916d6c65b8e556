"""Zero-shot tasks through lm-evaluation-harness. The only place that knows that package, which may not be there."""

import contextlib
import logging
import math
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.models.offload import on_device
from snp_llm.runtime.device import ran_out
from snp_llm.runtime.errors import SnpError, near


@dataclass(frozen=True)
class Tasks:
    """Tasks to run, and how much of them.

    Attributes:
        names: of tasks, groups or tags, as the harness knows them.
        include_path: folder of further task files.
        limit: examples of every task, or None for all.
        num_fewshot: examples shown, or None for what each task says.
    """

    names: list[str]
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None


def check_harness() -> None:
    """Raises SnpError if the harness is not installed."""
    if find_spec("lm_eval") is None:
        raise SnpError("--tasks: lm-evaluation-harness is not installed. Install it with: pip install 'snp-llm[eval]'")


def find_tasks(tasks: Tasks) -> Any:
    """The harness's task manager, which is made once, since that takes seconds.

    Raises:
        SnpError: no such task.
    """
    with _harness():
        from lm_eval.tasks import TaskManager

        if tasks.include_path is not None:  # its own thousands of files need not be read for tasks that are all here
            manager = TaskManager(include_path=tasks.include_path, include_defaults=False)
            if set(tasks.names) <= set(manager.all_tasks):
                return manager
        manager = TaskManager(include_path=tasks.include_path)
        known = manager.all_tasks
    for name in tasks.names:
        if name not in known:
            asked = near(name, known)
            raise SnpError(f"--tasks: lm-evaluation-harness has no task {name!r} of {len(known):,}.{asked}")
    return manager


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    manager: Any,
    *,
    batch_size: int,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """Metrics by task: each metric, its standard error as `..._stderr`, `samples` and `num_fewshot`.

    Args:
        model: on `device` for as long as it takes.
        tokenizer: its.
        tasks: what to run.
        manager: of `find_tasks`.
        batch_size: requests at a time.

    Raises:
        SnpError: whatever the harness could not do, in one line.
    """
    with _harness(), on_device(model.eval(), device):
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = simple_evaluate(
            model=harness_model,
            tasks=[*tasks.names],
            task_manager=manager,
            limit=tasks.limit,
            num_fewshot=tasks.num_fewshot,
            log_samples=False,
            bootstrap_iters=1000,
        )
    assert found is not None
    return {name: _metrics(name, values, found) for name, values in found["results"].items()}


def _metrics(name: str, values: dict[str, Any], found: Any) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": 0.1}` without the filters' names where that is clear."""
    metrics: dict[str, float] = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if isinstance(value, bool) or not isinstance(value, int | float) or not chosen or not math.isfinite(value):
            continue  # its name, and standard errors that are not known
        metrics[metric if chosen == "none" else f"{metric} ({chosen})"] = float(value)
    samples = found.get("n-samples", {}).get(name, {})
    if "effective" in samples:
        metrics["samples"] = samples["effective"]
    shots = found.get("n-shot", {}).get(name)
    if isinstance(shots, int):
        metrics["num_fewshot"] = shots
    return metrics


@contextlib.contextmanager
def _harness() -> Any:
    """Keeps the harness's talk off stdout, and makes one of the dozens of kinds of errors that it raises."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except SnpError:
            raise
        except Exception as error:
            if ran_out(error):
                raise
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SnpError(
                f"--tasks: lm-evaluation-harness failed: {first_line[:300]}. Check the task files and the network."
            ) from error
