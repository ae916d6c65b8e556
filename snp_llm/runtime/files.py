"""Files that appear whole or not at all, and checksums of them. Knows nothing of what is in them."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from snp_llm.runtime.errors import DiskError

PIECE = 2**22  # bytes read at a time

SECTION = 2**26  # bytes that one thread sums up


def checksum(file: Path) -> str:
    """SHA-256 over the SHA-256 of every section of a file, in hexadecimal; empty where it cannot be read.

    One after the other would take longer than reading the file.
    """

    def of_section(start: int) -> bytes:
        digest, left = hashlib.sha256(), SECTION
        with open(file, "rb") as stream:
            stream.seek(start)
            while left and (piece := stream.read(min(PIECE, left))):
                digest.update(piece)
                left -= len(piece)
        return digest.digest()

    try:
        starts = range(0, max(1, file.stat().st_size), SECTION)
        if len(starts) == 1:
            sums = [of_section(0)]
        else:
            with ThreadPoolExecutor() as pool:
                sums = [*pool.map(of_section, starts)]
    except OSError:
        return ""
    return hashlib.sha256(b"".join(sums)).hexdigest()


def write_tensors(
    file: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None, *, flush: bool = True
) -> None:
    """Writes a safetensors file, all of it or nothing; without `flush` a power cut may leave something else.

    Raises:
        DiskError: the disk is full, or fails.
    """
    with _whole(file, flush=flush) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata=facts)


def write_text(file: Path, text: str) -> None:
    """Writes a text file, all of it or nothing.

    Raises:
        DiskError: the disk is full, or fails.
    """
    with _whole(file) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def _whole(file: Path, *, flush: bool = True) -> Iterator[Path]:
    new = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield new
        if flush:
            flush_to_disk(new)
        new.replace(file)
        if flush:
            flush_to_disk(file.parent)
    except (OSError, SafetensorError) as error:
        raise DiskError(f"{file}: cannot be written ({error}). Make room there, or allow it.") from error
    finally:
        with suppress(OSError):  # it is gone, if all went well, or cannot go
            new.unlink()


def flush_to_disk(path: Path) -> None:
    """Waits until a file or folder is on the disk, where a power cut leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
