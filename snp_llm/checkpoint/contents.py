"""What an output folder is made of: names in it, files that are its own, its report and card read back."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from snp_llm.runtime.errors import SnpError, reason
from snp_llm.runtime.json_files import read_json

JOURNAL = "journal"  # what an unfinished run has done

DENSE = "dense"  # weights that are in no safetensors file

UNFINISHED = (JOURNAL, DENSE)  # parts of a temporary folder that do not belong to the finished one

REPORT = "prune_report.json"

PAGE = "report.html"

RECIPE = "recipe.yaml"

BENCH = "bench.json"

# What a model folder is made of. Pickles, hidden files and whatever else has come to lie in it are not.
PARTS = (
    *("*.safetensors", "*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.md"),
    *(PAGE, RECIPE, "LICENSE", "NOTICE"),
)

CARD = "README.md"

LATER = (REPORT, PAGE, BENCH, CARD)  # written into a finished folder, or anew, by commands other than prune

NEEDED = ("recipe", "sparsity", "dense", "pruned", "sites", "calibration", "seconds")  # keys of every report


def files_in(folder: Path) -> list[str]:
    """Paths of all files in a folder, relative to it, sorted."""
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def foreign(folder: Path) -> str:
    """What speaks against this program having made all of a folder; nothing where it is empty."""
    if not any(folder.iterdir()):
        return ""
    if not (folder / REPORT).exists():
        return f"has no {REPORT}"
    try:
        report = read_json(folder / REPORT, "")
    except SnpError:
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("snp_llm"), str):
        return f"its {REPORT} is not one of `snp-llm prune`"
    made = report.get("files")
    for name in files_in(folder):
        if isinstance(made, list):
            ours = name in (*made, *LATER)
        else:  # one of an earlier version, which kept no list
            ours = "/" not in name and any(fnmatch(name, part) for part in PARTS)
        if not ours:
            return f"holds {name}, which `snp-llm prune` did not write there"
    empty = (path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink() and not any(path.iterdir()))
    return next((f"holds the folder {path.relative_to(folder)}" for path in empty), "")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an output folder.

    Raises:
        SnpError: there is none, or another file has its name.
    """
    file = folder / REPORT
    where = f"{file}: expected a report of `snp-llm prune`"
    report = read_json(file, where)
    missing = [key for key in NEEDED if key not in report] if isinstance(report, dict) else NEEDED
    if missing:
        raise SnpError(f"{where}; {missing[0]!r} is missing.")
    found: dict[str, Any] = report
    return found


def read_card(folder: Path) -> str:
    """The model card of an output folder.

    Raises:
        SnpError: it cannot be read.
    """
    card = folder / CARD
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise SnpError(f"{card}: expected a model card in UTF-8, cannot be read ({reason(error)}).") from error


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card, and its text from behind that on; what is no front matter is text."""
    found = re.match(r"---\n(.*?)\n---(?=\n|$)", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        values = None
    return (values, text[found.end() :]) if found and isinstance(values, dict) else ({}, text)


def check_own_folder(folder: str) -> None:
    """Raises SnpError if a result has no place in a folder, before it is computed."""
    missing = [name for name in (REPORT, CARD) if not (Path(folder) / name).is_file()]
    if missing:
        raise SnpError(
            f"--save: expected an output folder of `snp-llm prune`; {folder} has no {' and no '.join(missing)}."
        )
