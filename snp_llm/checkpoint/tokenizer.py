"""Files of tokenizers and processors, carried over to a pruned model. Knows no models and runs no code of theirs.

A tokenizer that is written anew is one of today's transformers: readers of another version, and other engines, read
from the files as they were what they have always read.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, is_offline_mode, list_repo_templates

from snp_llm.runtime.errors import SnpError

CONFIG = "tokenizer_config.json"

# Beside what the tokenizer's own class names.
NAMES = (
    *(CONFIG, "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
)

# Of what turns images, videos and sounds into a model's inputs.
PROCESSORS = (
    *("processor_config.json", "preprocessor_config.json", "image_processor_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json"),
)

TEMPLATES = "additional_chat_templates"

CODE_KEYS = ("auto_map", "custom_pipelines")  # name code that a reader would fetch and run

PROBE = "The pruned model's readers read <what> THE dense one's read: 3.14159, naïve café, 東京, \n\n\t def f(x):  # 🙂"


def find_tokenizer_files(source: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """Where a tokenizer's files are, by their paths in the folder or repository that it was loaded from.

    Args:
        source: local folder, or hub id, whose files are in the cache by now.
        tokenizer: loaded from there.
    """
    names = dict.fromkeys([*NAMES, *(name for name in tokenizer.vocab_files_names.values() if isinstance(name, str))])
    folder = Path(source)
    if folder.is_dir():
        found = [*(folder / name for name in names), *folder.glob("*.tiktoken"), *folder.glob(f"{TEMPLATES}/*.jinja")]
        return {file.relative_to(folder).as_posix(): file for file in found if file.is_file()}
    templates = list_repo_templates(source, local_files_only=is_offline_mode())
    wanted = [*names, *(f"{TEMPLATES}/{name.removesuffix('.jinja')}.jinja" for name in templates)]
    cached = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in wanted}
    return {name: Path(file) for name, file in cached.items() if file}


def find_processor_files(source: str) -> dict[str, Path]:
    """Where the files of a processor are, where a model has one: by name, as of `find_tokenizer_files`."""
    folder = Path(source)
    if folder.is_dir():
        return {name: folder / name for name in PROCESSORS if (folder / name).is_file()}
    cached = {name: cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSORS}
    return {name: Path(file) for name, file in cached.items() if file}


def reader_of(folder: Path) -> str:
    """The Auto class that reads inputs for the model in a folder: for images, for texts, or for both."""
    processor, tokenizer = (any((folder / name).exists() for name in names) for names in (PROCESSORS, NAMES))
    if not processor:
        return "AutoTokenizer"
    return "AutoProcessor" if tokenizer else "AutoImageProcessor"


def carry_over(files: dict[str, Path], folder: Path) -> None:
    """Copies files of tokenizer and processor, byte for byte but for the keys of their configs that name code."""
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    without_code(folder)


def without_code(folder: Path) -> None:
    """Takes the keys that name code out of the configs in a folder; without any they stay as they are."""
    for file in (folder / name for name in (CONFIG, *PROCESSORS)):
        if not file.exists():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        if (kept := _without_keys(values)) != values:
            text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
            file.write_text(text, encoding="utf-8", errors="backslashreplace")  # halves of characters, as JSON has them


def _without_keys(values: Any) -> Any:
    """Nested values without the keys that name code: a processor's config has those of its parts in it."""
    if isinstance(values, dict):
        return {key: _without_keys(value) for key, value in values.items() if key not in CODE_KEYS}
    return [_without_keys(value) for value in values] if isinstance(values, list) else values


def check_carried(name: str, files: dict[str, Path], tokenizer: PreTrainedTokenizerBase, types: Iterable[str]) -> None:
    """Checks that transformers' own classes read from carried files what the loaded tokenizer reads.

    Args:
        name: of the model.
        files: as `find_tokenizer_files` found them.
        tokenizer: as it was loaded, with code of its own if that was trusted.
        types: every model_type that the config beside them may have, for which transformers may choose another class.

    Raises:
        SnpError: they cannot, or read otherwise.
    """
    for model_type in types:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            carry_over(files, folder)
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
            try:
                carried = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                difference = _difference(tokenizer, carried)
            except Exception as error:  # transformers and tokenizers raise dozens of kinds
                difference = " ".join(str(error).split())[:200] or type(error).__name__
        if difference:
            raise SnpError(
                f"tokenizer of {name}: beside a pruned model of type {model_type}, without code of its own, "
                f"transformers does not read from its files what it reads here ({difference}). A pruned model carries "
                "a tokenizer's files over, and no foreign code. Save it in the form of transformers' own classes "
                "(tokenizer.json) first."
            )


def _difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str:
    """The first thing in which two tokenizers differ, in words; nothing where they read the same."""
    if one.get_vocab() != other.get_vocab():
        return f"{len(one.get_vocab()):,} tokens against {len(other.get_vocab()):,}, or other ids"
    if one(PROBE)["input_ids"] != other(PROBE)["input_ids"]:
        return "other tokens for the same text"
    if one.chat_template != other.chat_template:
        return "another chat template"
    return ""


def tokenizer_sum(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else type(tokenizer).__name__
    parts = (rules, sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template)
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
