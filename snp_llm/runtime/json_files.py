"""JSON files that an earlier run wrote and anything may have happened to since. Knows not what is in them."""

import json
import math
from pathlib import Path
from typing import Any

from snp_llm.runtime.errors import SnpError, reason

DEEPEST = 100  # levels; what is written here has a tenth of that


def read_json(file: Path, where: str) -> Any:
    """What a file holds; NaN and infinities, which JSON has not, are refused.

    Args:
        file: UTF-8.
        where: begins the message, up to and with what was expected.

    Raises:
        SnpError: it cannot be read, is no JSON, or is nested more deeply than can be read.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
        _check_depth(value, DEEPEST)
        return value
    except (OSError, ValueError, RecursionError) as error:
        raise SnpError(f"{where}, cannot be read ({reason(error)[:200]}).") from error


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"expected at most {DEEPEST} levels of lists and objects")
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, dict | list):
                _check_depth(inner, left - 1)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"expected finite numbers, got {text[:30]}")
    return value
