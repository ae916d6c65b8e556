"""The folder of a finished model: what may be replaced, a temporary sibling to write into, one exchange at the end."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from snp_llm.checkpoint.contents import JOURNAL, foreign
from snp_llm.checkpoint.exchange import mend, put_in_place, rest_of, signals_kept_waiting
from snp_llm.checkpoint.journal import wait_for_writers
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import DiskError, SnpError

log = logging.getLogger(__name__)


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
    for name in (_partial(place), _lock(_partial(place)), rest_of(_partial(place))):
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
        if found := foreign(place):
            raise SnpError(
                f"output {folder}: {found}; expected an empty folder, or one that `snp-llm prune` wrote and nothing "
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
                mend(partial, place)
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
                wait_for_writers()
                # Of a mistake that shows before the first cut, the visit to the dense model is all that would be kept.
                mistake = isinstance(error, SnpError) and not isinstance(error, DiskError)
                if can_resume(partial, "[!v]*" if mistake else "*"):
                    log.warning("the unfinished run is kept in %s; go on with --resume", partial)
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            with signals_kept_waiting(f"{folder} is complete"):
                put_in_place(partial, place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SnpError(f"output {folder}: cannot be written ({reason}).") from error


def can_resume(partial: Path, phases: str = "*") -> bool:
    """Whether a temporary folder holds anything that a run can go on from, in phases of some names."""
    return any(partial.glob(f"{JOURNAL}/{phases}/**/state.json"))


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
