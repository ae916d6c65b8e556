"""Which files a recipe and the calibration tokens come through, from the command to the saved folder.

    python benchmarks/walk.py [CHECKOUT ...]      several side by side; default: this one

A small prune of the bundled model runs under a profiler. Every call inside the package that is given the recipe, or
the tokens, alone or in something that holds them, is a step. A step into a file on a higher level of imports than the
one before it is a climb; steps within a file do not count. Each checkout runs in a process of its own.
"""

import ast
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

WINDOWS = (8, 64)
COMMAND = ["tiny-opt", "--sparsity", "0.3", "--num-samples", "8", "--seq-len", "64", "--no-eval", "--quiet"]


def holds(value: Any, wanted: Callable[[Any], bool], depth: int = 2) -> bool:
    """Whether a value is what is wanted, or a dataclass that holds it."""
    if wanted(value):
        return True
    if depth == 0 or not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    return any(holds(getattr(value, f.name, None), wanted, depth - 1) for f in dataclasses.fields(value))


def walk(checkout: Path) -> dict[str, list[str]]:
    """By what is followed, the files of the steps in their order; to be run where that checkout is imported."""
    import torch

    import snp_llm
    from snp_llm import Recipe

    try:
        from snp_llm.cli.parse import prune_main
    except ImportError:  # before the commands had a folder
        from snp_llm.cli import prune_main
    root = Path(snp_llm.__file__).parent
    assert root == checkout / "snp_llm", root
    steps: dict[str, list[str]] = {"recipe": [], "tokens": []}
    followed: dict[str, Callable[[Any], bool]] = {
        "recipe": lambda value: isinstance(value, Recipe),
        "tokens": lambda value: (
            isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.shape == (8, 64)
        ),
    }

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        file = frame.f_code.co_filename
        if event != "call" or not file.startswith(f"{root}/") or frame.f_code.co_name.startswith("<"):
            return
        given = [frame.f_locals[name] for name in frame.f_code.co_varnames[: frame.f_code.co_argcount]]
        for name, wanted in followed.items():
            if any(holds(value, wanted) for value in given):
                steps[name].append(str(Path(file).relative_to(root)))

    with tempfile.TemporaryDirectory() as folder:
        sys.setprofile(profile)
        code = prune_main([*COMMAND, "--output", f"{folder}/out"])
        sys.setprofile(None)
    assert code == 0
    return steps


def counts(steps: list[str], level: dict[str, int]) -> tuple[int, int, int]:
    """Files that are come through, steps from one to another, and climbs among these."""
    moves = [(one, other) for one, other in pairwise(steps) if one != other]
    return len({*steps}), len(moves), sum(level[other] > level[one] for one, other in moves)


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(walk(Path(sys.argv[2]))))
        return
    from structure import levels

    for checkout in [Path(name).resolve() for name in sys.argv[1:]] or [Path(__file__).resolve().parent.parent]:
        root = checkout / "snp_llm"
        trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in root.rglob("*.py")}
        level = {f"{name.replace('.', '/')}.py": number for name, number in levels(root, trees).items()}
        run = subprocess.run(
            [sys.executable, __file__, "--inside", str(checkout)],
            env={**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        for name, steps in json.loads(run.stdout.splitlines()[-1]).items():
            files, moves, climbs = counts(steps, level)
            print(f"{checkout.name}: {name} comes through {files} files in {moves} steps, {climbs} of them climbs")


if __name__ == "__main__":
    main()
