"""One-shot structured pruning of language models.

Importing it makes pruned models known to transformers' Auto classes, so that they load without remote code.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snp_llm.runtime.version import __version__

if TYPE_CHECKING:
    from snp_llm.api import PrunedModel, prune
    from snp_llm.evaluate.perplexity import perplexity
    from snp_llm.recipe.file import load_recipe, save_recipe
    from snp_llm.recipe.recipe import Recipe
    from snp_llm.runtime.errors import SnpError

__all__ = ["PrunedModel", "Recipe", "SnpError", "__version__", "load_recipe", "perplexity", "prune", "save_recipe"]

PLACES = {
    "PrunedModel": "api",
    "Recipe": "recipe.recipe",
    "SnpError": "runtime.errors",
    "load_recipe": "recipe.file",
    "perplexity": "evaluate.perplexity",
    "prune": "api",
    "save_recipe": "recipe.file",
}
PROGRAM = "snp-llm"


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES[name]}"), name)


# That takes seconds, which `snp-llm --help` need not: the console script imports what its commands use.
if Path((sys.argv or [""])[0]).stem != PROGRAM:
    importlib.import_module(f"{__name__}.models.layouts")
