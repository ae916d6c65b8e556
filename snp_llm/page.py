"""`report.html`: one page that shows what a run did, made from the JSON files of its folder alone.

Knows the report's keys, also where older ones lack some; loads no model. Whatever comes from a file is untrusted text:
it reaches the page through the template's escaping only.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from snp_llm import figures
from snp_llm.errors import SnpError, reason
from snp_llm.figures import Line, Panel, SitePoint
from snp_llm.json_files import read_json
from snp_llm.recipe import GOALS
from snp_llm.report import PAGE, REPORT, read_report, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BENCH = "bench.json"
KINDS = {"attention": "Attention", "ffn": "FFN"}
# Of a recipe, what two runs may differ in and still be points of one line.
NOT_A_METHOD = {"model", "output", "overwrite", "push_to_hub", "private", "trust_remote_code", "dry_run"}
NOT_A_METHOD |= {"sparsity", *GOALS, "latency_table", "device", "hidden_device", "batch_size"}
NOT_A_METHOD |= {"eval", "eval_dataset", "eval_split"}
SAME_PERPLEXITY = 0.01  # relative, of the dense model in runs that may be compared: dtypes and devices round
UNPRINTABLE = re.compile("[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f\\ud800-\\udfff\\ufffe\\uffff]")
LARGE = 1e4  # from here on without decimals
FARTHEST_FROM_TARGET = 0.005


@dataclass(frozen=True)
class Row:
    """A line of the summary: dense, pruned and their ratio, as text."""

    name: str
    dense: str
    pruned: str
    ratio: str


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """Rows of text below a line of column names."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Measurements:
    """Foreign JSON in a form that can be shown: lines of name and value, tables, and sentences."""

    lines: list[tuple[str, str]]
    tables: list[Table]
    sentences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One folder's files, read.

    Attributes:
        name: of the folder.
        report: of `prune_report.json`.
        bench: of `bench.json`, or None.
        has_code: whether the folder needs `trust_remote_code`.
    """

    name: str
    report: dict[str, Any]
    bench: Any
    has_code: bool


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
    """The same page, not written anywhere."""
    return make_page(read_run(folder), [read_run(other) for other in others])


def read_run(folder: Path) -> Run:
    """The files of a folder that the page is made of.

    Raises:
        SnpError: with the file's name and what is wrong with it.
    """
    if not (folder / REPORT).is_file():
        raise SnpError(f"report {folder}: expected an output of `snp-llm prune`, found no {REPORT} there.")
    report = _clean(read_report(folder))
    config = _read_json(folder / "config.json")
    name = folder.name or folder.absolute().name
    return Run(name, report, _read_json(folder / BENCH), has_code=isinstance(config, dict) and "auto_map" in config)


def _read_json(path: Path) -> Any:
    """None where there is no such file."""
    return _clean(read_json(path, f"{path}: expected JSON")) if path.exists() else None


def _clean(value: Any) -> Any:
    """JSON without what neither UTF-8 nor XML can hold: halves of characters, and control characters."""
    if isinstance(value, str):
        return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(inner) for key, inner in value.items()}
    return value


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
            "said": _said(report),
            "arguments": str(report.get("command", "")).split(),
            "quoted": json.dumps(f"path/to/{run.name}", ensure_ascii=False),
            "widths": [*_widths(report)],
            "predictions": [*_predictions(report)],
            "curves": [*_curves(report)],
            "repairs": [*_repairs(report)],
            "sites": report["sites"],
            "phases": _phases(report),
            "settings": {name: _setting(value) for name, value in report["recipe"].items() if value is not None},
            "unset": [name for name, value in report["recipe"].items() if value is None],
            "bench": bench_measurements(run.bench),
            "tasks": measurements(report.get("tasks")),
            "compared": compared,
            "limits": limits(run),
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
        loader=jinja2.PackageLoader("snp_llm"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count, "percent": percent, "brief": brief, "brief_count": brief_count}
    return environment


def model_name(report: Mapping[str, Any]) -> str:
    """The dense model's name without its folders."""
    return Path(os.path.normpath(str(report["recipe"]["model"]))).name


