"""Documents out of datasets: bundled, named, on the Hub, in local files. Knows `datasets`, no tokenizers."""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from snp_llm.runtime.errors import SnpError, near, reason, shown

log = logging.getLogger("snp_llm")

Purpose = Literal["calibration", "evaluation"]

BUNDLED = Path(__file__).parent / "bundled"

CONVERSATION = "messages"  # column of conversations, read where there is no text

SAVED = ("state.json", "dataset_dict.json")  # in a folder that `datasets` saved: of one split, or of several

BUILDERS = {".txt": "text", ".raw": "text", ".tokens": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """Where the documents of a dataset come from.

    Attributes:
        path: hub id, the name of a `datasets` builder for local files, "text" for a file that is a single document,
            "json" for one of records, or "folder" for what `datasets` saved to disk.
        options: further arguments of `datasets.load_dataset`.
        column: holds the text.
        joiner: stands between two documents.
        calibration_split, evaluation_split: read unless the user names a split.
        evaluation_documents: at most so many are evaluated on, where a corpus has no small split.
    """

    path: str
    options: dict[str, Any]
    column: str = "text"
    joiner: str = "\n\n"
    calibration_split: str = "train"
    evaluation_split: str = "test"
    evaluation_documents: int | None = None

    def usual_split(self, purpose: Purpose) -> str:
        """The split that is read unless the user names one."""
        return self.calibration_split if purpose == "calibration" else self.evaluation_split


NAMED = {
    "wikitext2": Source("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    # The published numbers on C4 use the first 1,100 validation documents, joined by a blank.
    "c4": Source("allenai/c4", {"name": "en"}, joiner=" ", evaluation_split="validation", evaluation_documents=1100),
    # The original repository is a loading script, which `datasets` no longer runs; the hub's own conversion is not.
    "ptb": Source(
        "ptb-text-only/ptb_text_only",
        {
            "revision": "refs/convert/parquet",
            "data_files": {s: f"penn_treebank/{s}/*.parquet" for s in ("train", "validation", "test")},
        },
        column="sentence",
        joiner=" ",
    ),
}


@dataclass(frozen=True)
class Dataset:
    """A text as people name it.

    Attributes:
        name: as in `--calibration` and `--dataset`.
        split: of it; None: the usual one for the purpose.
        column: that holds the text of records.
    """

    name: str
    split: str | None = None
    column: str = "text"


def mixture(dataset: Dataset) -> list[tuple[Dataset, float]]:
    """The datasets that a name lists, `a,b=2,c`, each with its share of the whole; of one name that dataset alone.

    A file or folder of the whole name is that, commas and all.

    Raises:
        SnpError: a share is no number above 0, or a name is missing.
    """
    if "," not in dataset.name or Path(dataset.name).exists():
        return [(dataset, 1.0)]
    parts = []
    for part in dataset.name.split(","):
        name, _, share = part.strip().rpartition("=") if "=" in part else (part.strip(), "", "1")
        if not name or not re.fullmatch(r"[0-9]*\.?[0-9]+", share) or not float(share) > 0:
            raise SnpError(
                f"--calibration: expected texts with commas between them, each with a share above 0 if not the same, "
                f"as in wikitext2,notes.txt=0.5; got {shown(part)} in {shown(dataset.name)}."
            )
        parts.append((replace(dataset, name=name), float(share)))
    whole = sum(share for _, share in parts)
    return [(part, share / whole) for part, share in parts]


def check_dataset(dataset: Dataset, purpose: Purpose) -> None:
    """Raises SnpError for what no dataset is called, and for local ones that are not there; nothing is read."""
    if purpose == "calibration" and len(parts := mixture(dataset)) > 1:
        for part, _ in parts:
            check_dataset(part, purpose)
        return
    if purpose == "evaluation" or dataset.name != "random":
        _find(dataset, purpose)


def both_of(calibration: Dataset, evaluation: Dataset) -> str | None:
    """Name of the dataset of an evaluation if it is calibrated on as well, in the same split; None if it is not."""
    parts = {_place(part, "calibration") for part, _ in mixture(calibration)}
    return evaluation.name if _place(evaluation, "evaluation") in parts else None


def _place(dataset: Dataset, purpose: Purpose) -> tuple[str, str]:
    """What tells a text from others: where it is, and its split; a file has none."""
    path = Path(dataset.name)
    if path.is_file():
        return str(path.resolve()), ""
    where, _, config = (str(path.resolve()), "", "") if path.is_dir() else dataset.name.partition(":")
    source = NAMED.get(dataset.name) or Source(where, {"name": config or None})
    return f"{source.path}:{source.options.get('name')}", dataset.split or source.usual_split(purpose)


def open_dataset(dataset: Dataset, purpose: Purpose) -> tuple[Iterator[Any], Source, str]:
    """Documents of a dataset, streamed, where they come from, and the name and split as people are told.

    Raises:
        SnpError: no such dataset, split or column, or what is there cannot be read.
    """
    source, split, label = _find(dataset, purpose)
    return _read(dataset.name, source, split), source, label


def _find(dataset: Dataset, purpose: Purpose) -> tuple[Source, str, str]:
    """Where a dataset comes from, its split, and both as people are told."""
    name, split, column = dataset.name, dataset.split, dataset.column
    if name == "bundled":
        split = split or {"calibration": "train", "evaluation": "test"}[purpose]
        files = {"train": "calibration.txt", "test": "evaluation.txt"}
        if split not in files:
            raise SnpError(f"dataset bundled: unknown split {split!r}; expected one of {', '.join(files)}.")
        return Source("text", {"data_files": str(BUNDLED / files[split])}), "train", f"{name} ({split})"
    if name in NAMED:
        source = NAMED[name]
    elif Path(name).is_dir():
        source = _folder(name, column)
        split = split or source.usual_split(purpose)
        return source, split, f"{Path(name).resolve().name} ({split})"
    elif Path(name).suffix in BUILDERS or Path(name).exists():
        return _local(name, column), "train", Path(name).name  # a report may be published: no folders of ours
    elif "/" in name:
        path, _, config = name.partition(":")
        source = Source(path, {"name": config} if config else {}, column=column)
    else:
        known = [*NAMED, "bundled", *(["random"] if purpose == "calibration" else [])]
        raise SnpError(
            f"unknown dataset {shown(name)}; expected one of {', '.join(NAMED)}, bundled, a hub id (user/name) or a "
            f".txt, .jsonl or .parquet file.{near(name, known)}"
        )
    split = split or source.usual_split(purpose)
    return source, split, f"{name} ({split})"


def _local(name: str, column: str) -> Source:
    path = Path(name)
    if not path.is_file():
        raise SnpError(f"dataset {name}: no such file.")
    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise SnpError(f"dataset {name}: expected one of {', '.join(BUILDERS)}, got {path.suffix or 'no ending'!r}.")
    return Source(builder, {"data_files": str(path)}, column=column)


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a folder."""
    return any((folder / file).is_file() for file in SAVED)


def _folder(name: str, column: str) -> Source:
    if not is_saved(Path(name)):
        raise SnpError(
            f"dataset {name}: is a folder without {' or '.join(SAVED)}; expected one that `datasets` saved with "
            "save_to_disk, or a .txt, .jsonl or .parquet file."
        )
    return Source("folder", {}, column=column)


def _read(name: str, source: Source, split: str) -> Iterator[Any]:
    """The documents of a split, streamed: texts, or conversations as lists of messages.

    Records that hold null are none, of which a log line says how many.

    Raises:
        SnpError: what cannot be read, whatever `datasets` says of it, in one line.
    """
    if source.path == "text":  # the whole file is one document, blank lines and all
        yield _explained(name, lambda: Path(source.options["data_files"]).read_text(encoding="utf-8"))
        return
    rows = _explained(name, lambda: iter(_rows(name, source, split)))
    count = nulls = 0
    try:
        while (row := _explained(name, lambda: next(rows, None))) is not None:
            count += 1
            column = source.column if source.column in row or CONVERSATION not in row else CONVERSATION
            text = row.get(column)
            if column not in row:
                raise SnpError(
                    f"dataset {name}: expected a text column {source.column!r}; its columns are {', '.join(row)}. "
                    "Choose one with --text-column."
                )
            if text is None:
                nulls += 1
            elif isinstance(text, str):
                _explained(name, text.encode)  # JSON may escape halves of characters
                yield text
            elif _is_conversation(text):
                yield text
            else:
                raise SnpError(
                    f"dataset {name}: expected text in column {column!r}, record {count:,} has {shown(text)}. Choose "
                    "another column with --text-column."
                )
    finally:
        if nulls:
            log.warning("dataset %s: %s of %s records hold no text and were left out", name, f"{nulls:,}", f"{count:,}")


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and what is said."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _rows(name: str, source: Source, split: str) -> Iterable[dict[str, Any]]:
    """The records of a split."""
    if source.path == "json":
        return _json_rows(name, Path(source.options["data_files"]))
    import datasets  # takes a second that --help and plain text need not pay
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    if source.path != "folder":
        return datasets.load_dataset(source.path, split=split, streaming=True, **source.options)
    saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise SnpError(f"dataset {name}: unknown split {split!r}; expected one of {', '.join(saved)}.")
    return saved[split]


def _json_rows(name: str, path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file with one JSON object a line, or with a list of them.

    Read here, since pyarrow takes a column's type from where it begins, and ends the process where lists are deep.
    """
    with path.open(encoding="utf-8-sig") as file:
        listed = path.suffix == ".json" and file.read(100).lstrip().startswith("[")
        file.seek(0)
        for number, text in enumerate([file.read()] if listed else file, 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise SnpError(f"dataset {name}: expected JSON, line {number:,} is none ({reason(error)}).") from error
            for row in value if listed else [value]:
                if not isinstance(row, dict):
                    raise SnpError(f"dataset {name}: expected objects with a column of text, got {shown(row)[:60]}.")
                yield row


def _explained(name: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except SnpError:
        raise
    except Exception as error:  # datasets, fsspec and pyarrow raise dozens of kinds
        remedy = "the file" if Path(name).exists() else "the name, the split and the network, or take a local file"
        raise SnpError(f"dataset {name} cannot be read: {reason(error)}. Check {remedy}.") from error
