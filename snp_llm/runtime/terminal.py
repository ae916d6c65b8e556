"""Results on stdout, progress on stderr: rich on a terminal, plain lines elsewhere. Knows not what is in them."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from snp_llm.runtime import ranks

log = logging.getLogger("snp_llm")


WIDE = 200  # columns where there is no terminal that would wrap them


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table whose first column stands left and all others right; brackets in names are no markup."""
    table = Table(title=None if title is None else Text(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_table(table: Table) -> None:
    """Prints a table, on a terminal with lines and in its width, elsewhere in plain columns that nothing wraps."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
        table.box, table.pad_edge = None, False
    console.print(table)


def print_json(value: dict[str, Any]) -> None:
    """Prints a result for other programs."""
    print(json.dumps(value, indent=1, allow_nan=False))


@contextlib.contextmanager
def progress(steps: int | None, what: str = "calibrating") -> Iterator[Callable[[str], None]]:
    """A bar with the time left, above the last step's line, on a terminal; a line a step elsewhere.

    Args:
        steps: how many there will be; None where that is not known.
        what: is being done before the first of them.
    """
    console = Console(stderr=True)
    if ranks.rank():
        yield lambda _line: None
        return
    if not console.is_terminal or not log.isEnabledFor(logging.INFO):  # --quiet has no bar either
        yield log.info
        return
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), "left"
    )
    task = bar.add_task("", total=steps)
    last = Text(what, no_wrap=True, overflow="ellipsis")  # a line of its own: it leaves a bar no room

    def step(line: str) -> None:
        last.plain = line
        bar.advance(task)

    handlers = log.handlers
    with Live(Group(bar, last), console=console, transient=True):
        log.handlers = [logging.StreamHandler()]  # to what is stderr inside, so that warnings stand above the bar
        try:
            yield step
        finally:
            log.handlers = handlers
