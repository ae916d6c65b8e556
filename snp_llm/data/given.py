"""Calibration windows out of what a program holds: texts, records, conversations, token ids. Opens no files."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from snp_llm.data.sources import CONVERSATION
from snp_llm.data.windows import Windows, cut_windows, drawn, text_windows
from snp_llm.recipe.recipe import Bos
from snp_llm.runtime.errors import SnpError, shown

ORIGIN = "data of the program"

IDS = "input_ids"  # of a record that has been tokenised


def given_windows(
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    column: str,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: Bos = "once",
) -> Windows:
    """A seeded draw of windows from data in memory; fewer, said in the description, where there are no more.

    Args:
        tokenizer: of the model.
        data: token ids, (windows, seq_len) or one text of them, (tokens,), any integer type; or an iterable of texts,
            of conversations (each a list of messages, which go through the chat template), or of records with a column
            of texts, with `messages`, or with `input_ids`: a `datasets.Dataset`, a `DataLoader`, a generator. It is
            read as far as is needed.
        column: that holds the text of a record.
        num_samples: windows that are wanted.
        seq_len: tokens a window has.
        seed: of the draw.
        bos: where BOS stands in texts; token ids are taken as they are.

    Raises:
        SnpError: nothing of that kind, not one full window, or no chat template where there are conversations.
    """
    if isinstance(data, Tensor):
        return drawn(_rows(data, seq_len), ORIGIN, bos, num_samples=num_samples, seed=seed)
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise SnpError(
            f"data: expected token ids, or an iterable of texts, conversations or records, got {shown(data)[:60]}."
        )
    items = iter(data)
    first = next(items, None)
    if first is None:
        raise SnpError("data: expected at least one text, got none.")
    items = chain([first], items)
    if isinstance(first, Tensor) or (isinstance(first, Mapping) and IDS in first and column not in first):
        ids = _token_ids(items, num_samples * seq_len)
        tokens = torch.cat([*ids]) if ids else torch.empty(0, dtype=torch.int64)
        return drawn(cut_windows(tokens, seq_len, ORIGIN), ORIGIN, bos, num_samples=num_samples, seed=seed)
    documents = _documents(items, column)
    return text_windows(
        tokenizer, documents, "\n\n", ORIGIN, num_samples=num_samples, seq_len=seq_len, seed=seed, bos=bos
    )


def _rows(data: Tensor, seq_len: int) -> Tensor:
    """Windows of token ids, (windows, seq_len), int64."""
    if data.is_floating_point() or data.is_complex() or data.dtype == torch.bool or data.dim() not in (1, 2):
        raise SnpError(
            f"data: expected token ids, integers, (windows, {seq_len}) or (tokens,), got {data.dtype} of shape "
            f"{tuple(data.shape)}."
        )
    data = data.cpu().to(torch.int64)
    if data.dim() == 1:
        return cut_windows(data, seq_len, ORIGIN)
    if not len(data) or data.shape[1] != seq_len:
        raise SnpError(f"data: expected windows of {seq_len:,} tokens (seq_len), got {tuple(data.shape)}.")
    return data


def _token_ids(items: Iterator[Any], wanted: int) -> list[Tensor]:
    """Ids of tokenised records one after another, each (tokens,), until some more than wanted are there."""
    found: list[Tensor] = []
    count = 0
    for item in items:
        ids = torch.as_tensor(item[IDS] if isinstance(item, Mapping) else item)
        if ids.is_floating_point() or not ids.dim():
            raise SnpError(f"data: expected token ids, record {len(found) + 1:,} has {ids.dtype}.")
        found.append(ids.cpu().flatten().to(torch.int64))
        count += ids.numel()
        if count >= 8 * wanted:  # for the seed to choose from, as of a text
            break
    return found


def _documents(items: Iterator[Any], column: str) -> Iterator[Any]:
    """Texts, and conversations as lists of messages."""
    for number, item in enumerate(items, 1):
        value = item
        if isinstance(item, Mapping):
            value = item.get(column, item.get(CONVERSATION))
            if value is None and column not in item:
                raise SnpError(
                    f"data: expected a column {column!r} of texts, or {CONVERSATION!r}; record {number:,} has "
                    f"{', '.join(map(str, item))}. Name it with text_column."
                )
        if value is None:
            continue
        if not isinstance(value, str | list):
            raise SnpError(f"data: expected a text or a list of messages, record {number:,} is {shown(value)[:60]}.")
        if isinstance(value, list) and any(not isinstance(message, Mapping) for message in value):
            raise SnpError(
                f"data: expected a text or a list of messages, record {number:,} is {shown(value)[:60]}. Token ids "
                f"come as a tensor, or in a column {IDS!r}."
            )
        yield value
