"""The folder of a finished model: what may be replaced, a temporary sibling to write into, one exchange at the end.

Knows files, not what is in them but for the report that every finished folder has.
"""

import ctypes
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from snp_llm.runtime import ranks
from snp_llm.runtime.errors import DiskError, SnpError, reason
from snp_llm.runtime.json_files import read_json

log = logging.getLogger(__name__)


JOURNAL = "journal"  # what an unfinished run has done

DENSE = "dense"  # weights that are in no safetensors file

UNFINISHED = (JOURNAL, DENSE)  # parts of a temporary folder that do not belong to the finished one

REPORT = "prune_report.json"

PAGE = "report.html"

RECIPE = "recipe.yaml"

BENCH = "bench.json"

# What a model folder is made of. Pickles, hidden files and whatever else has come to lie in it are not.
PARTS = (
    *("*.safetensors", "*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md"),
    *(PAGE, RECIPE, "LICENSE", "NOTICE"),
)

NEW, REPLACED = "new", "replaced"  # in what an exchange leaves: the new folder's number, the old folder

LATER = (REPORT, PAGE, BENCH, "README.md")  # written into a finished folder, or anew, by commands other than prune

AT_WORKING_DIRECTORY, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


def check_output(folder: Path, *, overwrite: bool, inputs: Mapping[str, Path] | None = None) -> None:
    """Raises SnpError if the finished model could not be put there, before hours are spent on it.

    What is replaced is an empty folder, or one that this program made, with nothing in it that it did not write.

    Args:
        folder: to be; a link stands for what it points to.
        overwrite: whether it may be there already.
        inputs: files and folders that the run reads, by what they are; a folder that is, holds or lies in one of them
            is not replaced.
    """
    place = _place(folder)
    for name in (_partial(place), _lock(_partial(place)), _rest(_partial(place))):
        if name.is_symlink() or (name.exists() and name.is_dir() == name.name.endswith(".lock")):
            raise SnpError(
                f"output {folder}: {name.name} beside it is in the way; expected nothing there but what an unfinished "
                "run left. Remove it, or choose another --output."
            )
    if place.exists():
        if not place.is_dir():
            raise SnpError(f"output {folder}: is a file; expected a folder or nothing.")
        if not overwrite:
            raise SnpError(f"output {folder}: exists. Choose another --output, or replace it with --overwrite.")
        for what, path in {"the working directory": Path.cwd(), **(inputs or {})}.items():
            _check_apart(folder, place, what, path)
        if foreign := _foreign(place):
            raise SnpError(
                f"output {folder}: {foreign}; expected an empty folder, or one that `snp-llm prune` wrote and nothing "
                "else has been put into. --overwrite replaces no other. Choose another --output, or remove it yourself."
            )
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise SnpError(f"output {folder}: cannot be written ({error.strerror or error}).") from error


