"""What a run depends on, for a journal to prove; what it decided once. Prunes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.checkpoint.journal import Journal
from snp_llm.checkpoint.readers import reader_for
from snp_llm.data.windows import Windows
from snp_llm.models.offload import fingerprint
from snp_llm.recipe.groups import IDENTITY
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.files import checksum
from snp_llm.runtime.version import __version__


def decided_widths(decide: Callable[[], list[int]], recipe: Recipe, journal: Journal) -> list[int]:
    """Units to keep at every site: decided once, since latencies never come out the same again, and on rank 0.

    Raises:
        SnpError: the latency table is not the one that an interrupted run has decided them from.
    """
    table = None if recipe.latency_table is None else Path(recipe.latency_table)

    def plan() -> dict[str, Any]:
        return {"widths": decide(), "latency table": table and checksum(table)}

    def decided() -> list[int]:
        found = journal.remembered("plan", plan)
        if table is not None and table.exists() and checksum(table) != found["latency table"]:
            raise SnpError(
                f"--resume: latency table {table} is not the one that the unfinished run has chosen its widths from. "
                "Put that back or remove it, or start anew with --overwrite."
            )
        widths: list[int] = found["widths"]
        return widths

    return ranks.from_rank(0, decided)


def identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows, recipe: Recipe
) -> dict[str, Any]:
    """What a pruned model depends on; an unfinished run is only gone on with where all of it is the same."""
    generation = getattr(model, "generation_config", None)  # classifiers have none
    return {
        "setting": {key: value for key, value in recipe.as_dict().items() if key in IDENTITY},
        "config": _config_values(model.config),
        "generation config": {} if generation is None else _config_values(generation),
        "tokenizer": reader_for(model.config).checksum(tokenizer),
        "weights": fingerprint(model),
        "calibration text": windows.digest,
        "version": {"snp_llm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _config_values(config: PretrainedConfig | GenerationConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_name_or_path")}
