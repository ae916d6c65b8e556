"""Token windows out of datasets, for calibration and for evaluation. Knows tokenizers and `datasets`, no models."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from snp_llm.recipe.recipe import Bos
from snp_llm.runtime.errors import SnpError, reason, shown

log = logging.getLogger("snp_llm")


BUNDLED = Path(__file__).parent / "bundled"

# Characters of calibration text read for every token wanted: about eight times what is needed, so that the seed has
# windows to choose from and a corpus of many gigabytes is not tokenised for its first thousandth.
CHARACTERS_A_TOKEN = 32

BYTES_A_TOKEN = 72  # of host memory that so much text and its ids take

SAVED = ("state.json", "dataset_dict.json")  # in a folder that `datasets` saved: of one split, or of several

# What a description says of it; nothing, where it is as in published perplexities.
BOS_REMARKS: dict[Bos, str] = {"always": ", each after BOS", "once": "", "never": ", without BOS"}

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
class Windows:
    """Equally long, non-overlapping windows of tokens.

    Attributes:
        tokens: (windows, T), int64.
        description: dataset, split, window length and count, and whether each starts with BOS, for people.
        digest: SHA-256 of the tokens.
        origin: dataset and split.
        bos: where BOS stands: "always", "once" or "never", see `resolve_bos`.
    """

    tokens: Tensor
    description: str
    digest: str
    origin: str
    bos: Bos


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer starts a text with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    split: str | None,
    column: str,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: Bos = "once",
) -> Windows:
    """A seeded draw of `num_samples` windows; fewer, said in the description, where the text is short.

    Args:
        name: as in `--calibration`; `random` draws uniform ids over the tokenizer's vocabulary, without BOS unless
            that is to stand before every window.
        bos: "always", "once" or "never".

    Raises:
        SnpError: no such dataset, split or column, not one full window of text, or no BOS where it is to stand.
    """
    generator, first = torch.Generator().manual_seed(seed), _first_token(tokenizer, bos)
    if name == "random":
        added = set(tokenizer.added_tokens_decoder)  # which may lie past the embeddings
        ids = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - added))
        text = ids[torch.randint(len(ids), (num_samples * seq_len,), generator=generator)]
        return _windows(_cut(text, seq_len, name, first)[:num_samples], "uniformly random token ids", bos)
    documents, source, label = _open(name, split, column, "calibration_split")
    limit = CHARACTERS_A_TOKEN * num_samples * seq_len
    tokens = _cut(_tokenize(tokenizer, source.joiner.join(_take(documents, limit)), bos), seq_len, name, first)
    chosen = torch.randperm(len(tokens), generator=generator)[:num_samples]
    short = f" ({num_samples} asked for, the text holds no more)" if len(tokens) < num_samples else ""
    return _windows(tokens[chosen], label, bos, short)


def split_windows(windows: Windows, held: int) -> tuple[Windows, Windows]:
    """The draw without its last `held` windows, and those; where there are few, a quarter of them.

    Raises:
        SnpError: a single window.
    """
    count = len(windows.tokens)
    if count < 2:
        raise SnpError("calibration: expected at least two windows, one of them to be held out; got one.")
    held = min(held, max(1, count // 4))
    return (
        _windows(windows.tokens[:-held], windows.origin, windows.bos, f", {held} more held out"),
        _windows(windows.tokens[-held:], windows.origin, windows.bos),
    )


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    split: str | None,
    column: str,
    seq_len: int,
    max_windows: int | None = None,
    bos: Bos = "once",
) -> Windows:
    """All full windows of a split: documents joined, tokenised once, cut without overlap, the rest dropped.

    Args:
        bos: "always", "once" or "never".

    Raises:
        SnpError: no such dataset, split or column, not one full window of text, or no BOS where it is to stand.
    """
    first = _first_token(tokenizer, bos)
    documents, source, label = _open(name, split, column, "evaluation_split")
    text = source.joiner.join(islice(documents, source.evaluation_documents))
    return _windows(_cut(_tokenize(tokenizer, text, bos), seq_len, name, first)[:max_windows], label, bos)


def evaluation_text(
    tokenizer: PreTrainedTokenizerBase, name: str, *, split: str | None, column: str, bos: Bos = "once"
) -> Windows:
    """A whole split as one window, (1, tokens): documents joined, tokenised once, not cut.

    Args:
        bos: "always", "once" or "never". With "always" BOS is not among the tokens, since it is to stand before every
            window that is cut from them, but the digest counts it.

    Raises:
        SnpError: no such dataset, split or column, less than two tokens of text, or no BOS where it is to stand.
    """
    first = _first_token(tokenizer, bos)
    documents, source, label = _open(name, split, column, "evaluation_split")
    text = source.joiner.join(islice(documents, source.evaluation_documents))
    tokens = _tokenize(tokenizer, text, bos)
    if len(tokens) < 2:
        raise SnpError(f"dataset {name}: expected at least two tokens of text, got {len(tokens)}.")
    counted = tokens if first is None else torch.cat([tokens, torch.tensor([first])])
    digest = hashlib.sha256(counted.numpy().tobytes()).hexdigest()
    return Windows(tokens[None], f"{label}, {len(tokens):,} tokens", digest, label, bos)


def check_dataset(name: str, split: str | None, column: str, *, evaluation: bool) -> None:
    """Raises SnpError for what no dataset is called, and for local ones that are not there; nothing is read."""
    if evaluation or name != "random":
        _find(name, split, column, "evaluation_split" if evaluation else "calibration_split")


def _open(name: str, split: str | None, column: str, purpose: str) -> tuple[Iterator[str], Source, str]:
    """Documents of a dataset, streamed, where they come from, and the name and split as people are told."""
    source, split, label = _find(name, split, column, purpose)
    return _read(name, source, split), source, label


def _find(name: str, split: str | None, column: str, purpose: str) -> tuple[Source, str, str]:
    """Where a dataset comes from, its split, and both as people are told."""
    if name == "bundled":
        split = split or {"calibration_split": "train", "evaluation_split": "test"}[purpose]
        files = {"train": "calibration.txt", "test": "evaluation.txt"}
        if split not in files:
            raise SnpError(f"dataset bundled: unknown split {split!r}; expected one of {', '.join(files)}.")
        return Source("text", {"data_files": str(BUNDLED / files[split])}), "train", f"{name} ({split})"
    if name in NAMED:
        source = NAMED[name]
    elif Path(name).is_dir():
        source = _folder(name, column)
        split = split or getattr(source, purpose)
        return source, split, f"{Path(name).resolve().name} ({split})"
    elif Path(name).suffix in BUILDERS or Path(name).exists():
        return _local(name, column), "train", Path(name).name  # a report may be published: no folders of ours
    elif "/" in name:
        path, _, config = name.partition(":")
        source = Source(path, {"name": config} if config else {}, column=column)
    else:
        near = get_close_matches(
            name, [*NAMED, "bundled", *(["random"] if purpose == "calibration_split" else [])], n=1
        )
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise SnpError(
            f"unknown dataset {shown(name)}; expected one of {', '.join(NAMED)}, bundled, a hub id (user/name) or a "
            f".txt, .jsonl or .parquet file.{hint}"
        )
    split = split or getattr(source, purpose)
    return source, split, f"{name} ({split})"


def _local(name: str, column: str) -> Source:
    path = Path(name)
    if not path.is_file():
        raise SnpError(f"dataset {name}: no such file.")
    builder = BUILDERS.get(path.suffix)
    if builder is None:
        raise SnpError(f"dataset {name}: expected one of {', '.join(BUILDERS)}, got {path.suffix or 'no ending'!r}.")
    return Source(builder, {"data_files": str(path)}, column=column)


def _folder(name: str, column: str) -> Source:
    if not any((Path(name) / file).is_file() for file in SAVED):
        raise SnpError(
            f"dataset {name}: is a folder without {' or '.join(SAVED)}; expected one that `datasets` saved with "
            "save_to_disk, or a .txt, .jsonl or .parquet file."
        )
    return Source("folder", {}, column=column)


def _read(name: str, source: Source, split: str) -> Iterator[str]:
    """The documents of a split, streamed. Records that hold null are none, of which a log line says how many.

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
            text = row.get(source.column)
            if source.column not in row:
                raise SnpError(
                    f"dataset {name}: expected a text column {source.column!r}; its columns are {', '.join(row)}. "
                    "Choose one with --text-column."
                )
            if text is None:
                nulls += 1
            elif isinstance(text, str):
                _explained(name, text.encode)  # JSON may escape halves of characters
                yield text
            else:
                raise SnpError(
                    f"dataset {name}: expected text in column {source.column!r}, record {count:,} has {shown(text)}. "
                    "Choose another column with --text-column."
                )
    finally:
        if nulls:
            log.warning("dataset %s: %s of %s records hold no text and were left out", name, f"{nulls:,}", f"{count:,}")