def asked(report: Mapping[str, Any]) -> str:
    """What the user wanted, from the recipe."""
    recipe = report["recipe"]
    for name, value in recipe.items():
        if value is not None and name in GOALS:
            return f"--{name.replace('_', '-')} {value}"
    own = [
        f"{percent(recipe[name])} of {kind}"
        for name, kind in (("head_sparsity", "attention"), ("ffn_sparsity", "FFN"))
        if recipe.get(name) is not None
    ]
    return " and ".join(own) or percent(recipe["sparsity"])


def summary(report: Mapping[str, Any]) -> list[Row]:
    """Dense and pruned side by side; what was not measured is left out."""
    dense, pruned = report["dense"], report["pruned"]
    sites = report["sites"]
    ffn = [s for s in sites if s["kind"] == "ffn"]
    heads = [s["heads"] for s in sites if s.get("heads")]
    rows = [
        ("parameters", dense["size"]["parameters"], pruned["size"]["parameters"], ",.0f"),
        ("block-linear parameters", dense["size"]["block_linear"], pruned["size"]["block_linear"], ",.0f"),
    ]
    for name, key in (("attention heads", "query"), ("key-value heads", "key_value")):
        before, after = (sum(h[when][key] for h in heads) for when in ("before", "after"))
        if heads and not (key == "key_value" and before == sum(h["before"]["query"] for h in heads)):
            rows.append((name, before, after, ",.0f"))
    if not heads:
        attention = [s for s in sites if s["kind"] == "attention"]
        unit = attention[0]["unit"] if attention else "heads"
        rows.append((unit, *(sum(s[f"units_{when}"] for s in attention) for when in ("before", "after")), ",.0f"))
    rows += [
        ("FFN channels", sum(s["units_before"] for s in ffn), sum(s["units_after"] for s in ffn), ",.0f"),
        ("size on disk, MB", dense["disk"] / 1e6, pruned["disk"] / 1e6, ",.2f"),
        ("MFLOPs a token", dense["size"]["flops"] / 1e6, pruned["size"]["flops"] / 1e6, ",.2f"),
        ("perplexity", dense["perplexity"], pruned["perplexity"], ",.2f"),
        ("prefill, tokens a second", dense["speed"], pruned["speed"], ",.0f"),
    ]
    return [
        Row(name, format(before, form), format(after, form), f"{after / before:.3f}" if before else "")
        for name, before, after, form in rows
        if before is not None and after is not None
    ]


def _said(report: Mapping[str, Any]) -> list[str]:
    """Sentences below the summary."""
    found = []
    if report.get("evaluation") is not None:
        found.append(f"Perplexity on {report['evaluation']}.")
    if report.get("predicted_perplexity_ratio") is not None:
        found.append(f"A ratio of {report['predicted_perplexity_ratio']:.3f} was predicted for calibration text.")
    if report.get("largest_logit_difference") is not None:
        difference = report["largest_logit_difference"]
        same = "are the same to the bit" if difference == 0 else f"differ by {difference:.1e} of the largest"
        found.append(f"Reloaded in a fresh process, its logits {same}.")
    return found


def tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The four numbers to be read first: name, value, and what it is compared with."""
    dense, pruned, sparsity = report["dense"], report["pruned"], report["sparsity"]
    before, after = dense["size"]["parameters"], pruned["size"]["parameters"]
    found = [
        ("sparsity of the blocks", percent(sparsity["achieved"]), f"{asked(report)} asked for"),
        ("parameters", brief_count(after), f"{_change(after / before)} from {brief_count(before)}"),
    ]
    if pruned["perplexity"] is not None and dense["perplexity"]:
        ratio = pruned["perplexity"] / dense["perplexity"]
        found.append(
            ("perplexity", f"{pruned['perplexity']:,.2f}", f"{_change(ratio)} from {dense['perplexity']:,.2f}")
        )
    if pruned["speed"] and dense["speed"]:
        found.append(
            ("prefill speed", f"\N{MULTIPLICATION SIGN}{pruned['speed'] / dense['speed']:.2f}", "of the dense model's")
        )
    else:
        ratio = pruned["size"]["flops"] / dense["size"]["flops"]
        found.append(("FLOPs a token", _change(ratio), "of the dense model's; speed not measured"))
    return found


def limits(run: Run) -> list[str]:
    """What the numbers do not say, in sentences."""
    report, recipe = run.report, run.report["recipe"]
    dense, pruned, sparsity = report["dense"], report["pruned"], report["sparsity"]
    found = [
        "Sparsity counts the linear weights of the decoder blocks. Embeddings, norms and the LM head are not cut: the "
        f"whole model has {percent(1 - pruned['size']['parameters'] / dense['size']['parameters'])} fewer parameters."
    ]
    target = sparsity.get("target")
    if target is not None and abs(target - sparsity["achieved"]) > FARTHEST_FROM_TARGET:
        found.append(
            f"{percent(target)} were asked for and {percent(sparsity['achieved'])} removed: heads come in whole "
            f"numbers and FFN widths in multiples of {recipe.get('round_to')}."
        )
    if recipe.get("layout") == "padded":
        found.append("The padded layout fills removed units up with zeros: it is for comparisons and saves nothing.")
    if pruned["perplexity"] is None:
        found.append("Perplexity was not measured.")
    else:
        found.append(
            "Perplexity is of one text. It says nothing certain of other domains, of other languages, or of tasks"
            + ("." if report.get("tasks") else ", none of which was measured.")
        )
    if pruned["speed"] is None:
        found.append("Speed was not measured.")
    elif run.bench is None:
        found.append(
            "Speed is that of reading one window, on the machine that pruned"
            + (f" ({report['device']})" if report.get("device") else "")
            + ". Generation, larger batches and other engines were not measured."
        )
    found.append(
        "Errors and curves are of the calibration tokens that the repair was computed from; on other text they are "
        "larger, the more so the fewer tokens there are for a site's channels."
    )
    if any(s.get("predicted_loss") is None for s in report["sites"]):
        found.append("No loss was predicted for some sites: that needs the loss gradients, which these settings spare.")
    if recipe.get("steps", 1) > 1:
        found.append(f"Of {recipe['steps']} rounds, errors and curves are those of the last.")
    return found


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """Several runs of one dense model as a table and as pictures, perplexity against sparsity and against speed.

    Raises:
        SnpError: they differ in the dense model or in the evaluation text.
    """
    first = runs[0]
    for run in runs[1:]:
        for what, value in (("dense model", _dense_model), ("evaluation text", lambda r: r.get("evaluation"))):
            expected, got = value(first.report), value(run.report)
            if expected != got and None not in (expected, got):
                raise SnpError(
                    f"report {run.name}: expected the {what} of {first.name}, {expected}; got {got}. Compare runs that "
                    "share both."
                )
        expected, got = (r.report["dense"]["perplexity"] for r in (first, run))
        if None not in (expected, got) and abs(got - expected) > SAME_PERPLEXITY * expected:
            raise SnpError(
                f"report {run.name}: expected the dense model's perplexity of {first.name}, {expected:.4g}; got "
                f"{got:.4g}. Compare runs that were evaluated alike."
            )
    ordered = sorted(runs, key=lambda r: r.report["sparsity"]["achieved"])
    rows = [
        {
            "name": run.name,
            "own": run is first,
            "sparsity": run.report["sparsity"]["achieved"],
            "parameters": run.report["pruned"]["size"]["parameters"],
            "perplexity": run.report["pruned"]["perplexity"],
            "dense": run.report["dense"]["perplexity"],
            "speed": _speed_up(run.report),
        }
        for run in ordered
    ]
    return {"rows": rows, "pictures": [*_comparisons(ordered)]}


def _dense_model(report: Mapping[str, Any]) -> str:
    return f"{model_name(report)} of {report['dense']['size']['parameters']:,} parameters"


def _comparisons(runs: Sequence[Run]) -> list[Picture]:
    measured = [r.report for r in runs if r.report["pruned"]["perplexity"] is not None]
    if not measured:
        return []
    dense = measured[0]["dense"]["perplexity"]
    names = _methods(measured)
    found = []
    for key, x_label, value, start in (
        ("sparsity", "parameters removed, % of the block-linear ones", lambda r: 100 * r["sparsity"]["achieved"], 0.0),
        ("speed", "prefill speed, dense = 1", _speed_up, 1.0),
    ):
        lines = []
        for name in dict.fromkeys(names):
            own = [r for r, n in zip(measured, names, strict=True) if n == name and value(r) is not None]
            points = [(start, dense), *((value(r), r["pruned"]["perplexity"]) for r in own)]
            removed = ["dense", *(percent(r["sparsity"]["achieved"]) for r in own)] if key == "speed" else []
            if own:
                x, y = zip(*points, strict=True)
                lines.append(Line(name or "pruned", x, y, names=removed))
        if not lines:
            continue
        figure = figures.quality_figure([Panel("", x_label, "perplexity", lines, dense)])
        points_said = "; ".join(
            f"{', '.join(f'{y:.2f} at {x:.3g}' for x, y in zip(line.x, line.y, strict=True))}" for line in lines
        )
        found.append(
            _picture(
                figure,
                f"Perplexity against {key}",
                f"Dashed: the dense model's, {dense:,.2f}.",
                f"perplexity against {key}: {points_said}",
                f"compare{key}",
            )
        )
    return found


def _methods(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """What sets each run apart besides its sparsity: settings that are not the same in all."""
    recipes = [r["recipe"] for r in reports]
    varied = [
        name
        for name in recipes[0]
        if name not in NOT_A_METHOD and any(recipe.get(name) != recipes[0][name] for recipe in recipes)
    ]
    return [", ".join(f"{name.replace('_', ' ')} {_setting(r.get(name))}" for name in varied[:3]) for r in recipes]


def _widths(report: Mapping[str, Any]) -> list[Picture]:
    found = []
    for kind, title in KINDS.items():
        sites = [s for s in report["sites"] if s["kind"] == kind]
        if not sites:
            continue
        kept, before = [s["units_after"] for s in sites], [s["units_before"] for s in sites]
        unit = sites[0]["unit"]
        note = f"{count(sum(kept))} of {count(sum(before))} {unit} kept; the faint bar is what there was."
        said = ", ".join(f"block {block} {k}" for block, k in enumerate(kept))
        figure = figures.widths_figure(kind, kept, before, unit)
        found.append(_picture(figure, title, note, f"{unit} kept in every block: {said}", f"widths{kind}"))
    return found


def _predictions(report: Mapping[str, Any]) -> list[Picture]:
    sites, found = report["sites"], []
    known = [(s, s.get("predicted_error"), s.get("relative_error")) for s in sites]
    known = [(s, p, m) for s, p, m in known if p is not None and m is not None]
    places = _blocks(sites)
    points = [
        (SitePoint(places[s["site"]], s["kind"], p), SitePoint(places[s["site"]], s["kind"], m)) for s, p, m in known
    ]
    positive = [pair for pair in points if pair[0].value > 0 and pair[1].value > 0]
    if positive:
        figure = figures.prediction_figure(*zip(*positive, strict=True))
        none = len(known) - len(positive)
        note = "Relative squared error of a site's output. On the line, measured is what was predicted."
        if none:
            note += f" {none} uncut site{'s have' if none > 1 else ' has'} no error and no place here."
        ratios = sorted(m.value / p.value for p, m in positive)
        said = (
            f"measured against predicted error of {len(positive)} sites; their ratio is {ratios[0]:.2f} to "
            f"{ratios[-1]:.2f}, {ratios[len(ratios) // 2]:.2f} in the middle"
        )
        found.append(_picture(figure, "Reconstruction error", note, said, "prediction"))
    losses = [
        SitePoint(places[s["site"]], s["kind"], s["predicted_loss"])
        for s in sites
        if s.get("predicted_loss") is not None
    ]
    if losses and any(p.value for p in losses):
        worst = max(losses, key=lambda p: p.value)
        total = sum(p.value for p in losses)
        note = f"Rise of the mean loss, in nats a token, on held-out calibration windows; {total:.4f} in all."
        said = (
            f"predicted rise of the loss at every site, {total:.4f} in all, the largest {worst.value:.4f} at block "
            f"{worst.block} {figures.NAMES[worst.kind]}"
        )
        found.append(_picture(figures.loss_figure(losses), "Predicted loss", note, said, "loss"))
    return found


def chosen_sites(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each kind the first, middle and last site that were cut, and the one of largest error; in their order."""
    found: list[dict[str, Any]] = []
    for kind in KINDS:
        own = [s for s in report["sites"] if s["kind"] == kind and s.get("curve")]
        own = [s for s in own if s["units_after"] < s["units_before"]]
        if own:
            worst = max(own, key=lambda s: s["relative_error"])
            names = {s["site"] for s in (own[0], own[len(own) // 2], own[-1], worst)}
            found += [s for s in own if s["site"] in names]
    return found


def _curves(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for place, site in enumerate(chosen_sites(report)):
        curve, kind = site["curve"], site["kind"]
        channels, cut = curve["channels"], curve["cut"]
        kept = f"{count(site['units_after'])} of {count(site['units_before'])} {site['unit']} kept"
        positive = [v for v in curve["spectrum"] if v > 0]
        spread = f", from {positive[0]:.2g} down to {positive[-1]:.2g}" if positive else ""
        pictures = [
            _picture(
                figures.spectrum_figure(kind, channels, curve["variance"], curve["spectrum"], cut),
                "Latent spectrum",
                "",
                f"variances of the {channels[-1]:,} latents of {site['site']}{spread}; cut at {cut:,}",
                f"spectrum{place}",
            ),
            _picture(
                figures.error_figure(kind, channels, curve["error"], cut, site["relative_error"]),
                "Error at every width",
                "",
                f"relative reconstruction error of {site['site']} against channels kept; "
                f"{site['predicted_error']:.2e} predicted at the cut, {site['relative_error']:.2e} measured",
                f"error{place}",
            ),
        ]
        found.append({"site": site["site"], "kept": kept, "error": site["relative_error"], "pictures": pictures})
    return found


def _repairs(report: Mapping[str, Any]) -> list[Picture]:
    places, found = _blocks(report["sites"]), []
    done = [s for s in report["sites"] if s["units_after"] < s["units_before"] or s.get("target_weight")]
    for key, title, note, log in (
        ("dampening", "Dampening", "Of the repair, relative to each channel's energy, where there was one.", True),
        ("target_weight", "Share of the drift repaired", "Of what earlier cuts had spoilt at this site.", False),
    ):
        points = _site_points(done, places, key)
        if points and any(p.value > 0 for p in points):
            values = [p.value for p in points]
            said = f"{title.lower()} at every site, from {min(values):.3g} to {max(values):.3g}"
            figure = figures.site_figure(points, title.split()[0].lower(), log=log)
            found.append(_picture(figure, title, note, said, key.replace("_", "")))
    return found


def _phases(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    seconds = report["seconds"]
    whole = sum(seconds.values())
    return [
        {"name": name, "seconds": value, "share": value / whole if whole else 0.0} for name, value in seconds.items()
    ]


def _blocks(sites: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The block of every site, by name: sites of a kind come in the order of their blocks."""
    seen: dict[str, int] = {}
    found = {}
    for site in sites:
        found[site["site"]] = seen.get(site["kind"], 0)
        seen[site["kind"]] = found[site["site"]] + 1
    return found


def _site_points(sites: Sequence[Mapping[str, Any]], places: Mapping[str, int], key: str) -> list[SitePoint]:
    """A value of every site that has it."""
    return [SitePoint(places[s["site"]], s["kind"], s[key]) for s in sites if s.get(key) is not None]


def _picture(figure: "Figure", title: str, note: str, said: str, key: str) -> Picture:
    return Picture(title, note, Markup(figures.svg(figure, f"{title}: {said}.", key)))


def _speed_up(report: Mapping[str, Any]) -> float | None:
    dense, pruned = report["dense"]["speed"], report["pruned"]["speed"]
    return pruned / dense if dense and pruned else None


def bench_measurements(value: Any) -> Measurements | None:
    """What `bench.json` holds, as a table of cells, dense beside pruned; whatever else has that name, key by key."""
    if not isinstance(value, dict) or not isinstance(cells := value.get("cells"), list):
        return measurements(value)
    rest = measurements({name: inner for name, inner in value.items() if name not in ("cells", "remarks")})
    columns = ["", "dense, tokens a second", "pruned", "times as fast", "quartiles", "FLOPs", "weights"]
    rows = []
    for c in cells:
        what, shape = c["cell"]["kind"], f"{c['cell']['batch']} \N{MULTIPLICATION SIGN} {count(c['cell']['length'])}"
        speeds = [count(c[model]["tokens_per_second"]) for model in ("dense", "pruned")]
        quartiles = f"{c['speedup_low']:.2f} to {c['speedup_high']:.2f}"
        ratios = [f"{c[ratio]:.3f}" for ratio in ("flops_ratio", "bytes_ratio")]
        rows.append([f"{what}, {shape}", *speeds, f"{c['speedup']:.2f}", quartiles, *ratios])
    caption = "Batch and prompt length; FLOPs and weights of the pruned model over those of the dense one"
    return Measurements(
        rest.lines if rest else [], [Table(caption, columns, rows)], [str(r) for r in value.get("remarks") or []]
    )


def measurements(value: Any) -> Measurements | None:
    """Whatever another command measured, without knowing its keys; None where there is nothing.

    Args:
        value: JSON. Lists of objects become tables, all else lines.
    """
    if not value:
        return None
    lines: list[tuple[str, str]] = []
    tables: list[Table] = []

    def walk(inner: Any, path: tuple[str, ...]) -> None:
        if isinstance(inner, dict):
            for key, below in inner.items():
                walk(below, (*path, str(key)))
        elif isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            flat = [dict(_flatten(row)) for row in inner]
            columns = list(dict.fromkeys(column for row in flat for column in row))
            rows = [[_setting(row[column]) if column in row else "" for column in columns] for row in flat]
            tables.append(Table(_title(path), [column.replace("_", " ") for column in columns], rows))
        else:
            lines.append((_title(path), _setting(inner)))

    walk(value, ())
    return Measurements(lines, tables)


def _title(path: Sequence[str]) -> str:
    return ", ".join(path).replace("_", " ")


def _flatten(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        name = f"{path}, {key}" if path else str(key)
        if isinstance(inner, dict):
            yield from _flatten(inner, name)
        else:
            yield name, inner


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < LARGE else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    return "-" if value is None else str(value)


def _change(ratio: float) -> str:
    """A ratio as what it changes: −23.0 %, +1.5 %."""
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def count(value: float) -> str:
    return f"{value:,.0f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace(".0 %", " %")


def brief(value: float | None) -> str:
    """Three digits, for tables: 0.0123, 1.2e-05."""
    return "" if value is None else "0" if value == 0 else f"{value:.3g}"


def brief_count(value: float) -> str:
    """1.29M, 6.74B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"
