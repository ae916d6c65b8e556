"""One-shot structured pruning of language models.

Importing it makes pruned models known to transformers' Auto classes, so that they load without remote code.
"""

from snp_llm.errors import SnpError
from snp_llm.measure import perplexity
from snp_llm.pipeline import PrunedModel, prune
from snp_llm.recipe import Recipe
from snp_llm.recipe_file import load_recipe, save_recipe
from snp_llm.version import __version__

__all__ = ["PrunedModel", "Recipe", "SnpError", "__version__", "load_recipe", "perplexity", "prune", "save_recipe"]
