"""What is timed, and what came of it. Times nothing."""

from dataclasses import dataclass
from typing import Literal

MODELS = ("dense", "pruned")


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    Attributes:
        kind: "prefill": a batch of prompts up to the logits of the next token, with a cache as for generating.
            "decode": after that prompt, tokens one at a time.
        batch: prompts at a time.
        length: tokens of a prompt.
        new_tokens: decoded after it.
    """

    kind: Literal["prefill", "decode"]
    batch: int
    length: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that a pass goes through."""
        return self.batch * (self.length if self.kind == "prefill" else self.new_tokens)

    @property
    def name(self) -> str:
        """What is measured, for people."""
        if self.kind == "prefill":
            return f"prefill, {self.batch} x {self.length:,}"
        return f"decode, {self.batch} after {self.length:,}"


@dataclass(frozen=True)
class Timing:
    """Seconds of one model in one cell: a whole prefill, or one step of decoding.

    Attributes:
        seconds: median.
        low, high: quartiles.
        tokens_per_second: at the median.
    """

    seconds: float
    low: float
    high: float
    tokens_per_second: float


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
