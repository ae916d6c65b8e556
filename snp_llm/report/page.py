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
from snp_llm.pruning.widths.plan import FARTHEST_FROM_BUDGET
from snp_llm.report import drawing, figures
from snp_llm.report.compare import compare
from snp_llm.report.figures import SitePoint
from snp_llm.report.parts import Picture, Table, as_picture
from snp_llm.report.read import Measurements, Run, model_name, read_run
from snp_llm.report.rows import summary
from snp_llm.report.words import (
    asked,
    brief,
    brief_count,
    change_words,
    count,
    flattened,
    percent,
    said_of,
    setting_words,
    title_of,
)
from snp_llm.runtime.errors import SnpError, reason
from snp_llm.runtime.files import write_text

KINDS = {"attention": "Attention", "ffn": "FFN"}


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
            "widths": [*_widths(report)],
            "predictions": [*_predictions(report)],
            "curves": [*_curves(report)],
            "repairs": [*_repairs(report)],
            "sites": report["sites"],
            "phases": _phases(report),
            "settings": {name: setting_words(value) for name, value in report["recipe"].items() if value is not None},
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
    if pruned["speed"] and dense["speed"]:
        found.append(
            ("prefill speed", f"\N{MULTIPLICATION SIGN}{pruned['speed'] / dense['speed']:.2f}", "of the dense model's")
        )
    else:
        ratio = pruned["size"]["flops"] / dense["size"]["flops"]
        found.append(("FLOPs a token", change_words(ratio), "of the dense model's; speed not measured"))
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
    if target is not None and abs(target - sparsity["achieved"]) > FARTHEST_FROM_BUDGET:
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
    return found


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
        found.append(as_picture(figure, title, note, f"{unit} kept in every block: {said}", f"widths{kind}"))
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
        found.append(as_picture(figure, "Reconstruction error", note, said, "prediction"))
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
            f"{worst.block} {drawing.NAMES[worst.kind]}"
        )
        found.append(as_picture(figures.loss_figure(losses), "Predicted loss", note, said, "loss"))
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
            as_picture(
                figures.spectrum_figure(kind, channels, curve["variance"], curve["spectrum"], cut),
                "Latent spectrum",
                "",
                f"variances of the {channels[-1]:,} latents of {site['site']}{spread}; cut at {cut:,}",
                f"spectrum{place}",
            ),
            as_picture(
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
    done = [s for s in report["sites"] if s["units_after"] < s["units_before"] or s.get("reference_weight")]
    for key, title, note, log in (
        ("dampening", "Dampening", "Of the repair, relative to each channel's energy, where there was one.", True),
        ("reference_weight", "Share of the drift repaired", "Of what earlier cuts had spoilt at this site.", False),
    ):
        points = _site_points(done, places, key)
        if points and any(p.value > 0 for p in points):
            values = [p.value for p in points]
            said = f"{title.lower()} at every site, from {min(values):.3g} to {max(values):.3g}"
            figure = figures.site_figure(points, title.split()[0].lower(), log=log)
            found.append(as_picture(figure, title, note, said, key.replace("_", "")))
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
            flat = [dict(flattened(row)) for row in inner]
            columns = list(dict.fromkeys(column for row in flat for column in row))
            rows = [[setting_words(row[column]) if column in row else "" for column in columns] for row in flat]
            tables.append(Table(title_of(path), [column.replace("_", " ") for column in columns], rows))
        else:
            lines.append((title_of(path), setting_words(inner)))

    walk(value, ())
    return Measurements(lines, tables)
