"""Tables on stdout: rich on a terminal, plain columns elsewhere. Knows nothing of what is in them."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDE = 200  # columns where there is no terminal that would wrap them


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table whose first column stands left and all others right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(table: Table) -> None:
    """On a terminal with lines and in its width; elsewhere in plain columns that nothing wraps."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
        table.box, table.pad_edge = None, False
    console.print(table)
