"""What a run did, as JSON, as a model card and as the closing table. Knows results, changes nothing."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from rich.table import Table

from snp_llm.errors import SnpError, reason
from snp_llm.json_files import read_json
from snp_llm.measure import ModelSize
from snp_llm.models.layouts import needs_code
from snp_llm.pipeline import PrunedModel
from snp_llm.site import SiteResult
from snp_llm.version import __version__

REPORT = "prune_report.json"
PAGE = "report.html"
CARD = "README.md"
NEEDED = ("recipe", "sparsity", "dense", "pruned", "sites", "calibration", "seconds")  # keys of every report


@dataclass(frozen=True)
class Measured:
    """Figures of one model, dense or pruned.

    Attributes:
        size: parameters, bytes, FLOPs a token.
        disk: bytes of its weight files, or of its parameters where it has no folder of safetensors.
        perplexity: or None if not evaluated.
        speed: tokens a second at prefill, or None if not measured.
    """

    size: ModelSize
    disk: int
    perplexity: float | None
    speed: float | None


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
            "target_weight": result.target_weight,
            "dampening": result.dampening,
            "seconds": round(result.seconds, 4),
            "heads": heads(result),
            "curve": curve(result),
            "kept": result.kept.tolist(),
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
            "achieved": achieved_sparsity(dense, pruned),
        },
        "predicted_perplexity_ratio": predicted_ratio(pruned),
        "trials": [{"sparsity": sparsity, "perplexity_rise": rise} for sparsity, rise in pruned.trials],
        "dense": asdict(dense),
        "pruned": asdict(after),
        "seconds": {phase: round(value, 3) for phase, value in pruned.seconds.items()},
        "sites": sites,
        **facts,
    }


def versions() -> dict[str, str]:
    """Of what a figure depends on besides this package."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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


def achieved_sparsity(dense: Measured, pruned: PrunedModel) -> float:
    """Fraction of the block-linear parameters that is gone, or zero where the layout is padded."""
    removed = sum((r.site.units - len(r.kept)) * r.site.cost for r in pruned.sites)
    return removed / dense.size.block_linear


def predicted_ratio(pruned: PrunedModel) -> float | None:
    """What the quadratic model of the loss predicts for perplexity on the calibration text, over that of dense."""
    losses = [r.predicted_loss for r in pruned.sites if r.predicted_loss is not None]
    return math.exp(sum(losses)) if len(losses) == len(pruned.sites) else None


def read_report(folder: Path) -> dict[str, Any]:
    """The report of an output folder.

    Raises:
        SnpError: there is none, or another file has its name.
    """
    file = folder / REPORT
    where = f"{file}: expected a report of `snp-llm prune`"
    report = read_json(file, where)
    missing = [key for key in NEEDED if key not in report] if isinstance(report, dict) else NEEDED
    if missing:
        raise SnpError(f"{where}; {missing[0]!r} is missing.")
    found: dict[str, Any] = report
    return found


def write_report(report: dict[str, Any], folder: Path) -> None:
    (folder / REPORT).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def closing_table(dense: Measured, after: Measured, pruned: PrunedModel) -> Table:
    """Dense and pruned side by side, with their ratio."""
    table = Table()
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, before: float | None, now: float | None, form: str) -> None:
        if before is not None and now is not None:
            table.add_row(name, format(before, form), format(now, form), f"{now / before:.3f}")

    row("parameters", dense.size.parameters, after.size.parameters, ",")
    row("block-linear parameters", dense.size.block_linear, after.size.block_linear, ",")
    attention = [(r.site.heads, r.site.heads_after(len(r.kept))) for r in pruned.sites if r.site.heads]
    row("attention heads", sum(b.query for b, _ in attention), sum(a.query for _, a in attention), ",")
    if any(before.query != before.key_value for before, _ in attention):
        row("key-value heads", sum(b.key_value for b, _ in attention), sum(a.key_value for _, a in attention), ",")
    ffn = [r for r in pruned.sites if r.site.kind == "ffn"]
    row("FFN channels", sum(r.site.units for r in ffn), sum(len(r.kept) for r in ffn), ",")
    row("size on disk, MB", dense.disk / 1e6, after.disk / 1e6, ",.2f")
    row("MFLOPs a token", dense.size.flops / 1e6, after.size.flops / 1e6, ",.2f")
    row("perplexity", dense.perplexity, after.perplexity, ",.2f")
    row("prefill, tokens a second", dense.speed, after.speed, ",.0f")
    table.add_row("seconds spent pruning", "", f"{sum(pruned.seconds.values()):.1f}", "")
    for phase, seconds in pruned.seconds.items():
        table.add_row(f"  {phase}", "", f"{seconds:.1f}", "")
    return table


