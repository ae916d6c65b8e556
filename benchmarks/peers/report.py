"""Cells as a CSV, as tables for people and as a plot; which setting of a method counts."""

import csv
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from snp_llm.data.windows import Windows
from snp_llm.report.figures import Line, Panel, quality_figure
from snp_llm.runtime.device import compute_device

from .common import Method
from .measure import Quality
from .snp import OURS

FARTHEST_FROM_TARGET = 0.01


@dataclass(frozen=True)
class Text:
    """A text to measure on: windows, and the tokens after them, (tokens,), that questions are made of."""

    role: str
    label: str
    windows: Windows
    rest: Tensor

    @property
    def key(self) -> str:
        """`validation wikitext`, for instance."""
        return f"{self.role} {self.label}"


@dataclass(frozen=True)
class Row:
    """One cell; `quality` by a text's key, `answered` by its label. The dense model is a method of its own."""

    method: str
    family: str
    sparsity: float
    seed: int
    achieved: float
    seconds: float
    quality: dict[str, Quality] = field(default_factory=dict)
    answered: dict[str, float] = field(default_factory=dict)
    failed: str = ""

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> "Row":
        return Row(**stored | {"quality": {key: Quality(**value) for key, value in stored["quality"].items()}})


Chosen = dict[str, dict[float, list[Row]]]
"""Rows, one a seed, of the setting that counts, by family and sparsity."""


def choose(rows: Sequence[Row]) -> Chosen:
    """Of each family, at each sparsity, the rows of the setting with the lowest perplexity on the validation texts.

    The mean of its logarithm over these texts and the seeds decides; settings of which a seed is missing do not count.
    """
    table: dict[tuple[str, float], dict[str, list[Row]]] = {}
    for row in rows:
        table.setdefault((row.family, row.sparsity), {}).setdefault(row.method, []).append(row)
    chosen: Chosen = {}
    for (family, sparsity), settings in table.items():
        most = max(len(found) for found in settings.values())
        whole = [found for found in settings.values() if len(found) == most]
        chosen.setdefault(family, {})[sparsity] = min(whole, key=lambda found: statistics.mean(map(validated, found)))
    return chosen


def validated(row: Row) -> float:
    """Mean logarithm of the perplexities on validation texts; of what failed, infinite; without such texts, 0."""
    if row.failed:
        return math.inf
    values = [math.log(q.perplexity) for key, q in row.quality.items() if key.startswith("validation")]
    return statistics.mean(values) if values else 0.0


def markdown(
    command: str, rows: Sequence[Row], texts: Sequence[Text], calibration: Windows, methods: dict[str, Method]
) -> str:
    """The report for people: command, tables for each evaluation text, seconds, which setting counted, references."""
    dense, *others = rows
    chosen = choose(others)
    sparsities = sorted({row.sparsity for row in others})
    seeds = len({row.seed for row in others})
    apart = "; ".join(f"{text.label}: {text.windows.description}" for text in texts if text.role == "validation")
    lines = [
        f"    {command}",
        "",
        f"Calibrated on {calibration.description}, {seeds} seed{'s' if seeds > 1 else ''}"
        f"{': means ± half the range' if seeds > 1 else ''}. Sparsity is the share of the blocks' linear weights that "
        "is removed (for SliceGPT: as many parameters in all, its Q matrices included). Settings were chosen on "
        f"{apart or 'nothing'}. {torch.get_num_threads()} thread(s), {compute_device('auto').type}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}.",
    ]
    notes: dict[str, int] = {}
    for text in (text for text in texts if text.role == "evaluation"):
        lines += _text_lines(text, dense, chosen, sparsities, notes)
    lines += ["", "## CPU seconds of pruning", "", *_head(sparsities)]
    lines += _entries(chosen, sparsities, lambda row: row.seconds, ".1f", True, notes)
    lines += ["", "## Settings that counted", "", *_head(sparsities)]
    for family, curve in chosen.items():
        said = [
            methods[curve[s][0].method].title.removeprefix(family).lstrip(", ") if s in curve else ""
            for s in sparsities
        ]
        lines.append(f"| {family} | " + " | ".join(text or "as it is" for text in said) + " |")
    references = {methods[row.method].family: methods[row.method].reference for row in others}
    lines += ["", *(f"- {family}: {reference}" for family, reference in references.items())]
    lines += ["", *(f"({number}) {reason}" for reason, number in notes.items())]
    return "\n".join([*lines, ""])


def _text_lines(
    text: Text, dense: Row, chosen: Chosen, sparsities: Sequence[float], notes: dict[str, int]
) -> Iterator[str]:
    """A section on one text: a table for each measure."""
    at, label, asked = dense.quality[text.key].perplexity, text.label, text.label in dense.answered
    measures: list[tuple[str, Callable[[Row], float], str, bool]] = [
        ("Perplexity above dense:", lambda row: row.quality[text.key].perplexity - at, ".2f", True),
        ("Divergence from the dense model, nats a token:", lambda row: row.quality[text.key].kl, ".4f", True),
        ("Next tokens as the dense model's, %:", lambda row: 100 * row.quality[text.key].agreement, ".1f", False),
    ]
    if asked:
        title = f"Questions answered, % (dense: {100 * dense.answered[label]:.1f}; by chance: 25):"
        measures.append((title, lambda row: 100 * row.answered[label], ".1f", False))
    yield from ("", f"## {label}", "", f"{text.windows.description}; dense perplexity {at:.2f}.")
    for title, value, form, lowest in measures:
        yield from ("", title, "", *_head(sparsities))
        yield from _entries(chosen, sparsities, value, form, lowest, notes)
        if lowest and OURS in chosen and len(chosen) > 1:
            yield _ratios(chosen, sparsities, value)


