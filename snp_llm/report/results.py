"""Figures of a pruned model as its card says them: results of tasks to the Hub, a table to people. Measures none."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snp_llm.data.sources import NAMED
from snp_llm.report.rows import measured_by

# Of a task of the harness: what is no figure of the model, and what the Hub calls the others.
CONDITIONS = ("samples", "num_fewshot", "limit")
METRICS = {"acc": "accuracy", "top1": "accuracy", "top5": "top_5_accuracy"}

FILES = (".txt", ".jsonl", ".parquet")  # endings of what is a file on some machine, and no dataset's id


def dataset_of(name: str) -> tuple[str, str | None] | None:
    """A dataset's id on the Hub and its configuration, or None where it is not there: a file, a mixture, noise."""
    if name in NAMED:
        return NAMED[name].path, NAMED[name].options.get("name")
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", name)
    if found is None or name.startswith(".") or Path(name).exists() or Path(name).suffix in FILES:
        return None
    return found[1], found[2]


def hub_results(report: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    """What a card tells the Hub of measurements: `metrics` and `model-index`; empty where nothing was measured.

    Args:
        report: of a run, with what `snp-llm eval --save` has added.
        pipeline: what the Hub calls what the model does.
    """
    results = [_result(pipeline, *measured) for measured in _measured(report)]
    if not results:
        return {}
    metrics = dict.fromkeys(metric["type"] for result in results for metric in result["metrics"])
    index = {"name": f"{Path(report['recipe']['model']).name} pruned", "results": results}
    return {"metrics": [*metrics], "model-index": [index]}


def result_lines(report: Mapping[str, Any]) -> list[str]:
    """The same for people, as a table in Markdown; of all that was measured, the run's own closing figures included."""
    rows = [
        f"| {dataset['name']} | {name} | {value:,.4f} |"
        for dataset, figures in _measured(report)
        for name, value in figures.items()
    ]
    return ["| measured on | | |", "|---|---|---:|", *rows]


def _measured(report: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """Every dataset as the Hub names it, and the figures on it by their names in the report."""
    found: dict[str, tuple[dict[str, Any], dict[str, float]]] = {}
    texts = [*report.get("perplexities", []), *report.get("accuracies", [])]
    if measured_by(report) and report.get("evaluation") is not None:
        texts.insert(0, {"text": str(report["evaluation"]), **report["pruned"]})
    for entry in texts:
        figures = {name: entry[name] for name in ("perplexity", "top1", "top5") if entry.get(name) is not None}
        found[entry["text"]] = (_dataset(entry["text"]), figures)
    for task, metrics in report.get("tasks", {}).items():
        figures = {k: v for k, v in metrics.items() if k not in CONDITIONS and "_stderr" not in k}
        said = {name: metrics[name] for name in CONDITIONS if name in metrics}
        found[f"task {task}"] = ({"type": task, "name": task, **({"args": said} if said else {})}, figures)
    return [(dataset, figures) for dataset, figures in found.values() if figures]


def _dataset(text: str) -> dict[str, Any]:
    """The dataset of a line such as `wikitext2 (test), 87 windows of 256 tokens`, which begins with its name."""
    of = dataset_of(text.partition(" (")[0])
    config = {} if of is None or of[1] is None else {"config": of[1]}
    return {"type": "custom" if of is None else of[0], "name": text, **config}


def _result(pipeline: str, dataset: dict[str, Any], figures: Mapping[str, float]) -> dict[str, Any]:
    """One entry of the model index: what a text is continued with is of a language model, whatever else it reads."""
    kind = pipeline if "top1" in figures else "text-generation"
    named = {"type": kind, "name": " ".join(word.capitalize() for word in kind.split("-"))}
    metrics = [{"type": METRICS.get(name, name), "name": name, "value": value} for name, value in figures.items()]
    return {"task": named, "dataset": dataset, "metrics": metrics}
