"""What a run did, as JSON. Knows results, changes nothing."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snp_llm.checkpoint.contents import REPORT
from snp_llm.models.size import ModelSize
from snp_llm.models.task import TEXT, task_of
from snp_llm.pruning.pipeline import PrunedModel
from snp_llm.pruning.result import SiteResult
from snp_llm.runtime.device import versions
from snp_llm.runtime.files import write_text
from snp_llm.runtime.version import __version__


@dataclass(frozen=True)
class Measured:
    """Figures of one model, dense or pruned.

    Attributes:
        size: parameters, bytes, FLOPs a token, or an image.
        disk: bytes of its weight files, or of its parameters where it has no folder of safetensors.
        perplexity: or None if not evaluated.
        speed: tokens a second at prefill, or images a second; None if not measured.
        top1, top5: of images, per cent that are classified rightly at the first guess or with five; None likewise.
    """

    size: ModelSize
    disk: int
    perplexity: float | None = None
    speed: float | None = None
    top1: float | None = None
    top5: float | None = None


def build_report(pruned: PrunedModel, dense: Measured, after: Measured, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything worth knowing about a run, ready for JSON.

    Args:
        pruned: the result.
        dense, after: figures of the dense and of the pruned model.
        facts: further top-level entries (command, evaluation text, verification).
    """
    sites = [
        {
            "site": result.site.name,
            "kind": result.site.kind,
            "unit": result.site.unit,
            "units_before": result.site.units,
            "units_after": len(result.kept),
            "ratio": len(result.kept) / result.site.units,
            "energy": result.energy,
            "relative_error": result.error,
            "predicted_error": result.predicted_error,
            "predicted_loss": result.predicted_loss,
            "reference_weight": result.reference_weight,
            "dampening": result.dampening,
            "refinement": result.refinement,
            "seconds": round(result.seconds, 4),
            "heads": heads(result),
            "curve": curve(result),
            "kept": result.kept.tolist(),
            "experts": result.experts,
        }
        for result in pruned.sites
    ]
    return {
        "snp_llm": __version__,
        "versions": versions(),
        "recipe": pruned.recipe.as_dict(),
        "seed": pruned.recipe.seed,
        "calibration": {"text": pruned.calibration.description, "sha256": pruned.calibration.digest},
        "sparsity": {
            "target": pruned.sparsity,
            "achieved": achieved_sparsity(dense, after, pruned),
        },
        "task": task_of(pruned.model.config).name,
        "stays": pruned.stays,
        "predicted_perplexity_ratio": predicted_ratio(pruned),
        "trials": [{"sparsity": sparsity, "perplexity_rise": rise} for sparsity, rise in pruned.trials],
        "dense": asdict(dense),
        "pruned": asdict(after),
        "seconds": {phase: round(value, 3) for phase, value in pruned.seconds.items()},
        "sites": sites,
        **facts,
    }


def heads(result: SiteResult) -> dict[str, dict[str, int]] | None:
    """Query and key-value heads before and after the cut; None at an FFN."""
    if result.site.heads is None:
        return None
    return {"before": asdict(result.site.heads), "after": asdict(result.site.heads_after(len(result.kept)))}


def curve(result: SiteResult) -> dict[str, Any] | None:
    """A site's curve with four digits of each value: it is drawn, not computed with."""
    if result.curve is None:
        return None
    return {
        name: [float(f"{x:.4g}") if isinstance(x, float) else x for x in values] if isinstance(values, list) else values
        for name, values in asdict(result.curve).items()
    }


def achieved_sparsity(dense: Measured, after: Measured, pruned: PrunedModel) -> float:
    """Fraction of the block-linear parameters that is gone, or stands for nothing where the layout is padded."""
    if pruned.recipe.layout != "padded":
        return (dense.size.block_linear - after.size.block_linear) / dense.size.block_linear
    removed = sum((r.site.units - len(r.kept)) * r.site.cost for r in pruned.sites)
    return removed / dense.size.block_linear


def predicted_ratio(pruned: PrunedModel) -> float | None:
    """What the quadratic model of the loss predicts for perplexity on the calibration text, over that of dense; None
    where nothing was predicted, or no text was read."""
    if task_of(pruned.model.config) is not TEXT:
        return None
    losses = [r.predicted_loss for r in pruned.sites if r.predicted_loss is not None]
    return math.exp(sum(losses)) if len(losses) == len(pruned.sites) else None


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes a report into the folder of its model."""
    write_text(folder / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
