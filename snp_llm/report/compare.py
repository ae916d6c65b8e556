"""Several runs of one dense model side by side, on a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from snp_llm.recipe.groups import LINE
from snp_llm.report import figures
from snp_llm.report.figures import Line, Panel
from snp_llm.report.parts import Picture, as_picture
from snp_llm.report.read import SAME_PERPLEXITY, Run, model_name, speed_of, speed_up_of
from snp_llm.report.rows import QUALITIES, words_of
from snp_llm.report.words import percent, setting_words
from snp_llm.runtime.errors import SnpError


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Several runs of one dense model as a table and as pictures, what they are measured by against sparsity and speed.

    Raises:
        SnpError: they differ in the dense model or in the evaluation text.
    """
    first, key = runs[0], words_of(runs[0].report).key
    name = QUALITIES[key].split(",")[0]
    for run in runs[1:]:
        for what, value in (("dense model", _dense_model), ("evaluation text", lambda r: r.get("evaluation"))):
            expected, got = value(first.report), value(run.report)
            if expected != got and None not in (expected, got):
                raise SnpError(
                    f"report {run.name}: expected the {what} of {first.name}, {expected}; got {got}. Compare runs that "
                    "share both."
                )
        expected, got = (r.report["dense"].get(key) for r in (first, run))
        if None not in (expected, got) and abs(got - expected) > SAME_PERPLEXITY * expected:
            raise SnpError(
                f"report {run.name}: expected the dense model's {name} of {first.name}, {expected:.4g}; got "
                f"{got:.4g}. Compare runs that were evaluated alike."
            )
    ordered = sorted(runs, key=lambda r: r.report["sparsity"]["achieved"])
    rows = [
        {
            "name": run.name,
            "own": run is first,
            "sparsity": run.report["sparsity"]["achieved"],
            "parameters": run.report["pruned"]["size"]["parameters"],
            "quality": run.report["pruned"].get(key),
            "dense": run.report["dense"].get(key),
            "speed": speed_of(run.report),
        }
        for run in ordered
    ]
    return {"rows": rows, "quality": QUALITIES[key], "pictures": [*_comparisons(ordered, key)]}


def _dense_model(report: Mapping[str, Any]) -> str:
    return f"{model_name(report)} of {report['dense']['size']['parameters']:,} parameters"


def _comparisons(runs: Sequence[Run], quality: str) -> list[Picture]:
    both = [[r.report[which].get(quality) for which in ("dense", "pruned")] for r in runs]
    measured = [r.report for r, of in zip(runs, both, strict=True) if None not in of]
    if not measured:
        return []
    dense, title = measured[0]["dense"][quality], QUALITIES[quality]
    said_as = title.split(",")[0]
    speed, names = words_of(measured[0]).speed.split(",")[0], _methods(measured)
    found = []
    for key, x_label, value, start in (
        ("sparsity", "parameters removed, % of the block-linear ones", lambda r: 100 * r["sparsity"]["achieved"], 0.0),
        ("speed", f"{speed.replace('prefill', 'prefill speed')}, dense = 1", speed_up_of, 1.0),
    ):
        lines = []
        for name in dict.fromkeys(names):
            own = [r for r, n in zip(measured, names, strict=True) if n == name and value(r) is not None]
            points = [(start, dense), *((value(r), r["pruned"][quality]) for r in own)]
            removed = ["dense", *(percent(r["sparsity"]["achieved"]) for r in own)] if key == "speed" else []
            if own:
                x, y = zip(*points, strict=True)
                lines.append(Line(name or "pruned", x, y, names=removed))
        if not lines:
            continue
        figure = figures.quality_figure([Panel("", x_label, title, lines, dense)])
        points_said = "; ".join(
            f"{', '.join(f'{y:.2f} at {x:.3g}' for x, y in zip(line.x, line.y, strict=True))}" for line in lines
        )
        found.append(
            as_picture(
                figure,
                f"{said_as[0].upper()}{said_as[1:]} against {key}",
                f"Dashed: the dense model's, {dense:,.2f}.",
                f"{said_as} against {key}: {points_said}",
                f"compare{key}",
            )
        )
    return found


def _methods(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What sets each run apart besides its sparsity: settings that are not the same in all.

    How many steps of refinement a run has time for follows from its sparsity; they are told apart where there are none.
    """
    recipes = [{**r["recipe"], "refine": _refined(r["recipe"], reports)} for r in reports]
    varied = [
        name for name in recipes[0] if name in LINE and any(recipe.get(name) != recipes[0][name] for recipe in recipes)
    ]
    return [", ".join(f"{name.replace('_', ' ')} {setting_words(r.get(name))}" for name in varied[:3]) for r in recipes]


def _refined(recipe: Mapping[str, Any], reports: Sequence[Mapping[str, Any]]) -> Any:
    """The steps of a run where others of the same sparsity had others, else whether there were any."""
    alike = {r["recipe"].get("refine") for r in reports if r["recipe"].get("sparsity") == recipe.get("sparsity")}
    steps = recipe.get("refine")
    return steps if steps == "none" or len(alike) > 1 else "some"