def model_card(report: dict[str, Any], base_model: str | None, *, model_type: str, has_code: bool) -> str:
    """The folder's README.md: front matter for the hub, then what was done and how to load it."""
    recipe, sparsity = report["recipe"], report["sparsity"]
    dense, pruned = report["dense"], report["pruned"]
    evaluation = report.get("evaluation")
    measured = pruned["perplexity"] is not None and evaluation is not None
    name = f"{Path(recipe['model']).name} pruned"
    result = EvalResult(
        task_type="text-generation",
        dataset_type=str(recipe["eval_dataset"]),
        dataset_name=str(evaluation),
        metric_type="perplexity",
        metric_value=pruned["perplexity"],
    )
    front = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["snp-llm", "pruned", "structured-pruning", *(["custom_code"] if has_code else [])],
        metrics=["perplexity"] if measured else None,
        model_name=name if measured else None,
        eval_results=[result] if measured else None,
    )
    trust = ", trust_remote_code=True" if has_code else ""
    lines = [
        f"# {Path(recipe['model']).name}, {100 * sparsity['achieved']:.1f} % of its block-linear parameters removed",
        "",
        "Whole FFN neurons and attention heads were removed in one shot, without training, and the out-projections",
        f"repaired by least squares, with snp-llm {report['snp_llm']}.",
        "",
        "| | dense | pruned |",
        "|---|---:|---:|",
        f"| parameters | {dense['size']['parameters']:,} | {pruned['size']['parameters']:,} |",
        f"| block-linear parameters | {dense['size']['block_linear']:,} | {pruned['size']['block_linear']:,} |",
        f"| size on disk, MB | {dense['disk'] / 1e6:,.2f} | {pruned['disk'] / 1e6:,.2f} |",
        f"| MFLOPs a token | {dense['size']['flops'] / 1e6:,.2f} | {pruned['size']['flops'] / 1e6:,.2f} |",
    ]
    if measured:
        lines.append(f"| perplexity | {dense['perplexity']:,.2f} | {pruned['perplexity']:,.2f} |")
        lines += ["", f"Perplexity on {evaluation}."]
    lines += [
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "path/to/this/folder"  # or user/name on the Hub',
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        "```",
        "",
    ]
    if has_code:
        lines += [
            "Blocks differ in width, which the stock config cannot express; the folder carries a short modelling file,",
            "which is what `trust_remote_code` allows to run. With `import snp_llm` it is not needed. It loads in",
            "transformers, and not in engines with models of their own, such as vLLM and llama.cpp.",
            "",
        ]
    else:
        lines += [
            f"A plain `{model_type}` config and safetensors, without any code: it loads in transformers, and in every",
            f"other engine that reads `{model_type}` checkpoints.",
            "",
        ]
    lines += [
        f"Calibrated on {report['calibration']['text']}. Made with `{report['command']}`."
        if "command" in report
        else f"Calibrated on {report['calibration']['text']}.",
        f"Every setting, kept unit and error is in `{REPORT}`; `{PAGE}` shows them in pictures.",
        "",
    ]
    return "\n".join(["---", front.to_yaml(), "---", "", *lines])


def write_card(report: dict[str, Any], pruned: PrunedModel, base_model: str | None, folder: Path) -> None:
    config = pruned.model.config
    card = model_card(report, base_model, model_type=config.model_type, has_code=needs_code(config))
    (folder / CARD).write_text(card, encoding="utf-8")


def read_card(folder: Path) -> str:
    """The model card of an output folder.

    Raises:
        SnpError: it cannot be read.
    """
    card = folder / CARD
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise SnpError(f"{card}: expected a model card in UTF-8, cannot be read ({reason(error)}).") from error


def update_card(folder: Path, heading: str, lines: Sequence[str]) -> None:
    """Puts a section into the model card of an output folder, in place of the one with that heading that was there.

    Args:
        folder: with a README.md that `write_card` wrote.
        heading: of the section, one line.
        lines: its Markdown.
    """
    text = read_card(folder)
    begin, end = f"<!-- {heading} -->", f"<!-- end of {heading} -->"
    section = "\n".join([begin, f"## {heading}", "", *lines, end])
    before, found, rest = text.partition(begin)
    text = before + section + rest.partition(end)[2] if found else f"{text.rstrip()}\n\n{section}\n"
    write_text(folder / CARD, text)


def write_text(file: Path, text: str) -> None:
    """Replaces a file at once, so that it is never half written.

    Raises:
        SnpError: it cannot be written.
    """
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(file)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise SnpError(f"{file}: cannot be written ({reason(error)}).") from error
