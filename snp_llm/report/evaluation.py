"""The results of an evaluation in the report of a pruned model."""

import os
from pathlib import Path

from snp_llm.checkpoint.contents import REPORT, read_card, read_report
from snp_llm.evaluate.classified import Classified
from snp_llm.evaluate.side_by_side import Evaluated
from snp_llm.recipe.commands import EvaluationRecipe
from snp_llm.report.card import refresh_card
from snp_llm.report.facts import write_report
from snp_llm.runtime.errors import SnpError


def check_folder(folder: Path) -> None:
    """Raises SnpError if results could not be recorded in an output folder, before they are measured."""
    report = read_report(folder)
    read_card(folder)
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
    write_report(report, folder)
    refresh_card(report, folder)


def save_classified(result: Classified, folder: Path) -> None:
    """Records the accuracy of a model in its report, `accuracies` by what it was measured on; later ones replace."""
    report = read_report(folder)
    entry = {"text": result.text, "top1": result.top1, "top5": result.top5}
    report["accuracies"] = [*(e for e in report.get("accuracies", []) if e["text"] != result.text), entry]
    write_report(report, folder)
    refresh_card(report, folder)
