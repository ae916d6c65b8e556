"""What stands beside the weights in a finished folder: report, model card, recipe. Computes nothing."""

from pathlib import Path
from typing import Any

from snp_llm.checkpoint import contents
from snp_llm.pruning.pipeline import PrunedModel
from snp_llm.recipe.file import save_recipe
from snp_llm.report import card, facts


def describe(
    folder: Path,
    pruned: PrunedModel,
    measured: tuple[facts.Measured, facts.Measured],
    more: dict[str, Any],
    base_model: str | None = None,
) -> dict[str, Any]:
    """Writes report, model card and recipe of a pruned model beside its weights.

    Args:
        folder: that the model has been saved in.
        pruned: the model.
        measured: figures of the dense and of the pruned one.
        more: facts of the run, see `build_report`.
        base_model: on the Hub, if it is there.

    Returns:
        The report.
    """
    summary = facts.build_report(pruned, *measured, more)
    card.write_card(summary, pruned.model.config, base_model, folder)
    save_recipe(pruned.recipe, folder / contents.RECIPE, more.get("command"))
    written = [name for name in contents.files_in(folder) if name.split("/")[0] not in contents.UNFINISHED]
    summary["files"] = sorted({*written, contents.REPORT})  # of which --overwrite replaces no more
    facts.write_report(summary, folder)
    return summary
