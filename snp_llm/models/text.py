"""How a model reads text: how long a window is, where BOS stands, which ids it embeds. Reads no text."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.data.windows import Windows, adds_bos
from snp_llm.models.anatomy import embedding_rows
from snp_llm.models.families.decoders import find_family
from snp_llm.recipe.recipe import Bos
from snp_llm.runtime.errors import SnpError

LONGEST_DEFAULT_WINDOW = 2048


def window_length(asked: int | None, positions: int) -> int:
    """Tokens a window: what was asked for, or the model's maximum, at most 2048."""
    if asked is not None and asked > positions:
        raise SnpError(f"--seq-len: expected at most the model's {positions:,} positions, got {asked:,}.")
    return asked or min(positions, LONGEST_DEFAULT_WINDOW)


def resolve_bos(asked: Bos, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bos:
    """Where BOS stands: "always" before every window, "once" at the start of the text, or "never".

    "auto" asks for what the numbers of others are made with: once, if the tokenizer adds it; but before every window
    for families that are lost without it. Where a tokenizer adds none, nothing is added for it.
    """
    if asked != "auto":
        return asked
    return "always" if find_family(model.config).needs_bos and adds_bos(tokenizer) else "once"


def check_tokens(windows: Windows, model: PreTrainedModel) -> None:
    """Raises SnpError if a text has a token that the model has no embedding for."""
    rows = embedding_rows(model)
    if (largest := int(windows.tokens.max())) >= rows:
        raise SnpError(
            f"{windows.description}: token id {largest:,} is in the text; the model embeds ids below {rows:,}. Take "
            "that token out of the text, or use the model's own tokenizer."
        )
    if (smallest := int(windows.tokens.min())) < 0:
        raise SnpError(f"{windows.description}: expected token ids from 0 on, got {smallest:,}. Leave out such places.")
