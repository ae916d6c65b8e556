"""What a pruned model may cost, and how that is written: 900M, 2GB, 0.7x, 5%. Knows no models."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from snp_llm.runtime.errors import SnpError, shown

BudgetKind = Literal["params", "size", "flops", "latency"]

SUFFIXES: dict[BudgetKind, dict[str, float]] = {
    "params": {"": 1, "K": 1e3, "M": 1e6, "B": 1e9},
    "size": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    "flops": {"": 1, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"S": 1, "MS": 1e-3, "US": 1e-6},
}

GOALS = (*(f"target_{kind}" for kind in SUFFIXES), "max_perplexity_increase")  # given instead of a sparsity


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost.

    Attributes:
        kind: parameters, bytes, FLOPs a token, or seconds of a window's prefill.
        amount: in that unit or, if `relative`, as a share of the dense model's.
    """

    kind: BudgetKind
    amount: float
    relative: bool


def read_budget(kind: BudgetKind, text: str) -> Budget:
    """A budget as it is written.

    Raises:
        SnpError: not an amount of that kind.
    """
    suffixes = SUFFIXES[kind]
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([a-zA-Z]*|%)", text.strip())
    amount, suffix = (float(found[1]), found[2].upper()) if found else (0.0, "")
    absolute = amount * suffixes.get(suffix, 0)
    share = amount / 100 if suffix == "%" else amount
    if suffix == "X" and 0 < share <= 1:
        return Budget(kind, share, relative=True)
    forgotten = suffix in ("", "%") and 0 < share <= 1
    if 0 < absolute < math.inf and not forgotten:
        return Budget(kind, absolute, relative=False)
    units = ", ".join(repr(s) for s in suffixes)
    raise SnpError(
        f"--target-{kind}: expected a number with one of {units}, or a share of the dense model such as 0.7x; got "
        f"{shown(text)}.{f' Did you mean {share:g}x?' if forgotten else ''}"
    )


def read_rise(text: str) -> float:
    """A permitted rise of perplexity, relative.

    Raises:
        SnpError: not a percentage.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*%", text.strip())
    if not found or not 0 < float(found[1]) < 1000:
        raise SnpError(f"--max-perplexity-increase: expected a percentage such as 5%, got {shown(text)}.")
    return float(found[1]) / 100
