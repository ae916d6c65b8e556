"""Runs commands on inputs that are wrong somewhere, and collects what is wrong with what came of it."""

import hashlib
import io
import os
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from snp_llm.cli.parse import prune_main
from tests.adversarial.fresh import digest, logits

CHEAP = ("--num-samples", 2, "--seq-len", 16, "--no-eval", "--quiet")
KEEP_ALL = (*CHEAP, "--sparsity", 0)
BUNDLED = ("--calibration", "bundled")
QUICKER = ("--allocation", "uniform", "--metric", "error", "--reference", "self")  # no visit to the dense model
SAMPLE = 8  # one accepted model of so many is loaded in a fresh process too
ERROR = "snp-llm: error: "


class Trials:
    """Of one kind of input.

    Attributes:
        place: working directory and home of every input, emptied before each.
        faults: what none of them may do, in words.
        accepted, refused: exit codes 0 and 2.
    """

    def __init__(self, place: Path, fresh: Callable[[Path], str]) -> None:
        self.place, self.fresh = place, fresh
        self.faults: list[str] = []
        self.accepted = self.refused = 0

    def clean(self) -> Path:
        os.chdir("/")
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir(parents=True)
        os.chdir(self.place)
        return self.place

    def run(
        self,
        name: str,
        main: Callable[[Sequence[str]], int],
        arguments: Sequence[Any],
        *,
        makes: Sequence[str] = ("out",),
        changes: Sequence[str] = (),
        keeps: Sequence[str] = (),
        wrong: str | None = None,
    ) -> int:
        """The exit code.

        Args:
            name: of the input, for messages.
            main: the command.
            arguments: its.
            makes: what may be there after it ended well, below `place`.
            changes: files that may then be other ones.
            keeps: what may be there and other than before in any case.
            wrong: what an error has to begin with, after a word or two: that where the mistake is.
        """
        before = contents(self.place)
        # As strict as the real ones are.
        stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
        stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
        try:
            with redirect_stdout(stdout), redirect_stderr(stderr):
                code = main([str(argument) for argument in arguments])
                stdout.flush()
        except (Exception, SystemExit):
            self.fault(name, traceback.format_exc(limit=-4))
            return -1
        stderr.flush()
        said = stderr.buffer.getvalue().decode().splitlines()  # type: ignore[attr-defined]
        errors = [line for line in said if line.startswith(ERROR)]
        after = contents(self.place)
        if code == 0:
            self.accepted += 1
            for part in makes:
                after = {path: what for path, what in after.items() if path != part and not path.startswith(f"{part}/")}
        else:
            self.refused += 1
        for path in [*keeps, *(changes if code == 0 else ())]:
            before.pop(path, None)
            after.pop(path, None)
        if code not in (0, 2):
            self.fault(name, f"exit code {code}")
        if (
            len(errors) != (code == 2)
            or (errors and said[-1] != errors[0])
            or any("Traceback" in line for line in said)
            or (code == 2 and len(said) > 2)  # one remark may come before it
        ):
            self.fault(name, f"exit code {code}, said {said}")
        if errors and wrong is not None and wrong not in errors[0][len(ERROR) :][: len(wrong) + 20]:
            self.fault(name, f"blames something else: {errors[0]}")
        if errors and (len(errors[0]) > 3000 + len("".join(map(str, arguments))) or len(errors[0]) < len(ERROR) + 15):
            self.fault(name, f"an error of {len(errors[0])} characters: {errors[0][:300]}")
        if changed := [path for path in {**before, **after} if before.get(path) != after.get(path)]:
            self.fault(name, f"exit code {code}, {changed[:3]} was changed, made or removed; {errors}")
        return code

    def prune(
        self, name: str, model: Path, *settings: Any, same: bool = True, visit: bool = False, wrong: str | None = None
    ) -> int:
        """Prunes a model, with everything kept where `same`: then its logits have to be those of the loaded one."""
        arguments = (model, "--output", self.place / "out", *settings, *(() if visit else QUICKER))
        code = self.run(name, prune_main, arguments, wrong=wrong)
        if code == 0 and same:
            self.compare(name, model)
        return code

    def compare(self, name: str, model: Path) -> None:
        """The saved folder against the one that it was made from, as transformers loads both."""
        try:
            expected, found = logits(model), logits(self.place / "out")
        except Exception:
            self.fault(name, "accepted, but does not load: " + traceback.format_exc(limit=-1))
            return
        if digest(expected) != digest(found) and not torch.equal(expected.isnan(), found.isnan()):
            self.fault(name, "other places of NaN")
        elif not torch.equal(expected.nan_to_num(), found.nan_to_num()):
            self.fault(name, f"other logits, by {(expected - found).abs().max():.1e}")
        elif self.accepted % SAMPLE == 0 and self.fresh(self.place / "out") != digest(found):
            self.fault(name, "other logits in a fresh process")

    def fault(self, name: str, text: str) -> None:
        self.faults.append(f"{name}: {text}")

    def check(self, count: int) -> None:
        """Raises AssertionError unless so many inputs were tried, some refused, some accepted, and nothing wrong."""
        assert not self.faults, f"{len(self.faults)} faults:\n" + "\n".join(self.faults[:40])
        assert self.accepted + self.refused == count
        assert self.accepted and self.refused, (self.accepted, self.refused)


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder: links, files by their content, folders."""
    found: dict[str, str] = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(root, name)
            if os.path.islink(path):
                what = "-> " + os.readlink(path)
            elif os.path.isfile(path):
                what = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            else:
                what = "folder" if os.path.isdir(path) else "other"
            found[os.path.relpath(path, folder)] = what
    return found
