"""What numbers, names and texts a setting may be: every bound in one table. Knows no models and opens no files."""

import os
import re
import unicodedata
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from snp_llm.runtime.errors import SnpError, near, shown


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may be; infinities and NaN are none.

    Attributes:
        kind: int, or float, which may be given as an integer.
        least, most: the ends.
        below: whether `most` itself is too much.
    """

    kind: type
    least: float
    most: float
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        number = not isinstance(value, bool) and isinstance(value, Integral if self.kind is int else Real)
        return number and bool(self.least <= value < self.most if self.below else self.least <= value <= self.most)

    def __str__(self) -> str:
        what = "an integer" if self.kind is int else "a number"
        return f"{what} from {self.least:,} to {'below ' if self.below else ''}{self.most:,}"


COUNT = Range(int, 1, 2**31 - 1)

SHARE = Range(float, 0, 1, below=True)

# Every setting of any command that is a number, by its name; `check_settings` checks them all.
RANGES = {
    "sparsity": SHARE,
    "ffn_sparsity": SHARE,
    "head_sparsity": SHARE,
    "reference_weight": Range(float, 0, 1),
    "dampening": Range(float, 0, 10**6),  # beyond, nothing of the statistics is left
    "round_to": COUNT,
    "refine": Range(int, 1, 10**6),
    "measured_cuts": Range(int, 0, 8),
    "num_samples": COUNT,
    "seq_len": Range(int, 2, COUNT.most),
    "batch_size": COUNT,
    "seed": Range(int, 0, 2**63 - 1),
    "shown_images": Range(int, 0, 64),
    "shown_texts": Range(int, 0, 64),
    "save_every": Range(float, 0, 10**9),
    "stride": COUNT,
    "max_windows": COUNT,
    "limit": COUNT,
    "num_fewshot": Range(int, 0, COUNT.most),
    "batch_sizes": COUNT,
    "prompt_lengths": COUNT,
    "new_tokens": Range(int, 0, COUNT.most),
    "repeats": COUNT,
    "minutes": Range(float, 1e-3, 10**6),
    "lora_rank": COUNT,
    "learning_rate": Range(float, 0, 10**3),
    "warmup": SHARE,
    "micro_batch": COUNT,
    "hidden_weight": Range(float, 0, 10**6),
    "dense_top_k": COUNT,
    "held_out": COUNT,
}

LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes that usual file systems take

LONGEST_OUTPUT = 200  # of the last part: an unfinished run lies beside it under a longer name

KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", NoneType: "null"}

UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories of control characters, broken ones and line ends


def flag(name: str) -> str:
    """A setting's option; the last `_` of a name that would be a word of Python's is not in it."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def check_settings(settings: Any) -> None:
    """Checks every number against `RANGES`, every choice against what there is, and that every text can be a name.

    Args:
        settings: a recipe of any command.

    Raises:
        SnpError: with the setting's name.
    """
    chosen = kinds_of(settings.__class__)
    for field in fields(settings):
        value, where = getattr(settings, field.name), flag(field.name) if field.default is not MISSING else field.name
        several = isinstance(value, tuple | list) and (field.default is MISSING or isinstance(field.default, tuple))
        if several and not value and field.default is not MISSING:
            raise SnpError(f"{where}: expected at least one, got none.")
        for single in value if several else [value]:
            chosen_one = any(get_origin(kind) is Literal and fits(single, kind) for kind in chosen[field.name])
            free = chosen_one or single is field.default is None
            if field.name in RANGES and single not in RANGES[field.name] and not free:
                raise SnpError(f"{where}: expected {RANGES[field.name]}, got {shown(single)}.")
            if isinstance(single, str):
                check_text(where, single)
            kinds = chosen[field.name]
            limited = any(kind is bool or get_origin(kind) is Literal for kind in kinds)
            if limited and not any(fits(single, kind) for kind in kinds):
                raise SnpError(f"{where}: expected {described(kinds)}, got {shown(single)}.{meant(single, kinds)}")


@cache
def kinds_of(recipe: type) -> dict[str, tuple[Any, ...]]:
    """By the names of a recipe's settings, the types that each may have, and the choices of those that are one."""
    hints = get_type_hints(recipe)
    return {n: get_args(h) if get_origin(h) in (Union, UnionType) else (h,) for n, h in hints.items()}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, or among its choices."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) is kind or (kind is float and type(value) is int)


def described(kinds: tuple[Any, ...]) -> str:
    """What a setting may be, for people."""
    named = (f"one of {', '.join(get_args(k))}" if get_origin(k) is Literal else KINDS[k] for k in kinds)
    return " or ".join(named)


def meant(value: Any, kinds: tuple[Any, ...]) -> str:
    """The choice of a setting that a value that is none was meant to be, as `near` says it."""
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return near(value[:LONGEST_NAME], choices) if isinstance(value, str) else ""


def check_text(where: str, value: str) -> None:
    """Refuses what can be no name of anything, nor stand in one line of a report."""
    if not value.strip():
        raise SnpError(f"{where}: expected text, got {value!r}.")
    if any(unicodedata.category(character) in UNPRINTABLE for character in value):
        raise SnpError(f"{where}: expected text in UTF-8 without control characters and line ends, got {shown(value)}.")
    longest = max(len(part.encode()) for part in re.split("[/,]", value))  # tasks have commas between them
    if longest > LONGEST_NAME or len(value.encode()) > LONGEST_PATH:
        raise SnpError(
            f"{where}: expected names of at most {LONGEST_NAME} bytes, and paths of at most {LONGEST_PATH:,}, got one "
            f"of {max(longest, len(value.encode())):,}: {shown(value)}."
        )


def check_output_name(folder: str) -> None:
    """Raises SnpError if a path does not name a folder that can be made, and another beside it meanwhile."""
    name = os.path.basename(os.path.normpath(folder))
    if name in ("", ".", ".."):
        raise SnpError(f"--output {folder}: expected a folder of its own, with a name. Choose another --output.")
    if (count := len(os.fsencode(name))) > LONGEST_OUTPUT:
        raise SnpError(
            f"--output: expected a name of at most {LONGEST_OUTPUT} bytes, got {count:,}: {shown(name)}. Choose a "
            "shorter --output."
        )


def check_repo_id(where: str, value: str) -> None:
    """Raises SnpError if a name can be no repository on the Hub; `where` says which option it came from."""
    parts = value.split("/")
    well_formed = all(re.fullmatch(r"\w([\w.-]{,94}\w)?", part, re.ASCII) for part in parts)
    if len(parts) != 2 or not well_formed or re.search(r"--|\.\.|\.git$", value):
        raise SnpError(
            f"{where}: expected user/name, of letters, digits, single `-` and `.` inside, and `_`; got {shown(value)}."
        )
