"""The results of a bench beside a pruned model: bench.json and a section of its card."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from snp_llm.checkpoint.contents import BENCH, read_card, read_report
from snp_llm.evaluate.cells import MODELS, Cell
from snp_llm.evaluate.turns import speed_words
from snp_llm.models.layouts import KERNEL_MULTIPLE
from snp_llm.report.card import update_card
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.files import write_text
from snp_llm.runtime.terminal import table_of


def bench_table(result: dict[str, Any]) -> Table:
    """Table of both models side by side, measured ratios beside those of the FLOPs and of the bytes of weights."""
    rows = []
    for cell in result["cells"]:
        named = Cell(**cell["cell"])
        shown = []
        for model in MODELS:
            timing = cell[model]
            spread = 50 * (timing["high"] - timing["low"]) / timing["seconds"]
            shown.append(f"{1000 * timing['seconds']:,.1f} ms ± {spread:.0f} %, {timing['per_second']:,.0f}/s")
        ratio = speed_words(cell["speedup"], cell["speedup_low"], cell["speedup_high"])
        rows.append((named.name, *shown, ratio, f"{cell['flops_ratio']:.2f}", f"{cell['bytes_ratio']:.2f}"))

    def row(name: str, values: Sequence[float], form: str) -> None:
        rows.append((name, *(format(v, form) for v in values), f"{values[0] / values[1]:.2f}", "", ""))

    if result["memory"]:
        memory = [result["memory"][model] for model in MODELS]
        row("peak host memory, MB", [m["host"] / 1e6 for m in memory], ",.0f")
        row("  above Python's own", [(m["host"] - m["libraries"]) / 1e6 for m in memory], ",.0f")
        if memory[0]["device"]:
            row("peak device memory, MB", [m["device"] / 1e6 for m in memory], ",.0f")
    row("size on disk, MB", [result["disk"][model] / 1e6 for model in MODELS], ",.2f")
    row("parameters", [result["parameters"][model] for model in MODELS], ",")
    return table_of(("", "dense", "pruned", "dense / pruned", "FLOPs", "weights read"), rows)


def width_warning(result: dict[str, Any]) -> list[str]:
    """A line where FFN widths of the pruned model are such as kernels do not like."""
    odd = result["odd_widths"]
    return [f"{odd} FFN widths are no multiples of {KERNEL_MULTIPLE}, which kernels like less."] if odd else []


def headline(result: dict[str, Any]) -> str:
    """Conditions of a benchmark, in one line."""
    number = result["threads"]
    threads = f", {number} thread{'s' if number > 1 else ''}" if number else ""
    dtypes = "/".join(dict.fromkeys(result["dtype"]))
    how = "torch.compile" if result["compile"] else "eager"
    items = Cell(**result["cells"][0]["cell"]).item
    return (
        f"{result['models']['dense']} and {result['models']['pruned']} on {result['device']}{threads}, {dtypes}, "
        f"{how}: medians of {result['repeats']} passes in turns ± half the quartiles' distance; {items} a second"
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
    update_card(folder, "Speed", [f"{headline(result)}.", "", head, rule, *rows, "", *width_warning(result)])