def files_in(folder: Path) -> list[str]:
    """Paths of all files in a folder, relative to it, sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def _foreign(folder: Path) -> str:
    """What speaks against this program having made all of a folder; nothing where it is empty."""
    if not any(folder.iterdir()):
        return ""
    if not (folder / REPORT).exists():
        return f"has no {REPORT}"
    try:
        report = read_json(folder / REPORT, "")
    except SnpError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("snp_llm"), str):
        return f"its {REPORT} is not one of `snp-llm prune`"
    made = report.get("files")
    for name in files_in(folder):
        if isinstance(made, list):
            ours = name in (*made, *LATER)
        else:  # one of an earlier version, which kept no list
            ours = "/" not in name and any(fnmatch(name, part) for part in PARTS)
        if not ours:
            return f"holds {name}, which `snp-llm prune` did not write there"
    empty = (path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
    return next((f"holds the folder {path.relative_to(folder)}" for path in empty), "")


def _check_apart(folder: Path, place: Path, what: str, path: Path) -> None:
    try:
        other = path.resolve()
    except (OSError, RuntimeError):
        return
    if place == other:
        relation = "is"
    elif place in other.parents:
        relation = "holds"
    elif other in place.parents and what != "the working directory":
        relation = "lies in"
    else:
        return
    raise SnpError(
        f"output {folder}: {relation} {what}{'' if relation == 'is' else f' ({path})'}, which --overwrite would remove "
        "or change. Choose another --output."
    )


@contextmanager
def finished_folder(
    folder: Path, *, overwrite: bool, resume: bool = False, inputs: Mapping[str, Path] | None = None
) -> Iterator[Path]:
    """A temporary sibling of `folder` to write into, renamed to it when the context ends well, else removed.

    What the run has put into its `UNFINISHED` parts stays out of the finished folder. If there is something in them
    that a later run can go on from, the temporary folder outlives this one. At every moment, and however the process
    ends, either the old folder is whole in its place or the new one is.

    Args:
        folder: to be; a link stands for what it points to.
        overwrite: replace it if it is there, and forget an unfinished run.
        resume: go on with an unfinished run, if there is one.
        inputs: as for `check_output`.

    Raises:
        SnpError: it cannot be written, or is being written by another process; an unfinished run is there, unasked for.
        KeyboardInterrupt: a signal came while the folders were exchanged; says that the new one is in its place.
    """
    place = _place(folder)
    partial = _partial(place)
    if ranks.rank():  # rank 0 writes
        yield ranks.from_rank(0, lambda: partial)
        return
    try:
        with ExitStack() as stack:

            def open_it() -> Path:
                place.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(partial))
                _mend(partial, place)
                if partial.exists() and not (resume and can_resume(partial)):
                    if can_resume(partial) and not overwrite:
                        raise SnpError(
                            f"output {folder}: an unfinished run is there, in {partial.name}. Go on with it with "
                            "--resume, or forget it with --overwrite."
                        )
                    shutil.rmtree(partial)
                partial.mkdir(exist_ok=True)
                return partial

            try:
                ranks.from_rank(0, open_it)
                yield partial
                for file in partial.rglob("*"):  # safetensors makes its files readable by their owner only
                    file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
                partial.chmod(0o777 & ~_umask())
                check_output(folder, overwrite=overwrite, inputs=inputs)  # it may have changed since
            except BaseException as error:
                # Of a mistake that shows before the first cut, the visit to the dense model is all that would be kept.
                mistake = isinstance(error, SnpError) and not isinstance(error, DiskError)
                if can_resume(partial, "[!v]*" if mistake else "*"):
                    log.warning("the unfinished run is kept in %s; go on with --resume", partial)
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            with _signals_kept_waiting(f"{folder} is complete"):
                _exchange(partial, place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SnpError(f"output {folder}: cannot be written ({reason}).") from error


def can_resume(partial: Path, phases: str = "*") -> bool:
    """Whether a temporary folder holds anything that a run can go on from, in phases of some names."""
    return any(partial.glob(f"{JOURNAL}/{phases}/**/state.json"))


def _exchange(partial: Path, place: Path) -> None:
    """Puts a temporary folder in the place of the finished one, and only then removes what nobody needs any more."""
    rest = _rest(partial)
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
        _mend(partial, place)
        raise
    _mend(partial, place)


def _mend(partial: Path, place: Path) -> None:
    """Undoes an exchange that was broken off half way, by whatever; or removes what it has left, where it was done."""
    rest = _rest(partial)
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
def _signals_kept_waiting(then: str) -> Iterator[None]:
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


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keeps other processes from writing the same output; the lock ends with the process, however that ends."""
    file = _lock(partial)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SnpError(
            f"output {partial.parent}: another run is writing {partial.name}. Wait for it or stop it."
        ) from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def _place(folder: Path) -> Path:
    """Where a folder is once all links on the way are followed.

    Raises:
        SnpError: links that lead in a circle; the root of all folders; a name that no file can have.
    """
    try:
        place = folder.resolve()
        _lock(_partial(place)).is_symlink()  # the longest name of all
    except (OSError, RuntimeError, ValueError) as error:
        raise SnpError(f"output {folder}: cannot be written ({getattr(error, 'strerror', None) or error}).") from error
    if not place.name:
        raise SnpError(f"output {folder}: expected a folder that can be made, got {place}.")
    return place


def _partial(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _lock(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _rest(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.old")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


CARD = "README.md"

NEEDED = ("recipe", "sparsity", "dense", "pruned", "sites", "calibration", "seconds")  # keys of every report


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an output folder.

    Raises:
        SnpError: there is none, or another file has its name.
    """
    file = folder / REPORT
    where = f"{file}: expected a report of `snp-llm prune`"
    report = read_json(file, where)
    missing = [key for key in NEEDED if key not in report] if isinstance(report, dict) else NEEDED
    if missing:
        raise SnpError(f"{where}; {missing[0]!r} is missing.")
    found: dict[str, Any] = report
    return found


def read_card(folder: Path) -> str:
    """The model card of an output folder.

    Raises:
        SnpError: it cannot be read.
    """
    card = folder / CARD
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise SnpError(f"{card}: expected a model card in UTF-8, cannot be read ({reason(error)}).") from error


def check_own_folder(flag: str, folder: str) -> None:
    """Raises SnpError if a result has no place in a folder, before it is computed."""
    missing = [name for name in (REPORT, "README.md") if not (Path(folder) / name).is_file()]
    if missing:
        raise SnpError(
            f"{flag}: expected an output folder of `snp-llm prune`; {folder} has no {' and no '.join(missing)}."
        )
