"""`snp-llm push`: a finished folder onto the Hub. Parses no arguments."""

import sys
from pathlib import Path

import huggingface_hub

from snp_llm.checkpoint import hub
from snp_llm.recipe.commands import PushRecipe, Talk
from snp_llm.runtime.terminal import print_json


def run_push(recipe: PushRecipe, talk: Talk) -> None:
    """Upload a finished folder."""
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()  # an upload takes long
    url = hub.push(Path(recipe.folder), recipe.repo_id, private=recipe.private)
    if talk.json:
        print_json({"folder": recipe.folder, "url": url})
    else:
        print(f"{recipe.folder} -> {url}")
