"""The model card of an output folder. Knows results, computes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from transformers import PretrainedConfig

from snp_llm.checkpoint.base_card import inherited
from snp_llm.checkpoint.contents import CARD, PAGE, REPORT, read_card, split_card
from snp_llm.checkpoint.tokenizer import reader_of
from snp_llm.models.layouts import needs_code
from snp_llm.models.registry import auto_class
from snp_llm.report.limits import limits
from snp_llm.report.results import dataset_of, hub_results, result_lines
from snp_llm.report.rows import markdown_table, measured_by, what_went
from snp_llm.report.words import sample_lines
from snp_llm.runtime.files import write_text

# By the Auto class of a model, where the Hub calls what it does something else than the generation of text.
PIPELINES = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForImageClassification": "image-classification",
}

CITATION = """@article{offergeld2024subspace,
  title   = {Subspace Node Pruning},
  author  = {Offergeld, Joshua and van Gerven, Marcel and Ahmad, Nasir},
  journal = {arXiv preprint arXiv:2405.17506},
  year    = {2024}
}"""


@dataclass(frozen=True)
class Origin:
    """Where a pruned model comes from.

    Attributes:
        base_model: the dense one on the Hub, if it is there.
        inherited: what its card says that holds here too: license, languages.
    """

    base_model: str | None = None
    inherited: Mapping[str, Any] = field(default_factory=dict)


def model_card(
    report: dict[str, Any],
    origin: Origin,
    *,
    model_type: str,
    has_code: bool,
    classes: tuple[str, str] = ("AutoModelForCausalLM", "AutoTokenizer"),
) -> str:
    """The folder's README.md: front matter for the hub, then what was done and how to load it.

    Args:
        report: as in `prune_report.json`.
        origin: of the model.
        model_type: of the config.
        has_code: whether the folder needs `trust_remote_code`.
        classes: Auto classes that load the model and what reads its inputs.
    """
    made = f" Made with `{report['command']}`." if "command" in report else ""
    removed, (gone, repaired) = 100 * report["sparsity"]["achieved"], what_went(report)
    without = "" if report.get("recovery") else ", without training"
    lines = [
        *("---", front_matter(report, origin, has_code=has_code, auto=classes[0]), "---", ""),
        f"# {Path(report['recipe']['model']).name}, {removed:.1f} % of its block-linear parameters removed",
        "",
        f"Whole {gone} were removed in one shot{without}, and the {repaired}",
        f"repaired by least squares, with snp-llm {report['snp_llm']}.",
        *(f"{line[0].upper()}{line[1:]}." for line in report["stays"]),
        "",
        *markdown_table(report),
        "",
        *(_measured_on(report), ""),
        *_continued(report),
        *_usage(classes, model_type, has_code=has_code),
        "## Limits",
        "",
        *(f"- {sentence}" for sentence in limits(report)),
        "- What the dense model is not fit for, this one is not either; what it knew rarely goes first.",
        "",
        "## How it was made",
        "",
        f"Calibrated on {report['calibration']['text']}.{made}",
        f"Every setting, kept unit and error is in `{REPORT}`; `{PAGE}` shows them in pictures.",
        "",
        "```bibtex",
        CITATION,
        "```",
        "",
    ]
    return "\n".join(lines)


def _continued(report: Mapping[str, Any]) -> list[str]:
    """A sentence as both models go on with it."""
    said = sample_lines(report)
    return ["```text", *said, "```", ""] if said else []


def _usage(classes: tuple[str, str], model_type: str, *, has_code: bool) -> list[str]:
    """How to load the model and, where it writes, let it."""
    (auto, reader), trust = classes, ", trust_remote_code=True" if has_code else ""
    name = reader.removeprefix("Auto").lower()
    lines = [
        "```python",
        f"from transformers import {auto}, {reader}",
        "",
        'folder = "path/to/this/folder"  # or user/name on the Hub',
        f"model = {auto}.from_pretrained(folder{trust})",
        f"{name} = {reader}.from_pretrained(folder{trust})",
    ]
    if auto == "AutoModelForCausalLM":
        lines += [
            'tokens = tokenizer("Once upon a time", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**tokens, max_new_tokens=32)[0], skip_special_tokens=True))",
        ]
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
    return [*lines, "```", "", *loads, ""]


def front_matter(report: Mapping[str, Any], origin: Origin, *, has_code: bool, auto: str) -> str:
    """What the Hub reads of a card: tags, license, the dense model, datasets, and what was measured; YAML."""
    pipeline, calibration = PIPELINES.get(auto, "text-generation"), dataset_of(str(report["recipe"]["calibration"]))
    data = ModelCardData(
        base_model=origin.base_model,
        datasets=[calibration[0]] if calibration else None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["snp-llm", "pruned", "structured-pruning", *(["custom_code"] if has_code else [])],
        **origin.inherited,
    )
    return _yaml({**data.to_dict(), **hub_results(report, pipeline)})


def _yaml(front: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True).rstrip()


def _measured_on(report: dict[str, Any]) -> str:
    """What the figures of the table were measured on, text and device, in sentences."""
    said = []
    if measured_by(report) and report.get("evaluation") is not None:
        named = " and ".join(measured_by(report))
        said.append(f"{named[0].upper()}{named[1:]} on {report['evaluation']}.")
    if report["pruned"]["speed"] is not None and "device" in report:
        said.append(f"Speed on {report['device']}.")
    return " ".join(said)


def write_card(report: dict[str, Any], config: PretrainedConfig, base_model: str | None, folder: Path) -> None:
    """Writes the model card of a pruned model of a config into its folder."""
    classes = auto_class(config).__name__, reader_of(folder)
    origin = Origin(base_model, inherited(str(report["recipe"]["model"])))
    card = model_card(report, origin, model_type=config.model_type, has_code=needs_code(config), classes=classes)
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


def refresh_card(report: Mapping[str, Any], folder: Path) -> None:
    """Brings a card up to what has been measured since: what it tells the Hub, and a section with a table of it.

    Args:
        report: with the new measurements.
        folder: with a README.md that `write_card` wrote. Front matter that has been taken out of it stays out.
    """
    front, text = split_card(read_card(folder))
    if front:
        kept = {key: value for key, value in front.items() if key not in ("metrics", "model-index")}
        front = {**kept, **hub_results(report, str(front.get("pipeline_tag", "text-generation")))}
        write_text(folder / CARD, f"---\n{_yaml(front)}\n---{text}")
    update_card(folder, "Evaluation", [*result_lines(report), ""])
