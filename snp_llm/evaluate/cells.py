"""What is timed, and what came of it. Times nothing."""

from dataclasses import dataclass
from typing import Literal

MODELS = ("dense", "pruned")


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        kind: "prefill": a batch of prompts up to the logits of the next token, with a cache as for generating.
            "decode": after that prompt, tokens one at a time. "classify": images up to their classes.
        batch: prompts or images at a time.
        length: tokens of a prompt; 1 for an image.
        new_tokens: decoded after it.
    """

    kind: Literal["prefill", "decode", "classify"]
    batch: int
    length: int
    new_tokens: int

    @property
    def items(self) -> int:
        """Tokens, or images, that a pass goes through."""
        return self.batch * (self.new_tokens if self.kind == "decode" else self.length)

    @property
    def item(self) -> str:
        """What these are, in the plural."""
        return "images" if self.kind == "classify" else "tokens"

    @property
    def name(self) -> str:
        """What is measured, for people."""
        if self.kind == "classify":
            return f"images, {self.batch} at a time"
        if self.kind == "prefill":
            return f"prefill, {self.batch} x {self.length:,}"
        return f"decode, {self.batch} after {self.length:,}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one model in one cell: a whole prefill or batch of images, or one step of decoding.

    Attributes:
        seconds: median.
        low, high: quartiles.
        per_second: tokens or images, at the median.
    """

    seconds: float
    low: float
    high: float
    per_second: float


@dataclass(frozen=True)
class Comparison:
    """Times of both models in one cell.

    Attributes:
        cell: what was measured.
        dense, pruned: their times.
        speedup: median of how many times as fast the pruned model was than the dense one just beside it.
        speedup_low, speedup_high: quartiles of that.
        flops_ratio: how many times the pruned model's FLOPs the dense model's are.
        bytes_ratio: how many times its bytes of weights that are read, on which decoding in small batches depends.
    """

    cell: Cell
    dense: Timing
    pruned: Timing
    speedup: float
    speedup_low: float
    speedup_high: float
    flops_ratio: float
    bytes_ratio: float
