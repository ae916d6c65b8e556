"""What an unfinished run has got done, so that it can go on after it was killed. Knows files, not how they come about.

A journal is a folder in the temporary one of the output: a file for every block of every phase, and now and then the
hidden states between two blocks. Files appear under their names when they are complete and on the disk, so that at
every moment the folder holds what can be gone on from.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from snp_llm import ranks
from snp_llm.errors import SnpError
from snp_llm.linalg.units import unit_channels
from snp_llm.models.families import Family, Site, linear, weight_of
from snp_llm.models.on_disk import copy_unhooked, leave_on_disk
from snp_llm.models.surgery import prune_site
from snp_llm.site import Curve, SiteResult

# Last touches to a pruned block, given the block as it was at first and what happened at its sites.
Finish = Callable[[nn.Module, nn.Module, Sequence[SiteResult]], None]

IDENTITY = "identity.json"
STATE = "state.json"
AFFORDABLE = 20  # hidden states are written again after so many times as long as that took


@dataclass
class Journal:
    """One phase of a run, block by block.

    Attributes:
        folder: of its files; None: everything is kept in memory, for as long as the process lives.
        every: seconds after which hidden states are written again, if that took less than a twentieth of them; 0: after
            every block.
        kept: what is in memory, by block.
        saved: when hidden states were written last, and how long it took.
    """

    folder: Path | None = None
    every: float = 60.0
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    saved: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), 0.0))

    def belongs_to(self, identity: dict[str, Any]) -> None:
        """Writes down what run this is the journal of, or checks that it is the same as before.

        Args:
            identity: what the result depends on, as JSON can hold it; values are strings or dicts.

        Raises:
            SnpError: it is another run's.
        """
        if self.folder is not None:
            ranks.from_rank(0, partial(_identify, self.folder, identity))

    def phase(self, name: str) -> "Journal":
        """The journal of a phase."""
        return Journal(None if self.folder is None else self.folder / name, self.every)

    def put(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Keeps the tensors of a block."""
        if self.folder is None:
            self.kept[index] = tensors
        else:
            write(self.folder / f"{index:05d}.safetensors", tensors)

    def get(self, index: int, name: str) -> Tensor | None:
        """One of a block's tensors, read from the file only where it is touched, or None where there is none."""
        if self.folder is None:
            return self.kept.get(index, {}).get(name)
        try:
            with safe_open(self.folder / f"{index:05d}.safetensors", framework="pt") as file:
                return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 - it is no mapping
        except FileNotFoundError:
            return None

    def finish_block(self, block: nn.Module, results: Sequence[SiteResult], index: int) -> nn.Module:
        """Keeps a pruned block and what happened at its sites; the block that is returned may wait on disk."""
        if self.folder is None:
            return block
        file = self.folder / f"{index:05d}.safetensors"
        if ranks.rank() == 0:
            facts = {"results": json.dumps([_facts(result) for result in results])}
            write(file, {name: tensor.contiguous() for name, tensor in block.state_dict().items()}, facts)
        leave_on_disk(block, file)
        return block

    def results(self, sites: Sequence[Site], index: int) -> list[SiteResult]:
        """What happened at the sites of a finished block."""
        assert self.folder is not None
        with safe_open(self.folder / f"{index:05d}.safetensors", framework="pt") as file:
            found = json.loads(file.metadata()["results"])
        return [_result(site, facts) for site, facts in zip(sites, found, strict=True)]

    def finished_block(
        self,
        block: nn.Module,
        dense_block: nn.Module,
        family: Family,
        results: Sequence[SiteResult],
        finish: Finish | None,
        index: int,
    ) -> nn.Module:
        """A finished block, on disk. What was done to it is done again, to tensors that are not there.

        Args:
            block: as it was before the cut; left as it is.
            dense_block: as it was at first.
            family: its family.
            results: what happened at its sites.
            finish: last touches, or None.
            index: its number.
        """
        assert self.folder is not None
        pruned = copy_unhooked(block)
        for result in results:
            site, out = result.site, linear(pruned, result.site.out_projection)
            weight = weight_of(out)[:, unit_channels(result.kept, site.unit_size).to(out.weight.device)]
            prune_site(pruned, family, site, result.kept, weight, out.bias)
        if finish is not None:
            finish(pruned, dense_block, results)
        leave_on_disk(pruned, self.folder / f"{index:05d}.safetensors")
        return pruned

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
        waited, cost = start - self.saved[0], self.saved[1]
        if not ranks.from_rank(0, lambda: last or not self.every or waited >= max(self.every, AFFORDABLE * cost)):
            return
        name = f"state-{done:05d}-{ranks.rank()}.safetensors"
        write(self.folder / name, {} if last else {key: tensor.detach() for key, tensor in state.items()})
        parts = ranks.from_all({"file": name, "start": windows.start, "stop": windows.stop})
        if ranks.rank() == 0:
            write_text(self.folder / STATE, json.dumps({"done": done, "last": last, "parts": parts}))
            current = {part["file"] for part in parts}
            for file in self.folder.glob("state-*.safetensors"):
                if file.name not in current:
                    file.unlink()
        self.saved = (time.monotonic(), time.monotonic() - start)

    def last_state(self, windows: range, total: int) -> tuple[int, dict[str, Tensor]]:
        """How many blocks are done, and the state after them; no tensors where nothing follows.

        None are where the state is of more or fewer windows, as those of a visit may be with another number of ranks.

        Args:
            windows: of all calibration windows those whose state this rank needs; other ranks may have written it.
            total: how many windows all ranks have.
        """
        if self.folder is None or not (self.folder / STATE).exists():
            return 0, {}
        found = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        if not found["last"] and max(part["stop"] for part in found["parts"]) != total:
            return 0, {}
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


def write(file: Path, tensors: dict[str, Tensor], facts: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, all of it or nothing.

    Raises:
        SnpError: the disk is full.
    """
    with _whole(file) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, metadata=facts)


def write_text(file: Path, text: str) -> None:
    """Writes a text file, all of it or nothing."""
    with _whole(file) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    new = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield new
        _flush(new)
        new.replace(file)
        _flush(file.parent)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise SnpError(
            f"{file.parent}: cannot be written ({error}). What was done before is kept: make room, then go on with "
            "--resume."
        ) from error


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk, where a power cut leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _facts(result: SiteResult) -> dict[str, Any]:
    facts = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "site"}
    return {**facts, "kept": result.kept.tolist(), "curve": result.curve and asdict(result.curve)}


def _result(site: Site, facts: dict[str, Any]) -> SiteResult:
    kept, curve = torch.tensor(facts["kept"], dtype=torch.int64), facts["curve"]
    return SiteResult(site=site, **{**facts, "kept": kept, "curve": curve and Curve(**curve)})


def _identify(folder: Path, identity: dict[str, Any]) -> None:
    file, identity = folder / IDENTITY, json.loads(json.dumps(identity))
    if not file.exists():
        write_text(file, json.dumps(identity, indent=1))
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for key, now in identity.items():
        then = before.get(key)
        if then == now:
            continue
        if isinstance(now, dict) and isinstance(then, dict):
            name = next(name for name in now if then.get(name) != now[name])
            key, then, now = f"{key} {name}", then.get(name), now[name]
        raise SnpError(
            f"--resume: the unfinished run in {folder.parent.name} had {key} {then!r}, this one has {now!r}; expected "
            "the same. Repeat its command, or start anew with --overwrite."
        )
