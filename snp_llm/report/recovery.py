"""What a recovery adds to the report, the card and the terminal. Trains nothing."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from snp_llm.recipe.recovery import RecoverRecipe
from snp_llm.recovery.recover import Recovered
from snp_llm.report.card import update_card
from snp_llm.report.read import SAME_PERPLEXITY
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


def of_another(
    report: Mapping[str, Any], parameters: int, figures: list[dict[str, Any]] | None, measured: str | None
) -> bool:
    """Whether the dense model of a recovery is another than the one that was pruned, such as the one before an earlier
    pruning: of another size, or of other figures on the same text.

    Args:
        report: of the pruned model.
        parameters: of the dense one.
        figures: what dense, pruned and recovered model were measured to be, or None.
        measured: what these are of.
    """
    dense = report["dense"]
    if parameters != dense["size"]["parameters"]:
        return True
    if figures is None or measured != report.get("evaluation"):
        return False
    both = [(dense.get(key), figures[0].get(key)) for key in QUALITIES]
    return any(None not in pair and abs(pair[1] - pair[0]) > SAME_PERPLEXITY * pair[0] for pair in both)


def with_recovery(
    report: dict[str, Any],
    made: dict[str, Any],
    figures: list[dict[str, Any]] | None,
    measured: str | None = None,
    *,
    another: bool = False,
) -> dict[str, Any]:
    """The report of a pruned model as that of the recovered one.

    Args:
        report: as it was.
        made: `entry`.
        figures: what dense, pruned and recovered model were measured to be, or None.
        measured: what these are of.
        another: whether the first of these is not the model that was pruned, whose figures then stay if they are of the
            same, and are not known if not.
    """
    dense, _, after = figures or [{}, {}, dict.fromkeys(QUALITIES)]
    if another:
        same = figures is None or measured == report.get("evaluation")
        dense = {} if same else dict.fromkeys(QUALITIES)
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


def columns(made: dict[str, Any]) -> tuple[str, ...]:
    """Whose figures these are."""
    return tuple(Path(made["dense"]).name if made.get("another") and c == "dense" else c for c in COLUMNS)


def table(made: dict[str, Any]) -> Table:
    """These figures for the terminal."""
    return table_of(columns(made), rows(made))


def sentence(made: dict[str, Any]) -> str:
    """What was done, in a sentence."""
    if not made["kept"]:
        return (
            f"Nothing was better than before, after {made['items']:,} {made['item']}s: the weights are what they were."
        )
    how = "all weights of the blocks" if made["recipe"]["train"] == "blocks" else "low-rank changes, since merged,"
    toward = Path(made["dense"]).name if made.get("another") else "the dense model"
    return (
        f"Trained {how} towards {toward} on {made['items']:,} {made['item']}s of {made['text']}, "
        f"{made['held_out']} of them held out, in {made['seconds']:,.0f} seconds on {made['device']}."
    )


def write_section(made: dict[str, Any], folder: Path) -> None:
    """The section of the model card."""
    head = [f"| {' | '.join(columns(made))} |", "|---|---:|---:|---:|"]
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