def _head(sparsities: Sequence[float]) -> list[str]:
    return [
        f"| method | {' | '.join(f'{100 * s:g} %' for s in sparsities)} |",
        f"|---|{'---:|' * len(sparsities)}",
    ]


def _entries(
    chosen: Chosen,
    sparsities: Sequence[float],
    value: Callable[[Row], float],
    form: str,
    lowest: bool,
    notes: dict[str, int],
) -> Iterator[str]:
    """A line for each family; the best of each column bold; what failed, or is far from the target, said."""
    means = {
        (family, s): statistics.mean(map(value, curve[s]))
        for family, curve in chosen.items()
        for s in sparsities
        if s in curve and not any(row.failed for row in curve[s])
    }
    for family, curve in chosen.items():
        entries = []
        for s in sparsities:
            if (family, s) not in means:
                reason = next((row.failed for row in curve.get(s, []) if row.failed), "not measured")
                entries.append(f"({notes.setdefault(reason, len(notes) + 1)})")
                continue
            values = [value(row) for row in curve[s]]
            text = format(means[family, s], form)
            if len(values) > 1:
                text += f" ± {(max(values) - min(values)) / 2:{form}}"
            column = [mean for (_, at), mean in means.items() if at == s]
            text = f"**{text}**" if means[family, s] == (min if lowest else max)(column) else text
            achieved = statistics.mean(row.achieved for row in curve[s])
            far = abs(achieved - s) > FARTHEST_FROM_TARGET
            entries.append(f"{text} (at {100 * achieved:.1f} %)" if far else text)
        yield f"| {family} | " + " | ".join(entries) + " |"


def _ratios(chosen: Chosen, sparsities: Sequence[float], value: Callable[[Row], float]) -> str:
    """Ours over the best of all others that removes as much; where that one loses nothing there is no ratio."""
    entries = []
    for s in sparsities:
        others = {
            family: statistics.mean(map(value, curve[s]))
            for family, curve in chosen.items()
            if family != OURS and s in curve and not any(row.failed for row in curve[s])
            if statistics.mean(row.achieved for row in curve[s]) > s - FARTHEST_FROM_TARGET
        }
        if s not in chosen[OURS] or not others:
            entries.append("-")
            continue
        best = min(others, key=others.__getitem__)
        ours = statistics.mean(map(value, chosen[OURS][s]))
        entries.append(f"{ours / others[best]:.2f} ({best})" if others[best] > 0 else f"- ({best})")
    return "| " + " | ".join(["ours / best peer", *entries]) + " |"


def write_csv(rows: Sequence[Row], texts: Sequence[Text], path: Path) -> None:
    """Every cell, of every setting."""
    asked = list(rows[0].answered)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        head = [f"{name} {text.key}" for text in texts for name in ("perplexity", "kl", "agreement")]
        fixed = ["method", "family", "sparsity", "seed", "achieved", "seconds", "failed"]
        writer.writerow([*fixed, *head, *(f"answered {label}" for label in asked)])
        for row in rows:
            found = [row.quality.get(text.key) for text in texts]
            values = ["" if q is None else f"{x:.6f}" for q in found for x in _three(q)]
            start = [
                row.method,
                row.family,
                row.sparsity,
                row.seed,
                f"{row.achieved:.6f}",
                f"{row.seconds:.3f}",
                row.failed,
            ]
            writer.writerow([*start, *values, *(f"{row.answered.get(label, math.nan):.6f}" for label in asked)])


def _three(quality: Quality | None) -> tuple[float, float, float]:
    return (0.0, 0.0, 0.0) if quality is None else (quality.perplexity, quality.kl, quality.agreement)


def read_csv(path: Path) -> tuple[list[Row], list[str]]:
    """Cells of an earlier run, and the keys of its texts."""
    with open(path, newline="") as file:
        cells = list(csv.DictReader(file))
    keys = [column.removeprefix("perplexity ") for column in cells[0] if column.startswith("perplexity ")]
    rows = []
    for cell in cells:
        found = {
            key: Quality(*(float(cell[f"{name} {key}"]) for name in ("perplexity", "kl", "agreement")))
            for key in keys
            if cell[f"perplexity {key}"]
        }
        numbers = (float(cell["sparsity"]), int(cell["seed"]), float(cell["achieved"]), float(cell["seconds"]))
        rows.append(Row(cell["method"], cell["family"], *numbers, found, {}, cell["failed"]))
    return rows, keys


def plot(rows: Sequence[Row], keys: Sequence[str], model: str, path: Path) -> None:
    """Perplexity above dense of the settings that count, logarithmic above 1, one line a family, one panel a text."""
    dense, *others = rows
    panels = []
    for key in (key for key in keys if key.startswith("evaluation")):
        at, lines = dense.quality[key].perplexity, []
        for family, curve in choose(others).items():
            done = [s for s in sorted(curve) if not any(row.failed for row in curve[s])]
            means = [statistics.mean(row.quality[key].perplexity for row in curve[s]) - at for s in done]
            lines.append(Line(family, [100 * s for s in done], means, emphasised=family == OURS))
        title = f"{model}, {key.removeprefix('evaluation ')}, dense {at:.2f}"
        x_label = "parameters removed, % of the block-linear ones"
        panels.append(Panel(title, x_label, "perplexity above dense", lines, baseline=0, symlog=True))
    quality_figure(panels, size=(7, 5)).savefig(path, dpi=120)
