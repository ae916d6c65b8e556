"""The model card of an output folder. Knows results, computes nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PretrainedConfig

from snp_llm.checkpoint.contents import CARD, PAGE, REPORT, read_card
from snp_llm.checkpoint.tokenizer import reader_of
from snp_llm.models.layouts import needs_code
from snp_llm.models.registry import auto_class
from snp_llm.report.rows import markdown_table, measured_by, what_went
from snp_llm.runtime.files import write_text

# By the Auto class of a model, where the Hub calls what it does something else than the generation of text.
PIPELINES = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForImageClassification": "image-classification",
}


def model_card(
    report: dict[str, Any],
    base_model: str | None,
    *,
    model_type: str,
    has_code: bool,
    classes: tuple[str, str] = ("AutoModelForCausalLM", "AutoTokenizer"),
) -> str:
    """The folder's README.md: front matter for the hub, then what was done and how to load it.

    Args:
        report: as in `prune_report.json`.
        base_model: on the Hub, if it is there.
        model_type: of the config.
        has_code: whether the folder needs `trust_remote_code`.
        classes: Auto classes that load the model and what reads its inputs.
    """
    auto, reader = classes
    trust = ", trust_remote_code=True" if has_code else ""
    if has_code:
        loads = [
            "Blocks differ in width, which the stock config cannot express; the folder carries a short modelling file,",
            "which is what `trust_remote_code` allows to run. With `import snp_llm` it is not needed. It loads in",
            "transformers; in vLLM where the package snp-llm is installed too, if its docs name the type; and in",
            "llama.cpp and ONNX Runtime as what `snp-llm export` makes of it, where it can.",
        ]
    else:
        loads = [
            f"A plain `{model_type}` config and safetensors, without any code: it loads in transformers, and in every",
            f"other engine that reads `{model_type}` checkpoints.",
        ]
    made = f" Made with `{report['command']}`." if "command" in report else ""
    removed, (gone, repaired) = 100 * report["sparsity"]["achieved"], what_went(report)
    without = "" if report.get("recovery") else ", without training"
    lines = [
        *("---", front_matter(report, base_model, has_code=has_code, auto=auto), "---", ""),
        f"# {Path(report['recipe']['model']).name}, {removed:.1f} % of its block-linear parameters removed",
        "",
        f"Whole {gone} were removed in one shot{without}, and the {repaired}",
        f"repaired by least squares, with snp-llm {report['snp_llm']}.",
        *(f"{line[0].upper()}{line[1:]}." for line in report["stays"]),
        "",
        *markdown_table(report),
        "",
        *(_measured_on(report), ""),
        "```python",
        f"from transformers import {auto}, {reader}",
        "",
        'folder = "path/to/this/folder"  # or user/name on the Hub',
        f"model = {auto}.from_pretrained(folder{trust})",
        f"{reader.removeprefix('Auto').lower()} = {reader}.from_pretrained(folder{trust})",
        "```",
        "",
        *(*loads, ""),
        f"Calibrated on {report['calibration']['text']}.{made}",
        f"Every setting, kept unit and error is in `{REPORT}`; `{PAGE}` shows them in pictures.",
        "",
    ]
    return "\n".join(lines)


def front_matter(report: dict[str, Any], base_model: str | None, *, has_code: bool, auto: str) -> str:
    """What the Hub reads of a card: tags, the dense model, and perplexity where it was measured; YAML."""
    name = f"{Path(report['recipe']['model']).name} pruned"
    pipeline, measured = PIPELINES.get(auto, "text-generation"), _has_figures(report)
    key, metric = ("top1", "accuracy") if report["pruned"].get("top1") is not None else ("perplexity", "perplexity")
    result = EvalResult(
        task_type="text-generation" if key == "perplexity" else pipeline,
        dataset_type=str(report["recipe"]["eval_dataset"]),
        dataset_name=str(report.get("evaluation")),
        metric_type=metric,
        metric_value=report["pruned"][key],
    )
    data = ModelCardData(
        base_model=base_model,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["snp-llm", "pruned", "structured-pruning", *(["custom_code"] if has_code else [])],
        metrics=[metric] if measured else None,
        model_name=name if measured else None,
        eval_results=[result] if measured else None,
    )
    return str(data.to_yaml())


def _has_figures(report: dict[str, Any]) -> bool:
    return bool(measured_by(report)) and report.get("evaluation") is not None


def _measured_on(report: dict[str, Any]) -> str:
    """What the figures of the table were measured on, text and device, in sentences."""
    said = []
    if _has_figures(report):
        named = " and ".join(measured_by(report))
        said.append(f"{named[0].upper()}{named[1:]} on {report['evaluation']}.")
    if report["pruned"]["speed"] is not None and "device" in report:
        said.append(f"Speed on {report['device']}.")
    return " ".join(said)


def write_card(report: dict[str, Any], config: PretrainedConfig, base_model: str | None, folder: Path) -> None:
    """Writes the model card of a pruned model of a config into its folder."""
    classes = auto_class(config).__name__, reader_of(folder)
    card = model_card(report, base_model, model_type=config.model_type, has_code=needs_code(config), classes=classes)
    write_text(folder / CARD, card)


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
