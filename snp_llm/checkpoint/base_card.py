"""What a dense model's own card says that holds for the pruned one as well. Reads no weights."""

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from snp_llm.checkpoint.contents import CARD, split_card
from snp_llm.checkpoint.loading import is_hub_id

log = logging.getLogger(__name__)

INHERITED = ("license", "license_name", "license_link", "language")


def inherited(model: str) -> dict[str, Any]:
    """License and languages in the front matter of a model's card; those that it does not say are left out.

    Args:
        model: hub id or folder. Without a card, or out of the Hub's reach, nothing is inherited.
    """
    try:
        file = Path(hf_hub_download(model, CARD)) if is_hub_id(model) else Path(model) / CARD
        known, _ = split_card(file.read_text(encoding="utf-8"))
    except Exception as error:  # the Hub's, its transport's, the file system's: a card need not be there
        log.debug("card of %s: %s", model, error)
        return {}
    return {name: known[name] for name in INHERITED if _plain(known.get(name))}


def _plain(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text and len(text) < 200 for text in texts)
