"""Finished folders read back for their pages. Draws nothing."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snp_llm.checkpoint.contents import BENCH, REPORT, read_report
from snp_llm.checkpoint.tokenizer import reader_of
from snp_llm.evaluate.turns import TOO_NOISY, says_something
from snp_llm.models.families.family import PRUNED
from snp_llm.models.modeling_snp import auto_classes
from snp_llm.report.rows import NOT_MEASURED
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.json_files import read_json

SAME_PERPLEXITY = 0.01  # relative, of the dense model in runs that may be compared: dtypes and devices round

UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f\\ud800-\\udfff\\ufffe\\uffff]")


@dataclass(frozen=True)
class Run:
    """Files of one folder, read.

    Attributes:
        name: of the folder.
        report: of `prune_report.json`.
        bench: of `bench.json`, or None.
        has_code: whether the folder needs `trust_remote_code`.
        classes: Auto classes that load the model and what reads its inputs.
    """

    name: str
    report: dict[str, Any]
    bench: Any
    has_code: bool
    classes: tuple[str, str]


def read_run(folder: Path) -> Run:
    """The files of a folder that the page is made of.

    Raises:
        SnpError: with the file's name and what is wrong with it.
    """
    if not (folder / REPORT).is_file():
        raise SnpError(f"report {folder}: expected an output of `snp-llm prune`, found no {REPORT} there.")
    report = _clean(read_report(folder))
    config = _read_json(folder / "config.json")
    name = folder.name or folder.absolute().name
    values = config if isinstance(config, dict) else {}
    auto = next(iter(auto_classes(str(values.get("model_type")).removeprefix(PRUNED))), "AutoModelForCausalLM")
    bench, has_code = _read_json(folder / BENCH), "auto_map" in values
    return Run(name, report, bench, has_code=has_code, classes=(auto, reader_of(folder)))


def _read_json(path: Path) -> Any:
    """What a JSON file holds, or None where it is not there."""
    return _clean(read_json(path, f"{path}: expected JSON")) if path.exists() else None


def _clean(value: Any) -> Any:
    """JSON without what neither UTF-8 nor XML can hold: halves of characters, and control characters."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    return value


def model_name(report: Mapping[str, Any]) -> str:
    """The dense model's name without its folders."""
    return Path(os.path.normpath(str(report["recipe"]["model"]))).name


def speed_up_of(report: Mapping[str, Any]) -> float | None:
    """How many times as fast the pruned model reads as the dense one, or None where that was not measured, or says
    nothing."""
    dense, pruned = report["dense"]["speed"], report["pruned"]["speed"]
    if not dense or not pruned:
        return None
    found = report.get("speed_up")
    if found is None:  # of an older version
        return pruned / dense
    return found["ratio"] if says_something(**found) else None


def speed_of(report: Mapping[str, Any]) -> str:
    """That in words, with its spread."""
    if not report["dense"]["speed"] or not report["pruned"]["speed"]:
        return NOT_MEASURED
    ratio = speed_up_of(report)
    if ratio is None:
        return TOO_NOISY
    found = report.get("speed_up")
    return f"\N{MULTIPLICATION SIGN}{ratio:.2f}" + (f" ({found['low']:.2f} to {found['high']:.2f})" if found else "")
