"""The dense model's logits: computed when they are wanted, or before, the largest of them kept in files."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.models.calls import without_cache
from snp_llm.recovery.divergence import Targets, all_of, largest_of
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.files import write_tensors

WINDOWS_A_FILE = 64

# What the dense model says of windows, given as tokens or pixels and by their numbers.
Teacher = Callable[[Tensor, Sequence[int]], Targets]


def as_input(windows: Tensor, model: PreTrainedModel) -> Tensor:
    """Tokens as they are, and pixels in the type of a model."""
    return windows.to(model.dtype) if windows.is_floating_point() else windows


def live(dense: PreTrainedModel, *, hidden: bool = False) -> Teacher:
    """The dense model itself, which is on the device; with `hidden` its states between blocks count as well."""
    options = {**without_cache(dense), **({"output_hidden_states": True} if hidden else {})}

    @torch.no_grad()
    def teach(windows: Tensor, _numbers: Sequence[int]) -> Targets:
        found = dense(as_input(windows, dense), **options)
        return all_of(found.logits, tuple(found.hidden_states[1:-1]) if hidden else ())

    return teach


@dataclass(frozen=True)
class Stored:
    """Files of the dense model's largest logits, `WINDOWS_A_FILE` windows each.

    Attributes:
        folder: that they are in.
        count: how many logits of a position are kept.
        identity: what they depend on besides: the dense model and the windows; each file carries its digest.
    """

    folder: Path
    count: int
    identity: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of what the files depend on."""
        return hashlib.sha256(json.dumps([self.count, self.identity], sort_keys=True).encode()).hexdigest()

    def file(self, number: int) -> Path:
        """Where the logits of a window are."""
        return self.folder / f"logits-{number // WINDOWS_A_FILE:06d}.safetensors"

    def has(self, number: int) -> bool:
        """Whether that file is there.

        Raises:
            SnpError: it is of another model or other windows, or cannot be read.
        """
        file = self.file(number)
        if not file.exists():
            return False
        try:
            with safe_open(file, framework="pt") as opened:
                found = (opened.metadata() or {}).get("of")
        except (OSError, SafetensorError):
            found = None
        if found != self.digest:
            raise SnpError(
                f"--dense-logits {self.folder}: {file.name} is damaged, or of another dense model, other windows or "
                "another --dense-top-k; expected logits of this run, or none. Name another folder, or remove that one."
            )
        return True

    def write(self, windows: Tensor, compute: Callable[[Tensor], Tensor], on_step: Callable[[str], None]) -> None:
        """Computes what is not there yet; ranks share the files.

        Args:
            windows: all of the run, (windows, ...).
            compute: logits of some windows, (windows, ..., classes).
            on_step: called with a line of text after each file.
        """
        starts = range(0, len(windows), WINDOWS_A_FILE)
        for index, start in enumerate(starts):
            if ranks.owner(index) != ranks.rank() or self.has(start):
                continue
            parts = [self._largest(compute(one)) for one in windows[start : start + WINDOWS_A_FILE].split(1)]
            tensors = {
                "chances": torch.cat([p.chances.half().cpu() for p in parts]),
                "largest": torch.cat([p.largest.int().cpu() for p in parts if p.largest is not None]),
            }
            write_tensors(self.file(start), tensors, {"of": self.digest})
            on_step(f"dense model's logits, {start + len(parts):,} of {len(windows):,} windows")
        ranks.wait()

    def _largest(self, logits: Tensor) -> Targets:
        if self.count >= logits.shape[-1]:
            raise SnpError(
                f"--dense-top-k: expected fewer than the {logits.shape[-1]:,} logits of a position, got {self.count:,}."
            )
        return largest_of(logits, self.count)

    def teacher(self, device: torch.device) -> Teacher:
        """What the files say."""

        def teach(_windows: Tensor, numbers: Sequence[int]) -> Targets:
            chances, largest = [], []
            for number in numbers:
                with safe_open(self.file(number), framework="pt") as opened:
                    at = number % WINDOWS_A_FILE
                    chances.append(opened.get_slice("chances")[at : at + 1])
                    largest.append(opened.get_slice("largest")[at : at + 1])
            # In float16 they do not add up to one any more.
            found = torch.cat(chances).to(device).float().log_softmax(-1)
            return Targets(found, torch.cat(largest).to(device).long())

        return teach
