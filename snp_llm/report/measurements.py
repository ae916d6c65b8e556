"""What other commands measured, as lines and tables of a page. Of foreign JSON it knows no keys."""

from dataclasses import dataclass
from typing import Any

from snp_llm.evaluate.turns import speed_words
from snp_llm.report.parts import Table
from snp_llm.report.words import count, flattened, setting_words, title_of


@dataclass(frozen=True)
class Measurements:
    """Foreign JSON in a form that can be shown: lines of name and value, and tables."""

    lines: list[tuple[str, str]]
    tables: list[Table]


def bench_measurements(value: Any) -> Measurements | None:
    """What `bench.json` holds, as a table of cells, dense beside pruned; whatever else has that name, key by key."""
    if not isinstance(value, dict) or not isinstance(cells := value.get("cells"), list):
        return measurements(value)
    rest = measurements({name: inner for name, inner in value.items() if name != "cells"})
    columns = ["", "dense, a second", "pruned", "times as fast", "FLOPs", "weights"]
    rows = []
    for c in cells:
        what, shape = c["cell"]["kind"], f"{c['cell']['batch']} \N{MULTIPLICATION SIGN} {count(c['cell']['length'])}"
        speeds = [count(c[model]["per_second"]) for model in ("dense", "pruned")]
        faster = speed_words(c["speedup"], c["speedup_low"], c["speedup_high"])
        ratios = [f"{c[ratio]:.3f}" for ratio in ("flops_ratio", "bytes_ratio")]
        rows.append([f"{what}, {shape}", *speeds, faster, *ratios])
    caption = (
        "Batch and prompt length, tokens a second, or images; medians and quartiles of ratios; FLOPs and weights of "
        "the dense model over those of the pruned one"
    )
    return Measurements(rest.lines if rest else [], [Table(caption, columns, rows)])


def recovery_measurements(value: Any) -> Measurements | None:
    """What a report says of recoveries: a table of judgements each, and what they were of; otherwise key by key."""
    if not isinstance(value, list) or not all(isinstance(made, dict) and "history" in made for made in value):
        return measurements(value)
    lines: list[tuple[str, str]] = []
    tables: list[Table] = []
    for made in value:
        told = ("text", "items", "seconds", "divergence", "figures", "command")
        found = measurements({name: made[name] for name in told if made.get(name) is not None})
        judged = measurements({"held-out divergence, nats": made["history"]})
        lines += found.lines if found else []
        tables += [*(judged.tables if judged else []), *(found.tables if found else [])]
    return Measurements(lines, tables)


def measurements(value: Any) -> Measurements | None:
    """Whatever another command measured, without knowing its keys; None where there is nothing.

    Args:
        value: JSON. Lists of objects become tables, all else lines.
    """
    if not value:
        return None
    lines: list[tuple[str, str]] = []
    tables: list[Table] = []

    def walk(inner: Any, path: tuple[str, ...]) -> None:
        if isinstance(inner, dict):
            for key, below in inner.items():
                walk(below, (*path, str(key)))
        elif isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            flat = [dict(flattened(row)) for row in inner]
            columns = list(dict.fromkeys(column for row in flat for column in row))
            rows = [[setting_words(row[column]) if column in row else "" for column in columns] for row in flat]
            tables.append(Table(title_of(path), [column.replace("_", " ") for column in columns], rows))
        else:
            lines.append((title_of(path), setting_words(inner)))

    walk(value, ())
    return Measurements(lines, tables)
