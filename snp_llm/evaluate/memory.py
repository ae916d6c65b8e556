"""Peak memory of a model, measured in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from snp_llm.evaluate.cells import Cell
from snp_llm.recipe.commands import BenchRecipe
from snp_llm.runtime.errors import SnpError


def peak_memory(name: str, wanted: Sequence[Cell], device: torch.device, recipe: BenchRecipe) -> dict[str, Any]:
    """Peaks of one model in the largest cell of each kind, in a fresh process.

    Returns:
        Bytes: `libraries` before and `loaded` after loading, `host` at the peak, `device` at the peak or None.

    Raises:
        SnpError: whatever went wrong there.
    """
    largest = [
        max((c for c in wanted if c.kind == kind), key=lambda c: c.batch * (c.length + c.new_tokens))
        for kind in dict.fromkeys(cell.kind for cell in wanted)
    ]
    asked = {
        "model": name,
        "dtype": recipe.dtype,
        "device": str(device),
        "trust_remote_code": recipe.trust_remote_code,
        "cells": [asdict(cell) for cell in largest],
    }
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH", "")) if path)
    process = subprocess.run(
        [sys.executable, "-m", "snp_llm.evaluate.peak"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    lines = process.stdout.strip().splitlines()
    if process.returncode != 0 or not lines:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise SnpError(f"bench: the memory of {name} could not be measured: {reason[:300]} Use --no-memory.")
    result: dict[str, Any] = json.loads(lines[-1])
    if "error" in result:
        raise SnpError(result["error"])
    return result
