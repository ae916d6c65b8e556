"""The pictures of a page, drawn from a report, each with what it says in words. Knows the report's keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from snp_llm.report import drawing, figures
from snp_llm.report.figures import SitePoint
from snp_llm.report.parts import Picture, as_picture
from snp_llm.report.rows import words_of
from snp_llm.report.words import count

KINDS = {kind: f"{name[0].upper()}{name[1:]}" for kind, name in drawing.NAMES.items() if kind != "block"}

LAYERS = ("convolution", "stream", "linear")  # kinds of site of convolutional networks


def widths(report: Mapping[str, Any]) -> list[Picture]:
    """What every block keeps: of each kind of site, or of all sites of a convolutional network together."""
    layers = [s for s in report["sites"] if s["kind"] in LAYERS]
    if layers:
        return [segment_widths(layers)]
    found = []
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for site in sorted((s for s in report["sites"] if s["kind"] in KINDS), key=lambda s: [*KINDS].index(s["kind"])):
        groups.setdefault(_sort(site), []).append(site)
    for (kind, *rest), sites in groups.items():
        kept, before = [s["units_after"] for s in sites], [s["units_before"] for s in sites]
        unit = sites[0]["unit"]
        note = f"{count(sum(kept))} of {count(sum(before))} {unit} kept; the faint bar is what there was."
        said = ", ".join(f"block {block} {k}" for block, k in enumerate(kept))
        figure = figures.widths_figure(kind, kept, before, unit)
        name = "".join(["widths", kind, *rest]).replace(" ", "")
        found.append(as_picture(figure, KINDS[kind], note, f"{unit} kept in every block: {said}", name))
    return found


def segment_widths(sites: Sequence[Mapping[str, Any]]) -> Picture:
    """What is kept of the channels that each layer of a convolutional network reads, segment after segment."""
    rows = [(int(s["site"].split()[1]), s["kind"], s["units_after"], s["units_before"]) for s in sites]
    said = ", ".join(f"{s['site']} {s['units_after']}" for s in sites)
    note = (
        "Of what each layer reads; the faint bar is what there was. Layers that read one stream keep the same channels."
    )
    return as_picture(figures.segments_figure(rows), "Channels", note, f"channels kept: {said}", "widthssegments")


def predictions(report: Mapping[str, Any]) -> list[Picture]:
    """Predicted against measured errors of all sites, and their predicted losses, as far as they are known."""
    sites, found = report["sites"], []
    known = [(s, s.get("predicted_error"), s.get("relative_error")) for s in sites]
    known = [(s, p, m) for s, p, m in known if p is not None and m is not None and s["units_after"]]
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
        words = words_of(report)
        note = f"Rise of the mean loss, in nats {words.work}, on held-out {words.windows}; {total:.4f} in all."
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


def curves(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of some sites the latent spectrum and the error at every width: name, what is kept, error, and the pictures."""
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


def repairs(report: Mapping[str, Any]) -> list[Picture]:
    """What was chosen for the repair of every site, dampening and the share of the drift, and what refining gained."""
    places, found = _blocks(report["sites"]), []
    chosen = ("reference_weight", "refinement")
    done = [s for s in report["sites"] if s["units_after"] < s["units_before"] or any(s.get(name) for name in chosen)]
    for key, title, note, log in (
        ("dampening", "Dampening", "Of the repair, relative to each channel's energy, where there was one.", True),
        ("reference_weight", "Share of the drift repaired", "Of what earlier cuts had spoilt at this site.", False),
        ("refinement", "Refined blocks", "Error behind the block on held-out windows, over that before.", False),
    ):
        points = _site_points(done, places, key)
        if points and any(p.value > 0 for p in points):
            values = [p.value for p in points]
            said = f"{title.lower()} at every site, from {min(values):.3g} to {max(values):.3g}"
            figure = figures.site_figure(points, title.split()[0].lower(), log=log)
            found.append(as_picture(figure, title, note, said, key.replace("_", "")))
    return found


def _blocks(sites: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The block of every site, by name: sites of a sort come in the order of their blocks."""
    seen: dict[tuple[str, ...], int] = {}
    found = {}
    for site in sites:
        found[site["site"]] = seen.get(_sort(site), 0)
        seen[_sort(site)] = found[site["site"]] + 1
    return found


def _sort(site: Mapping[str, Any]) -> tuple[str, ...]:
    """What a block has one site of: a kind, of experts those that go and channels of the others apart."""
    return (site["kind"], site["unit"]) if site["kind"] == "experts" else (site["kind"],)


def _site_points(sites: Sequence[Mapping[str, Any]], places: Mapping[str, int], key: str) -> list[SitePoint]:
    """A value of every site that has it."""
    return [SitePoint(places[s["site"]], s["kind"], s[key]) for s in sites if s.get(key) is not None]
