"""What makes inputs for a model: a tokenizer of texts, an image processor of images. Knows no inputs."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from snp_llm.checkpoint.processor import note_size, processor_sum
from snp_llm.checkpoint.tokenizer import check_carried, find_processor_files, find_tokenizer_files, tokenizer_sum
from snp_llm.models.task import task_of

# What a tokenizer's files are called, in all of transformers.
TOKENIZER_FILES = ("token*", "vocab*", "merges*", "spiece*", "tekken*", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Reader:
    """How readers of a kind are kept.

    Attributes:
        word: for people.
        usual: the file that it mostly is in.
        patterns: what its files are called.
        files: where they are, by their paths in the model's folder or repository; from that and the reader.
        checksum: of what it does.
        check: refuses files from which another reader would come beside a pruned model.
        prepare: completes a config by what the reader in a folder or repository says.
    """

    word: str
    usual: str
    patterns: tuple[str, ...]
    files: Callable[[str, Any], dict[str, Path]]
    checksum: Callable[[Any], str]
    check: Callable[[str, dict[str, Path], Any, Iterable[str]], None]
    prepare: Callable[[PretrainedConfig, str], None]


READERS = {
    "text": Reader(
        "tokenizer",
        "tokenizer.json",
        TOKENIZER_FILES,
        lambda source, tokenizer: {**find_tokenizer_files(source, tokenizer), **find_processor_files(source)},
        tokenizer_sum,
        check_carried,
        lambda *_: None,
    ),
    "images": Reader(
        "processor",
        "preprocessor_config.json",
        ("*processor_config.json",),
        lambda source, _processor: find_processor_files(source),
        processor_sum,
        lambda *_: None,  # which class reads them stands in the file
        note_size,
    ),
}


def reader_for(config: PretrainedConfig) -> Reader:
    """How the readers of a model's kind are kept."""
    return READERS[task_of(config).name]