def _rows(name: str, source: Source, split: str) -> Iterable[dict[str, Any]]:
    """The records of a split."""
    if source.path == "json":
        return _json_rows(name, Path(source.options["data_files"]))
    from datasets import Dataset, load_dataset, load_from_disk  # takes a second that --help and plain text need not pay
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    if source.path != "folder":
        return load_dataset(source.path, split=split, streaming=True, **source.options)
    saved = load_from_disk(name)
    if isinstance(saved, Dataset):
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
        remedy = "the file" if Path(name).exists() else "the name, the split and the network"
        raise SnpError(f"dataset {name} cannot be read: {reason(error)}. Check {remedy}.") from error


def _take(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Documents until `characters` are there; the last one is cut."""
    for document in documents:
        yield document[:characters]
        characters -= len(document)
        if characters <= 0:
            return


def _first_token(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> int | None:
    """The id that every window starts with, or None where windows start with text."""
    if bos != "always":
        return None
    if tokenizer.bos_token_id is None:
        raise SnpError("--bos always: expected a tokenizer with a BOS token, this one has none. Use --bos once.")
    return int(tokenizer.bos_token_id)


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str, bos: Bos) -> Tensor:
    """The ids of a text, (tokens,), int64; without BOS at its start unless that stands once."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if bos != "once":
        start = next((at for at, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
        ids = ids[start:]
    return torch.tensor(ids, dtype=torch.int64)


def _cut(tokens: Tensor, seq_len: int, name: str, first: int | None) -> Tensor:
    """Windows, (windows, seq_len), of consecutive tokens, after `first` where there is such an id."""
    room = seq_len if first is None else seq_len - 1
    count = len(tokens) // room
    if count == 0:
        raise SnpError(
            f"dataset {name}: expected at least one window of {room:,} tokens{'' if first is None else ' after BOS'}, "
            f"got {len(tokens):,} tokens. Use more text or a smaller --seq-len."
        )
    windows = tokens[: count * room].reshape(count, room)
    return windows if first is None else torch.cat([torch.full((count, 1), first), windows], dim=1)


def _windows(tokens: Tensor, origin: str, bos: Bos, remark: str = "") -> Windows:
    count, length = tokens.shape
    description = f"{origin}, {count} windows of {length} tokens{BOS_REMARKS[bos]}{remark}"
    return Windows(tokens, description, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), origin, bos)
