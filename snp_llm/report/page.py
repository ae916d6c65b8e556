"""`report.html`: one page that shows what a run did, made from the JSON files of its folder alone.

Knows the report's keys, also where older ones lack some; loads no model. Whatever comes from a file is untrusted text:
it reaches the page through the template's escaping only.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from snp_llm.checkpoint.contents import BENCH, PAGE, REPORT
from snp_llm.report import pictures
from snp_llm.report.compare import compare
from snp_llm.report.limits import limits
from snp_llm.report.measurements import bench_measurements, measurements, recovery_measurements
from snp_llm.report.read import Run, model_name, read_run, speed_of, speed_up_of
from snp_llm.report.rows import summary, what_went, words_of
from snp_llm.report.words import asked, brief, brief_count, change_words, count, percent, said_of, setting_words
from snp_llm.runtime.errors import SnpError, reason
from snp_llm.runtime.files import write_text


def write_page(folder: Path, others: Sequence[Path] = ()) -> Path:
    """Makes `report.html` of a finished output folder, or makes it anew; the rest of the folder is left alone.

    Args:
        folder: with a `prune_report.json`, and `bench.json` if there is one.
        others: folders of the same dense model to compare with, for instance at other sparsities.

    Returns:
        The page.

    Raises:
        SnpError: no readable report there, or runs that cannot be compared.
    """
    page = folder / PAGE
    write_text(page, page_of(folder, others))
    return page


def page_of(folder: Path, others: Sequence[Path] = ()) -> str:
    """The page as `write_page` writes it."""
    return make_page(read_run(folder), [read_run(other) for other in others])


def make_page(run: Run, others: Sequence[Run] = ()) -> str:
    """The whole page as HTML, with its figures in it; it fetches nothing and runs nothing.

    Args:
        run: what it is about.
        others: to compare with.

    Raises:
        SnpError: a file that cannot be understood; others of another model, or evaluated on another text.
    """
    report = run.report
    try:
        compared = compare([run, *others]) if others else None  # first: it may refuse
        context = {
            "run": run,
            "report": report,
            "model": model_name(report),
            "rows": summary(report),
            "tiles": tiles(report),
            "said": said_of(report),
            "arguments": str(report.get("command", "")).split(),
            "quoted": json.dumps(f"path/to/{run.name}", ensure_ascii=False),
            "gone": what_went(report)[0],
            "continued": [sample for sample in report.get("samples", []) if "prompt" in sample],
            "samples": [sample for sample in report.get("samples", []) if "picture" in sample],
            "widths": pictures.widths(report),
            "predictions": pictures.predictions(report),
            "curves": pictures.curves(report),
            "repairs": pictures.repairs(report),
            "sites": report["sites"],
            "phases": _phases(report),
            "settings": {name: setting_words(value) for name, value in report["recipe"].items() if value is not None},
            "unset": [name for name, value in report["recipe"].items() if value is None],
            "bench": bench_measurements(run.bench),
            "tasks": measurements(report.get("tasks")),
            "recoveries": recovery_measurements(report.get("recovery")),
            "compared": compared,
            "limits": limits(report, benched=run.bench is not None),
        }
        return _environment().get_template("report.html").render(context)
    except SnpError:
        raise
    except Exception as error:  # of values that no run writes: in Python, in the template, in matplotlib
        why = f"{type(error).__name__}: {reason(error)}"[:200]
        raise SnpError(
            f"report {run.name}: expected what `snp-llm prune` and `snp-llm bench` write; {REPORT} or {BENCH} cannot "
            f"be understood ({why}). Make it again."
        ) from error


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("snp_llm.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": percent, "brief": brief, "brief_count": brief_count}
    return environment


def tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The four numbers to be read first: name, value, and what it is compared with."""
    dense, pruned, sparsity = report["dense"], report["pruned"], report["sparsity"]
    before, after = dense["size"]["parameters"], pruned["size"]["parameters"]
    found = [
        ("sparsity of the blocks", percent(sparsity["achieved"]), f"{asked(report['recipe'], percent)} asked for"),
        ("parameters", brief_count(after), f"{change_words(after / before)} from {brief_count(before)}"),
    ]
    if pruned["perplexity"] is not None and dense["perplexity"]:
        ratio = pruned["perplexity"] / dense["perplexity"]
        found.append(
            ("perplexity", f"{pruned['perplexity']:,.2f}", f"{change_words(ratio)} from {dense['perplexity']:,.2f}")
        )
    if pruned.get("top1") is not None and dense.get("top1") is not None:
        points = f"{pruned['top1'] - dense['top1']:+.2f} points from {dense['top1']:,.2f}".replace(
            "-", "\N{MINUS SIGN}"
        )
        found.append(("top-1, %", f"{pruned['top1']:,.2f}", points))
    speed = speed_of(report)
    if speed_up_of(report) is not None:
        value, _, spread = speed.partition(" ")
        beside = f", {spread.strip('()')}" if spread else ""
        name = words_of(report).speed.split(",")[0].replace("prefill", "prefill speed")
        found.append((name, value, f"of the dense model's{beside}"))
    else:
        ratio = pruned["size"]["flops"] / dense["size"]["flops"]
        found.append((f"FLOPs {words_of(report).work}", change_words(ratio), f"of the dense model's; speed {speed}"))
    return found


def _phases(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    seconds = report["seconds"]
    whole = sum(seconds.values())
    return [
        {"name": name, "seconds": value, "share": value / whole if whole else 0.0} for name, value in seconds.items()
    ]
