"""Results on stdout, progress on stderr: rich on a terminal, plain lines elsewhere. Knows not what is in them."""

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from snp_llm.runtime import ranks
from snp_llm.runtime.numbers import human_time
from snp_llm.runtime.signs import Signs

log = logging.getLogger("snp_llm")

WIDE = 200  # columns where there is no terminal that would wrap them

SAID_FROM = 2.0  # seconds left that are worth a word

SELDOM = 10.0  # seconds between two lines of the same piece of work


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column stands left and all others right; brackets in names are no markup."""
    table = Table()
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
def progress(steps: int | None, what: str = "calibrating", *, every: float = 0.0) -> Iterator[Signs]:
    """A bar with the time left, above a line about the last step, on a terminal; elsewhere lines, with the time left.

    Args:
        steps: how many there will be; None where the work says so itself, or what share of it is done.
        what: is being done before the first of them.
        every: seconds that lie between two lines at least, where there is no terminal.
    """
    console = Console(stderr=True)
    if ranks.rank():
        yield Signs()
        return
    if not console.is_terminal or not log.isEnabledFor(logging.INFO):  # --quiet has no bar either
        yield Lines(steps, what, every).signs()
        return
    bar = Progress(
        BarColumn(), _Counted(), TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), TextColumn("left")
    )
    task = bar.add_task("", total=steps)
    last = Text(what, no_wrap=True, overflow="ellipsis")  # a line of its own: it leaves a bar no room

    def begin(line: str) -> None:
        last.plain = line

    def step(line: str) -> None:
        begin(line)
        bar.advance(task)

    def skip(count: int) -> None:
        total = bar.tasks[0].total
        bar.update(task, total=None if total is None else max(0, total - count))

    def expect(count: int) -> None:
        bar.update(task, total=count)

    def share(done: float) -> None:
        bar.update(task, total=1.0, completed=done)

    handlers = log.handlers
    with Live(Group(bar, last), console=console, transient=True):
        log.handlers = [logging.StreamHandler()]  # to what is stderr inside, so that warnings stand above the bar
        try:
            yield Signs(step, begin, skip, expect, share)
        finally:
            log.handlers = handlers


def watching(what: str) -> AbstractContextManager[Signs]:
    """The signs of a piece of work that tells what share of it is done; without a terminal a line now and then."""
    return progress(None, what, every=SELDOM)


class _Counted(ProgressColumn):
    """Steps that are done of all; of shares the percentage."""

    def render(self, task: Task) -> Text:
        if task.total == 1.0:
            return Text(f"{100 * task.completed:3.0f} %")
        if task.total is None:
            return Text(f"{task.completed:.0f}" if task.completed else "")
        return Text(f"{task.completed:.0f}/{task.total:.0f}")


@dataclass
class Lines:
    """A bar's place where there is no terminal: a line a step, and how long the rest will take at that rate.

    Attributes:
        steps, what, every: as of `progress`.
        began: when the work did.
        said: when the last line was.
        done: steps.
    """

    steps: int | None
    what: str
    every: float
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    done: int = 0

    def signs(self) -> Signs:
        """What tells this of the work, after a first line about it where that is all that there may be."""
        if self.every:
            log.info("%s", self.what)
        return Signs(self.step, log.info, self.skip, self.expect, self.share)

    def step(self, line: str) -> None:
        """One more is done."""
        self.done += 1
        if self.steps is None or not self.done < self.steps:
            self.say(line, None)
        else:
            self.say(f"{line} ({self.done} of {self.steps})", self.done / self.steps)

    def skip(self, count: int) -> None:
        """An earlier run has done so many."""
        self.steps = None if self.steps is None else max(self.done, self.steps - count)

    def expect(self, count: int) -> None:
        """So many there will be."""
        self.steps = count

    def share(self, done: float) -> None:
        """That share is done."""
        if done < 1:
            self.say(f"{self.what}: {100 * done:.0f} %", done)

    def say(self, line: str, share: float | None) -> None:
        """Writes a line, with the time left where a share of the work is known to be done, if it is time for one."""
        now = time.monotonic()
        if now - self.said < self.every:
            return
        self.said = now
        left = 0.0 if share is None else (now - self.began) * (1 / share - 1)
        log.info("%s", f"{line}, {human_time(left)} left" if left >= SAID_FROM else line)
