"""What an unfinished run has got done, so that it can go on after it was killed. Knows tensors, JSON and files alone.

A journal is a folder in the temporary one of the output: a file for every block of every phase, and now and then the
hidden states between two blocks. Files appear under their names when they are complete and on the disk, and the state
of a phase, which is written last, holds the SHA-256 of all others: what was damaged, lost or exchanged since is done
anew, never used.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from threading import enumerate as running_threads
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from snp_llm.runtime import ranks
from snp_llm.runtime.device import Clock
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.files import checksum, flush_to_disk, write_tensors, write_text

log = logging.getLogger(__name__)


IDENTITY = "identity.json"

STATE = "state.json"

WRITER = "journal"  # name of threads that write blocks while the next one is computed

AFFORDABLE = 20  # hidden states are written again after so many times as long as that took


def wait_for_writers() -> None:
    """Waits until no journal writes any more, so that its folder can be moved or removed."""
    for thread in running_threads():
        if thread.name == WRITER:
            thread.join()


@dataclass
class Journal:
    """One phase of a run, block by block.

    Attributes:
        folder: of its files; None: everything is kept in memory, for as long as the process lives.
        every: seconds after which hidden states are written again, if that took less than a twentieth of them; 0: after
            every block.
        run: SHA-256 of the identity of the run that this belongs to.
        place: path of the phase inside the journal.
        kept: what is in memory, by block.
        sums: SHA-256 of this rank's files, by name, since the state was written last.
        behind: whether blocks are written while the run goes on; of use where it does not need the CPU for itself.
        saved: when hidden states were written last, and how long it took.
        writing: what is being written, while the run goes on.
        flushed: names of files that a power cut leaves on the disk.
        clock: of the run, so that what an interrupted one has spent is counted; None: nobody asks for it.
    """

    folder: Path | None = None
    every: float = 60.0
    run: str = ""
    place: str = ""
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    behind: bool = False
    saved: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), 0.0))
    writing: list[Future[None]] = field(default_factory=list)
    flushed: set[str] = field(default_factory=set)
    clock: Clock | None = None

    def belongs_to(self, identify: Callable[[], dict[str, Any]]) -> None:
        """Writes down what run this is the journal of, or checks that it is the same as before.

        Args:
            identify: gives what the result depends on, as JSON can hold it; values are strings or dicts. Called on rank
                0, and not at all where nothing is written.

        Raises:
            SnpError: it is another run's.
        """
        if self.folder is not None:
            self.run = ranks.from_rank(0, lambda: self._identify(identify()))

    def phase(self, name: str) -> "Journal":
        """The journal of a phase."""
        folder = None if self.folder is None else self.folder / name
        return Journal(folder, self.every, self.run, f"{self.place}/{name}", behind=self.behind, clock=self.clock)

    def remembered(self, name: str, decide: Callable[[], Any]) -> Any:
        """What an earlier run of the phase has decided, else what `decide` returns, as JSON can hold it; on rank 0.

        Without the decision, what else the phase has done is worth nothing: it is forgotten.
        """
        if self.folder is None:
            return decide()
        file = self.folder / f"{name}.json"
        found = self._read(file)
        if found is None:
            if (self.folder / STATE).exists():
                self._forget(file.name)
            found = decide()
            self._write(file, found)
        return found

    def put(self, index: int, tensors: dict[str, Tensor], facts: Any = None) -> None:
        """Keeps the tensors of a block, and facts beside them that JSON can hold."""
        if self.folder is None:
            self.kept[index] = tensors
            return
        file, metadata = self.file(index), None if facts is None else {"facts": json.dumps(facts)}

        def write() -> None:
            write_tensors(file, tensors, metadata, flush=False)
            self.sums[file.name] = checksum(file)

        self.settle()  # one block at a time is held for it
        if not self.behind:
            write()
            return
        written: Future[None] = Future()

        def run() -> None:
            try:
                write()
                written.set_result(None)
            except BaseException as error:
                written.set_exception(error)

        Thread(target=run, name=WRITER).start()
        self.writing.append(written)

    def settle(self) -> None:
        """Waits until what was put is in its file.

        Raises:
            DiskError: the disk is full, or fails.
        """
        while self.writing:
            self.writing.pop().result()

    def get(self, index: int, name: str) -> Tensor | None:
        """One of a block's tensors, read from the file only where it is touched, or None where there is none."""
        if self.folder is None:
            return self.kept.get(index, {}).get(name)
        self.settle()
        try:
            with safe_open(self.file(index), framework="pt") as file:
                return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - it is no mapping
        except FileNotFoundError:
            return None

    def facts(self, index: int) -> Any:
        """What was put beside a block's tensors."""
        self.settle()
        with safe_open(self.file(index), framework="pt") as file:
            return json.loads(file.metadata()["facts"])

    def file(self, index: int) -> Path:
        """Where a block's tensors are, in a journal on disk."""
        assert self.folder is not None
        return self.folder / f"{index:05d}.safetensors"

    def save_state(self, done: int, state: dict[str, Tensor], windows: range, *, last: bool = False) -> None:
        """Writes down that so many blocks are done, with what is needed to go on, if it is time to.

        Args:
            done: blocks in a row.
            state: tensors of this rank's windows, (windows, ...), or of the first of them, or scalars that are the same
                on all ranks.
            windows: of all calibration windows those.
            last: nothing follows in this phase, so that there is nothing to go on from.
        """
        if self.folder is None:
            return
        start = time.monotonic()
        if not last and not self.due():
            return
        self.settle()
        for name in self.sums.keys() - self.flushed:  # all at once, before anything counts on them
            flush_to_disk(self.folder / name)
        self.flushed |= self.sums.keys()
        file = self.folder / f"state-{done:05d}-{ranks.rank()}.safetensors"
        write_tensors(file, {} if last else {key: tensor.detach() for key, tensor in state.items()})
        part = {"file": file.name, "start": windows.start, "stop": windows.stop, "sum": checksum(file)}
        everything = ranks.from_all((part, self.sums))
        parts = [part for part, _ in everything]
        for _, sums in everything:
            self.sums |= sums
        if ranks.rank() == 0:
            spent = {} if self.clock is None else self.clock.seconds
            found = {"done": done, "last": last, "parts": parts, "blocks": self.sums, "seconds": spent}
            self._write(self.folder / STATE, found)
            current = {part["file"] for part in parts}
            for old in self.folder.glob("state-*.safetensors"):
                if old.name not in current:
                    old.unlink()
        self.saved = (time.monotonic(), time.monotonic() - start)

    def due(self) -> bool:
        """Whether it is time to write down where the phase is; the same on all ranks."""
        waited, cost = time.monotonic() - self.saved[0], self.saved[1]
        due = self.folder is not None and (not self.every or waited >= max(self.every, AFFORDABLE * cost))
        return ranks.from_rank(0, lambda: due)

    def put_alone(self, done: int, tensors: dict[str, Tensor], facts: Any) -> None:
        """Writes down that so much is done, with all that is needed to go on, in the place of what was before.

        Args:
            done: steps.
            tensors: the same on all ranks, of which rank 0 writes them.
            facts: beside them, as JSON can hold them.
        """
        start, before = time.monotonic(), [*self.sums]
        self.sums.clear()
        if ranks.rank() == 0:
            self.put(done, tensors, facts)
        self.save_state(done, {}, range(1))
        if ranks.rank() == 0 and self.folder is not None:
            for name in before:
                (self.folder / name).unlink(missing_ok=True)
        self.saved = (time.monotonic(), time.monotonic() - start)

    def alone(self) -> tuple[dict[str, Tensor], Any] | None:
        """What was put alone, tensors and facts; None where there is nothing."""
        done, _ = self.last_state(range(1), 1)
        if self.folder is None or not done:
            return None
        with safe_open(self.file(done), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, self.facts(done)  # noqa: SIM118 - no mapping

    def last_state(self, windows: range, total: int) -> tuple[int, dict[str, Tensor]]:
        """How many blocks are done, and the state after them; no tensors where nothing follows.

        None are where the state is of more or fewer windows, as those of a visit may be with another number of ranks,
        and where anything that it counts on is not as it was.

        Args:
            windows: of all calibration windows those whose state this rank needs; other ranks may have written it.
            total: how many windows all ranks have.
        """
        if self.folder is None:
            return 0, {}
        found = ranks.from_rank(0, self._proved_state)
        if found is None or (not found["last"] and max(part["stop"] for part in found["parts"]) != total):
            return 0, {}
        self.sums = dict(found["blocks"])
        if self.clock is not None:
            self.clock.earlier = found["seconds"]
        where = "all done before" if found["last"] else f"goes on, {found['done']} done before"
        log.info("--resume: %s: %s", self.place[1:], where)
        pieces: dict[str, list[Tensor]] = {}
        for part in [] if found["last"] else found["parts"]:
            start, stop = max(part["start"], windows.start), min(part["stop"], windows.stop)
            with safe_open(self.folder / part["file"], framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    tensor = file.get_tensor(key)
                    if tensor.dim() == 0:
                        pieces[key] = [tensor]
                    elif start < stop:
                        pieces.setdefault(key, []).append(tensor[start - part["start"] : stop - part["start"]])
        return found["done"], {k: v[0] if v[0].dim() == 0 else torch.cat(v) for k, v in pieces.items()}

    def _proved_state(self) -> dict[str, Any] | None:
        """The state as it was written, if all files that it counts on are still what they were."""
        assert self.folder is not None
        if not (self.folder / STATE).exists():
            return None
        found: dict[str, Any] | None = self._read(self.folder / STATE)
        wrong = STATE
        if found is not None:
            sums = {part["file"]: part["sum"] for part in found["parts"]} | found["blocks"]
            wrong = next((name for name, sha256 in sums.items() if checksum(self.folder / name) != sha256), "")
        if wrong:
            self._forget(wrong)
            return None
        return found

    def _identify(self, identity: dict[str, Any]) -> str:
        assert self.folder is not None
        file, identity = self.folder / IDENTITY, json.loads(json.dumps(identity))
        before = self._read(file)
        if before is None:
            if file.exists():
                self._forget(IDENTITY)
            self._write(file, identity)
            before = identity
        for key, now in identity.items():
            then = before.get(key)
            if then == now:
                continue
            if isinstance(now, dict) and isinstance(then, dict):
                name = next(name for name in {**then, **now} if then.get(name) != now.get(name))
                key, then, now = f"{key} {name}", then.get(name), now.get(name)
            raise SnpError(
                f"--resume: the unfinished run in {self.folder.parent.name} had {key} {then!r}, this one has {now!r}; "
                "expected the same. Repeat its command, or start anew with --overwrite."
            )
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _write(self, file: Path, content: Any) -> None:
        text = json.dumps(content)
        write_text(file, json.dumps({"sha256": self._sum(file.name, text), "content": text}))

    def _read(self, file: Path) -> Any:
        """What `_write` wrote there, or None where that is not what the file holds."""
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return json.loads(found["content"]) if found["sha256"] == self._sum(file.name, found["content"]) else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _sum(self, name: str, text: str) -> str:
        return hashlib.sha256(f"{self.run} {self.place}/{name} {text}".encode()).hexdigest()

    def _forget(self, wrong: str) -> None:
        """Says that a file is not what it was, and removes the phase."""
        assert self.folder is not None
        place = f"{self.folder.name}/{wrong}"
        log.warning("--resume: %s is damaged, gone or of another run; what depends on it is done anew", place)
        shutil.rmtree(self.folder)
