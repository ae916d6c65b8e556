"""`snp-llm eval`: perplexity and tasks, or accuracy, as a table. Parses no arguments."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from snp_llm.checkpoint import contents
from snp_llm.checkpoint.skeleton import load_config
from snp_llm.cli.report import write_page
from snp_llm.evaluate import side_by_side
from snp_llm.evaluate.classified import classify
from snp_llm.evaluate.side_by_side import Evaluated
from snp_llm.models.task import task_of
from snp_llm.recipe.commands import EvaluationRecipe, Talk
from snp_llm.report import evaluation as evaluation_report
from snp_llm.runtime.terminal import print_json, print_table, table_of, watching

log = logging.getLogger("snp_llm")


def evaluation_table(results: Sequence[Evaluated]) -> Table:
    """Table with a row a model and a column a task, of its first metric."""
    tasks = list(dict.fromkeys(task for result in results for task in result.tasks))
    measured = results[0].perplexity is not None
    columns = ["", *(["perplexity", "ratio"] if measured else []), "parameters", "size, MB"]
    columns += [f"{task} {_first_metric(results[0].tasks[task])}".strip() for task in tasks]
    rows = []
    for result in results:
        row = [result.model]
        first = results[0].perplexity
        if result.perplexity is not None and first is not None:
            same = result.sha256 == results[0].sha256
            row += [f"{result.perplexity:,.4f}", f"{result.perplexity / first:.3f}" if same else "other tokens"]
        row += [f"{result.parameters:,}", f"{result.bytes / 1e6:,.2f}"]
        rows.append([*row, *(_shown(result.tasks[task]) for task in tasks)])
    return table_of(columns, rows)


def _first_metric(metrics: dict[str, float]) -> str:
    return next((name for name in metrics if name not in ("samples", "num_fewshot")), "")


def _shown(metrics: dict[str, float]) -> str:
    name = _first_metric(metrics)
    if not name:
        return ""
    base, bracket, rest = name.partition(" (")
    error = metrics.get(f"{base}_stderr{bracket}{rest}")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def as_json(results: Sequence[Evaluated]) -> dict[str, Any]:
    """The results, with the ratio to the first model's perplexity where the tokens are the same."""
    first = results[0]
    models = []
    for result in results:
        ratio = None
        if result.perplexity is not None and first.perplexity is not None and result.sha256 == first.sha256:
            ratio = result.perplexity / first.perplexity
        models.append({**asdict(result), "ratio": ratio})
    return {"models": models}


def run_evaluate(recipe: EvaluationRecipe, talk: Talk) -> None:
    """Measure how good models are, and print it with everything needed to repeat the numbers."""
    first = load_config(recipe.models[0], trust_remote_code=recipe.trust_remote_code)
    own = [name for name in recipe.models if recipe.save and (Path(name) / contents.REPORT).is_file()]
    if recipe.save and not own:
        contents.check_own_folder(recipe.models[0])
    for name in own:
        evaluation_report.check_folder(Path(name))
    RUNS[task_of(first).name](recipe, talk, own)


def run_classified(recipe: EvaluationRecipe, talk: Talk, own: Sequence[str]) -> None:
    """Measure the accuracy of classifiers of images, and record it in those folders that are our own."""
    results = classify(recipe, watching)
    if talk.json:
        print_json({"models": [asdict(result) for result in results]})
    else:
        columns = ["", "top-1, %", "top-5, %", "parameters", "size, MB", "MFLOPs an image", "images a second"]
        rows = [
            [
                *(r.model, f"{r.top1:.2f}", "-" if r.top5 is None else f"{r.top5:.2f}", f"{r.parameters:,}"),
                *(f"{r.bytes / 1e6:,.2f}", f"{r.flops / 1e6:,.1f}", f"{r.speed:,.0f}"),
            ]
            for r in results
        ]
        print_table(table_of(columns, rows))
        for text in dict.fromkeys(result.text for result in results):
            print(f"accuracy on {text}")
    for result in (result for result in results if result.model in own):
        evaluation_report.save_classified(result, Path(result.model))
        write_page(Path(result.model))


def run_texts(recipe: EvaluationRecipe, talk: Talk, own: Sequence[str]) -> None:
    """Measure perplexity and tasks, and record them likewise."""
    results = side_by_side.evaluate(recipe, watching)
    if talk.json:
        print_json(as_json(results))
    elif len(results) == 1 and recipe.tasks is None:
        print(f"{results[0].text}: perplexity {results[0].perplexity:.4f}")
    else:
        print_table(evaluation_table(results))
        if recipe.perplexity:
            for text in dict.fromkeys(result.text for result in results):
                print(f"perplexity on {text}")
    if not side_by_side.comparable(results):
        log.warning("the models' tokenizers differ: their perplexities are of different tokens and do not compare")
    for result in (result for result in results if result.model in own):  # last, as in `run_bench`
        evaluation_report.save(result, recipe, Path(result.model))
        write_page(Path(result.model))


RUNS = {"text": run_texts, "images": run_classified}
