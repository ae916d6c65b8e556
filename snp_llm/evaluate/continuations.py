"""Sentences of a text as two models go on with them, for people to read. Knows nothing of pruning."""

import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.evaluate.samples import Sample
from snp_llm.models.calls import without_cache
from snp_llm.models.offload import on_device
from snp_llm.models.size import model_size
from snp_llm.runtime.device import free_bytes, free_host_bytes, where_it_fits

log = logging.getLogger("snp_llm")

WORDS = 12  # of a sentence, that the models are given

PASSAGE = 256  # tokens that a sentence is looked for in

NEW_TOKENS = 24  # that they go on for

ROOM = 0.8  # of the free memory, that a model may take to be run as a whole


@torch.no_grad()
def continuations(
    models: Sequence[PreTrainedModel], tokenizer: Any, windows: Tensor, count: int, device: torch.device
) -> list[Sample]:
    """Beginnings of sentences, and how each of two models goes on, always with the likeliest token.

    Args:
        models: dense and pruned; left where they are. What does not fit on the device as a whole is not asked.
        tokenizer: of both.
        windows: of a text, (windows, T), int64, from all parts of which the sentences are.
        count: of sentences that are wanted; fewer where there are no more.
        device: to compute on.

    Returns:
        Of each the `prompt`, and `dense` and `pruned`, the text after it.
    """
    prompts = beginnings(tokenizer, windows, count)
    largest = max(model_size(model, 1).bytes for model in models)
    if not prompts or largest > ROOM * min(free_bytes(device), free_host_bytes()):
        if prompts:
            log.info("no sentences are continued: the dense model does not fit into memory as a whole")
        return []
    found: list[Sample] = [{"prompt": prompt} for prompt in prompts]

    def ask(name: str, model: PreTrainedModel, place: torch.device) -> None:
        with on_device(model.eval(), place):
            for sample, prompt in zip(found, prompts, strict=True):
                given = tokenizer(prompt, return_tensors="pt")["input_ids"]
                new = gone_on(model, given.to(place))
                sample[name] = tokenizer.decode(new, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")

    for name, model in zip(("dense", "pruned"), models, strict=True):  # beside the process that reloads the pruned one
        where_it_fits(f"sentences of the {name} model", device, partial(ask, name, model))
    return found


def gone_on(model: PreTrainedModel, tokens: Tensor) -> list[int]:
    """The likeliest tokens after some, (1, T), one after the other, without a cache, which not all models have."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends, new = ends if isinstance(ends, list) else [ends], list[int]()
    while len(new) < NEW_TOKENS:
        likeliest = model(tokens, **without_cache(model)).logits[0, -1].argmax()
        if int(likeliest) in ends:
            break
        new.append(int(likeliest))
        tokens = torch.cat([tokens, likeliest.reshape(1, 1)], dim=1)
    return new


def beginnings(tokenizer: Any, windows: Tensor, count: int) -> list[str]:
    """Beginnings of sentences of a text, from windows that lie as far apart as they can."""
    found: list[str] = []
    for at in range(count):
        first = at * len(windows) // count
        tokens = windows[first : first + -(-PASSAGE // windows.shape[1])].flatten()
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n+", text)][
            1:
        ]  # the first is cut off
        sentence = max(sentences, key=lambda part: min(len(part.split()), 2 * WORDS), default="").split()
        prompt = " ".join(sentence[:WORDS])
        if len(sentence) >= WORDS and prompt not in found:
            found.append(prompt)
    return found
