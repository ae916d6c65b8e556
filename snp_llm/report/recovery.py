"""What a recovery adds to the report, the card and the terminal. Trains nothing."""

from pathlib import Path
from typing import Any

from rich.table import Table

from snp_llm.recipe.recovery import RecoverRecipe
from snp_llm.recovery.recover import Recovered
from snp_llm.report.card import update_card
from snp_llm.report.rows import QUALITIES
from snp_llm.runtime.device import versions
from snp_llm.runtime.terminal import table_of

# Results of other commands in a report, which are of weights that a recovery replaces.
OUTDATED = ("perplexities", "accuracies", "tasks", "samples")


def entry(recipe: RecoverRecipe, recovered: Recovered, item: str, facts: dict[str, Any]) -> dict[str, Any]:
    """What is worth knowing about a recovery, ready for JSON.

    Args:
        recipe: settings.
        recovered: the result.
        item: what was counted, in the singular.
        facts: further entries.
    """
    progress = recovered.progress
    return {
        "recipe": recipe.as_dict(),
        "versions": versions(),
        "item": item,
        "items": progress.items,
        "steps": progress.step,
        "seconds": round(progress.seconds, 3),
        "divergence": {"before": progress.before, "after": recovered.after},
        "kept": bool(recovered.state),
        "history": progress.history,
        **facts,
    }


def with_recovery(report: dict[str, Any], made: dict[str, Any], figures: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The report of a pruned model as that of the recovered one.

    Args:
        report: as it was.
        made: `entry`.
        figures: what dense, pruned and recovered model were measured to be, or None.
    """
    dense, _, after = figures or [{}, {}, dict.fromkeys(QUALITIES)]
    kept = {key: value for key, value in report.items() if key not in OUTDATED}
    return {
        **kept,
        "dense": {**report["dense"], **dense},
        "pruned": {**report["pruned"], **after},
        "recovery": [*report.get("recovery", []), made],
    }


def rows(made: dict[str, Any]) -> list[list[str]]:
    """Figures of the dense model, and of the pruned one before and after, as text."""
    found = [
        [f"divergence, nats {'an' if made['item'] == 'image' else 'a'} {made['item']}", "0"]
        + [f"{made['divergence'][when]:.5f}" for when in ("before", "after")]
    ]
    for key, name in QUALITIES.items():
        values = [figures.get(key) for figures in made.get("figures") or []]
        if values and None not in values:
            found.append([name, *(f"{value:,.2f}" for value in values)])
    return found


COLUMNS = ("", "dense", "before", "recovered")


def table(made: dict[str, Any]) -> Table:
    """These figures for the terminal."""
    return table_of(COLUMNS, rows(made))


def sentence(made: dict[str, Any]) -> str:
    """What was done, in a sentence."""
    if not made["kept"]:
        return (
            f"Nothing was better than before, after {made['items']:,} {made['item']}s: the weights are what they were."
        )
    how = "all weights of the blocks" if made["recipe"]["train"] == "blocks" else "low-rank changes, since merged,"
    return (
        f"Trained {how} towards the dense model on {made['items']:,} {made['item']}s of {made['text']}, "
        f"{made['held_out']} of them held out, in {made['seconds']:,.0f} seconds on {made['device']}."
    )


def write_section(made: dict[str, Any], folder: Path) -> None:
    """The section of the model card."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---|---:|---:|---:|"]
    lines = [
        sentence(made),
        "",
        *head,
        *(f"| {' | '.join(row)} |" for row in rows(made)),
        "",
        f"`{made['command']}`",
        "",
    ]
    update_card(folder, "Recovery", lines)
