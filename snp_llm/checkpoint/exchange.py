"""One folder in the place of another: at every moment, and however the process ends, one of both is whole there."""

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from snp_llm.checkpoint.contents import UNFINISHED

NEW, REPLACED = "new", "replaced"  # in what an exchange leaves: the new folder's number, the old folder

AT_WORKING_DIRECTORY, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def put_in_place(partial: Path, place: Path) -> None:
    """Puts a temporary folder in the place of the finished one, and only then removes what nobody needs any more."""
    rest = rest_of(partial)
    rest.mkdir()
    (rest / NEW).write_text(str(partial.stat().st_ino))
    try:
        for name in UNFINISHED:
            if (partial / name).exists():
                (partial / name).rename(rest / name)
        if not place.exists():
            partial.rename(place)
        elif not _exchanged(partial, place):
            place.rename(rest / REPLACED)
            partial.rename(place)
    except BaseException:
        mend(partial, place)
        raise
    mend(partial, place)


def mend(partial: Path, place: Path) -> None:
    """Undoes an exchange that was broken off half way, by whatever; or removes what it has left, where it was done."""
    rest = rest_of(partial)
    if not rest.exists():
        return
    with suppress(OSError, ValueError):
        if place.exists() and place.stat().st_ino == int((rest / NEW).read_text()):
            shutil.rmtree(partial, ignore_errors=True)  # the old folder, if it is there
            shutil.rmtree(rest, ignore_errors=True)
            return
    if (rest / REPLACED).exists() and not place.exists():
        (rest / REPLACED).rename(place)
    for name in UNFINISHED:
        if (rest / name).exists() and partial.exists():
            (rest / name).rename(partial / name)
    shutil.rmtree(rest, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two folders at once, where the system can (Linux)."""
    rename: Any = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    here = AT_WORKING_DIRECTORY
    return bool(rename(here, os.fsencode(one), here, os.fsencode(other), EXCHANGE) == 0)


@contextmanager
def signals_kept_waiting(then: str) -> Iterator[None]:
    """Lets interrupts wait until the context ends well; then they are raised, saying what is the case by then."""
    came: list[int] = []
    before = {}
    with suppress(ValueError):  # not in the main thread, which signals do not interrupt
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt(128 + came[0], then)


def rest_of(partial: Path) -> Path:
    """Where an exchange puts what it has not yet removed, beside a temporary folder."""
    return partial.with_name(f"{partial.name}.old")
