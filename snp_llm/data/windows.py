"""Token windows out of datasets, for calibration and for evaluation. Knows tokenizers, no models and no files."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from snp_llm.data.sources import Dataset, mixture, open_dataset
from snp_llm.recipe.recipe import Bos
from snp_llm.runtime.errors import SnpError, reason, shown

# Characters of calibration text read for every token wanted: about eight times what is needed, so that the seed has
# windows to choose from and a corpus of many gigabytes is not tokenised for its first thousandth.
CHARACTERS_A_TOKEN = 32

BYTES_A_TOKEN = 72  # of host memory that so much text and its ids take

# What a description says of it; nothing, where it is as in published perplexities.
BOS_REMARKS: dict[Bos, str] = {"always": ", each after BOS", "once": "", "never": ", without BOS"}


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
    dataset: Dataset,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: Bos = "once",
) -> Windows:
    """A seeded draw of `num_samples` windows; fewer, said in the description, where the text is short.

    Args:
        tokenizer: of the model.
        dataset: that is read; `random` draws uniform ids over the tokenizer's vocabulary, without BOS unless that is to
            stand before every window.
        num_samples: windows that are wanted.
        seq_len: tokens a window has.
        seed: of the draw.
        bos: "always", "once" or "never".

    Raises:
        SnpError: no such dataset, split or column, not one full window of text, or no BOS where it is to stand.
    """
    generator, first = torch.Generator().manual_seed(seed), _first_token(tokenizer, bos)
    if dataset.name == "random":
        added = set(tokenizer.added_tokens_decoder)  # which may lie past the embeddings
        ids = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - added))
        chosen = ids[torch.randint(len(ids), (num_samples * seq_len,), generator=generator)]
        return windows_of(
            cut_windows(chosen, seq_len, dataset.name, first)[:num_samples], "uniformly random token ids", bos
        )
    documents, source, label = open_dataset(dataset, "calibration")
    text = (documents, source.joiner, label, dataset.name)
    return text_windows(tokenizer, *text, num_samples=num_samples, seq_len=seq_len, seed=seed, bos=bos)


def text_windows(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[Any],
    joiner: str,
    label: str,
    name: str | None = None,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: Bos,
) -> Windows:
    """A seeded draw of windows from documents, as `calibration_windows` has it.

    Args:
        tokenizer: of the model.
        documents: texts, and conversations as lists of messages, which go through the tokenizer's chat template.
        joiner: stands between two of them.
        label: for people.
        name: of the dataset, for errors.
        num_samples, seq_len, seed, bos: as there.
    """
    name, first = name or label, _first_token(tokenizer, bos)
    texts = (_rendered(tokenizer, document, name) for document in documents)
    text = joiner.join(_take(texts, CHARACTERS_A_TOKEN * num_samples * seq_len))
    tokens = cut_windows(_tokenize(tokenizer, text, bos), seq_len, name, first)
    return drawn(tokens, label, bos, num_samples=num_samples, seed=seed)


def drawn(tokens: Tensor, label: str, bos: Bos, *, num_samples: int, seed: int) -> Windows:
    """A seeded draw of some windows, (windows, T); all of them, which the description says, where there are no more."""
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:num_samples]
    short = f" ({num_samples} asked for, the text holds no more)" if len(tokens) < num_samples else ""
    return windows_of(tokens[chosen], label, bos, short)


def mixed_windows(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: Bos = "once",
) -> Windows:
    """Windows of all datasets that a name lists, each with its share of them, in a seeded order.

    Whatever is read from the first windows alone, or judged on some, then sees all of the texts. Of one dataset as
    `calibration_windows`, whose arguments and errors these are.
    """
    parts = mixture(dataset)
    ends = [round(num_samples * sum(share for _, share in parts[: at + 1])) for at in range(len(parts))]
    counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    if 0 in counts:
        raise SnpError(
            f"--calibration: expected a window or more of each of {len(parts)} texts, got {num_samples} windows for "
            f"{shown(dataset.name)}. Use more --num-samples or fewer texts."
        )
    found = [
        calibration_windows(tokenizer, part, num_samples=count, seq_len=seq_len, seed=seed, bos=bos)
        for (part, _), count in zip(parts, counts, strict=True)
    ]
    if len(found) == 1:
        return found[0]
    tokens = torch.cat([windows.tokens for windows in found])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    shares = ", ".join(f"{len(windows.tokens)} of {windows.origin}" for windows in found)
    return windows_of(tokens[order], " and ".join(windows.origin for windows in found), bos, f": {shares}")


def split_windows(windows: Windows, wanted: int, held: int) -> tuple[Windows, Windows]:
    """The first `wanted` windows of a draw, and the rest, held out: `held` or, of a short draw, a quarter at least.

    Raises:
        SnpError: a single window.
    """
    count = len(windows.tokens)
    if count < 2:
        raise SnpError("calibration: expected at least two windows, one of them to be held out; got one.")
    first = min(wanted, count - min(held, max(1, count // 4)))
    short = f" ({wanted} asked for)" if first < wanted else ""
    return (
        windows_of(windows.tokens[:first], windows.origin, windows.bos, f"{short}, {count - first} more held out"),
        windows_of(windows.tokens[first:], windows.origin, windows.bos),
    )


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    *,
    seq_len: int,
    max_windows: int | None = None,
    bos: Bos = "once",
) -> Windows:
    """All full windows of a split: documents joined, tokenised once, cut without overlap, the rest dropped.

    Args:
        tokenizer: of the model.
        dataset: that is read.
        seq_len: tokens a window has.
        max_windows: the first so many; None: all.
        bos: "always", "once" or "never".

    Raises:
        SnpError: no such dataset, split or column, not one full window of text, or no BOS where it is to stand.
    """
    tokens, first, label = _whole_split(tokenizer, dataset, bos)
    return windows_of(cut_windows(tokens, seq_len, dataset.name, first)[:max_windows], label, bos)


def evaluation_text(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, *, bos: Bos = "once") -> Windows:
    """A whole split as one window, (1, tokens): documents joined, tokenised once, not cut.

    Args:
        tokenizer: of the model.
        dataset: that is read.
        bos: "always", "once" or "never". With "always" BOS is not among the tokens, since it is to stand before every
            window that is cut from them, but the digest counts it.

    Raises:
        SnpError: no such dataset, split or column, less than two tokens of text, or no BOS where it is to stand.
    """
    tokens, first, label = _whole_split(tokenizer, dataset, bos)
    if len(tokens) < 2:
        raise SnpError(f"dataset {dataset.name}: expected at least two tokens of text, got {len(tokens)}.")
    counted = tokens if first is None else torch.cat([tokens, torch.tensor([first])])
    digest = hashlib.sha256(counted.numpy().tobytes()).hexdigest()
    return Windows(tokens[None], f"{label}, {len(tokens):,} tokens", digest, label, bos)


def _whole_split(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, bos: Bos) -> tuple[Tensor, int | None, str]:
    """Tokens of all documents of a split, what stands before every window, and what people call the split."""
    first = _first_token(tokenizer, bos)
    documents, source, label = open_dataset(dataset, "evaluation")
    texts = (_rendered(tokenizer, d, dataset.name) for d in islice(documents, source.evaluation_documents))
    return _tokenize(tokenizer, source.joiner.join(texts), bos), first, label


def _rendered(tokenizer: PreTrainedTokenizerBase, document: Any, name: str) -> str:
    """A document's text; that of a conversation is what the chat template makes of it, BOS left to where it stands."""
    if isinstance(document, str):
        return document
    try:
        text = str(tokenizer.apply_chat_template(document, tokenize=False))
    except Exception as error:  # no template, or whatever a template says of messages that are not as it wants them
        raise SnpError(
            f"dataset {name}: expected messages that the tokenizer's chat template takes, each with a role and content "
            f"({reason(error)[:200]}). Name a column of texts with --text-column."
        ) from error
    return text.removeprefix(tokenizer.bos_token or "")


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


def cut_windows(tokens: Tensor, seq_len: int, name: str, first: int | None = None) -> Tensor:
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


def windows_of(tokens: Tensor, origin: str, bos: Bos, remark: str = "") -> Windows:
    """Windows of tokens, (windows, T), with what people are told of them."""
    count, length = tokens.shape
    description = f"{origin}, {count} windows of {length} tokens{BOS_REMARKS[bos]}{remark}"
    return Windows(tokens, description, hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), origin, bos)
