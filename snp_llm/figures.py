"""Pictures of widths, spectra, errors and perplexities: from plain numbers to a matplotlib figure, and that to SVG.

Knows no model and no report. Matplotlib is imported when the first figure is made: a command line starts without it.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

# The light theme's colours. In an SVG each becomes a CSS variable with this as its default, so that the page that it
# lies in can choose others for a dark one.
COLOURS = {
    "ink": "#1f2933",
    "soft": "#52606d",
    "grid": "#e1e6eb",
    "gone": "#d3dae2",
    "attention": "#2563a9",
    "ffn": "#c2560d",
    "cut": "#b3234b",
    "green": "#2f7d4f",
    "violet": "#8250a8",
    "olive": "#7a6a00",
    "teal": "#0f7f8c",
    "brown": "#8c564b",
    "pink": "#d1579b",
}
MARKERS = {"attention": "o", "ffn": "s"}
NAMES = {"attention": "attention", "ffn": "FFN"}
SIZE = (4.5, 2.9)  # inches: 324 points, so that a phone shows text at its own size
MARGINS = {"left": 0.19, "right": 0.985, "bottom": 0.19, "top": 0.97}
TOP_WITH_LABEL = 0.905  # where something is named above the axes
MOST_TICKS = 7
# Told apart by colour, and by hue-blind readers by marker and dash.
CYCLE = ("attention", "ffn", "green", "violet", "cut", "olive", "teal", "brown", "soft", "pink")
CYCLE_MARKERS = "osD^vP<>Xp"
MANY_DECADES = 1.8  # of a logarithmic axis that powers of ten alone are enough for
SMALL_LOSS = 0.1  # nats, below which they are counted in thousandths
SMALLEST_PLAIN = 1e-4  # that is written with its zeros
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class SitePoint:
    """A value at a site.

    Attributes:
        block: its index.
        kind: "attention" or "ffn".
        value: in the unit of the picture.
    """

    block: int
    kind: str
    value: float


@dataclass(frozen=True)
class Line:
    """One curve of a comparison.

    Attributes:
        label: in the legend.
        x, y: points, in the order in which they are joined.
        emphasised: drawn above the others, thick and in ink.
        names: written beside the points; none by default.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    emphasised: bool = False
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes of a comparison.

    Attributes:
        title, x_label, y_label: what they say; an empty title is none.
        lines: curves. A label has the same colour in every panel.
        baseline: y of a thin line across, for instance the dense model's.
        symlog: whether y is linear up to 1 and logarithmic above.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    baseline: float
    symlog: bool = False


def widths_figure(kind: str, kept: Sequence[int], before: Sequence[int], unit: str) -> "Figure":
    """Units kept at every block's site of one kind, before the faint bars of what there was.

    Args:
        kind: "attention" or "ffn".
        kept, before: units, by block.
        unit: what they are, in the plural.
    """
    with _style():
        figure, axes = _axes("block", f"{unit} kept")
        blocks = range(len(kept))
        axes.bar(blocks, before, color=COLOURS["gone"], width=0.8)
        axes.bar(blocks, kept, color=COLOURS[kind], width=0.8)
        axes.set_xlim(-0.7, len(kept) - 0.3)
        axes.set_ylim(0, 1.04 * max(before))
        for axis in (axes.xaxis, axes.yaxis):
            _whole_numbers(axis)
        return figure


def spectrum_figure(
    kind: str, channels: Sequence[int], variance: Sequence[float], spectrum: Sequence[float], cut: int
) -> "Figure":
    """Latent variances on a logarithmic axis: in the site's order, kept and removed, and sorted; the cut marked.

    Args:
        kind: "attention" or "ffn".
        channels: positions, ascending.
        variance: of the latents there, in order.
        spectrum: of the latents there when sorted, the largest first.
        cut: channels kept.
    """
    with _style():
        figure, axes = _axes("latent, in the site's order", "variance")
        for place, name, colour in ((True, "kept", COLOURS[kind]), (False, "removed", COLOURS["soft"])):
            points = [(c, v) for c, v in zip(channels, variance, strict=True) if (c <= cut) == place and v > 0]
            if points:
                axes.plot(*zip(*points, strict=True), ".", markersize=4.5, color=colour, label=name, zorder=3)
        ranked = [(c, v) for c, v in zip(channels, spectrum, strict=True) if v > 0]
        if ranked:
            axes.plot(*zip(*ranked, strict=True), "-", linewidth=1.2, color=COLOURS["ink"], label="sorted", zorder=2)
        _log_axis(axes.yaxis, *_room(v for v in (*variance, *spectrum) if v > 0))
        _mark_cut(figure, axes, cut, channels[-1])
        axes.legend(loc="best", handletextpad=0.5, borderaxespad=0.3, markerscale=2)
        return figure


def error_figure(
    kind: str, channels: Sequence[int], error: Sequence[float], cut: int, measured: float | None
) -> "Figure":
    """Relative reconstruction error of every width on a logarithmic axis, with the cut and what was measured there.

    Args:
        kind: "attention" or "ffn".
        channels: widths, ascending.
        error: relative squared output error when the first so many channels are kept.
        cut: channels kept.
        measured: the error of the weights that were written, if it is known.
    """
    with _style():
        figure, axes = _axes("channels kept", "relative squared error")
        points = [(0, 1.0), *((c, e) for c, e in zip(channels, error, strict=True) if e > 0)]
        axes.plot(*zip(*points, strict=True), "-", linewidth=1.8, color=COLOURS[kind], label="predicted", zorder=2)
        if measured is not None and measured > 0:
            axes.plot(
                [cut], [measured], "D", markersize=5.5, color=COLOURS["cut"], label="measured", linestyle="", zorder=3
            )
        _log_axis(axes.yaxis, *_room([e for _, e in points] + ([measured] if measured else [])))
        _mark_cut(figure, axes, cut, channels[-1])
        axes.legend(loc=_beside(cut, channels[-1]), handletextpad=0.5, borderaxespad=0.3)
        return figure


def prediction_figure(predicted: Sequence[SitePoint], measured: Sequence[SitePoint]) -> "Figure":
    """Measured against predicted reconstruction error, a point a site, logarithmic, with the diagonal.

    Args:
        predicted, measured: of the same sites; those that are not positive have no place on such an axis.
    """
    with _style():
        figure, axes = _axes("predicted error", "measured error")
        pairs = [(p, m) for p, m in zip(predicted, measured, strict=True) if p.value > 0 and m.value > 0]
        low, high = _room(point.value for pair in pairs for point in pair)
        axes.plot([low, high], [low, high], color=COLOURS["soft"], linewidth=0.9, zorder=1)
        for kind, marker in MARKERS.items():
            own = [(p.value, m.value) for p, m in pairs if p.kind == kind]
            if own:
                axes.plot(
                    *zip(*own, strict=True), marker, markersize=5, color=COLOURS[kind], label=NAMES[kind], alpha=0.85
                )
        for axis in (axes.xaxis, axes.yaxis):
            _log_axis(axis, low, high)
        axes.legend(loc="upper left", handletextpad=0.3, borderaxespad=0.3)
        return figure


def loss_figure(points: Sequence[SitePoint]) -> "Figure":
    """Predicted rise of the mean loss at every site, bars of attention and FFN side by side.

    Args:
        points: values in nats a token, at least one.
    """
    with _style():
        scale = 1000.0 if max(abs(p.value) for p in points) < SMALL_LOSS else 1.0  # ticks with few digits
        figure, axes = _axes("block", "rise of the loss, " + ("10⁻³ nats" if scale > 1 else "nats"))
        kinds = [kind for kind in MARKERS if any(p.kind == kind for p in points)]
        width = 0.8 / max(1, len(kinds))
        for place, kind in enumerate(kinds):
            own = [p for p in points if p.kind == kind]
            shift = (place - (len(kinds) - 1) / 2) * width
            axes.bar(
                [p.block + shift for p in own],
                [scale * p.value for p in own],
                width,
                color=COLOURS[kind],
                label=NAMES[kind],
            )
        axes.axhline(0, color=COLOURS["soft"], linewidth=0.8)
        axes.yaxis.set_major_formatter(_plain())
        _whole_numbers(axes.xaxis)
        _legend_above(figure, axes)
        return figure


def site_figure(points: Sequence[SitePoint], y_label: str, *, log: bool) -> "Figure":
    """A value at every site against its block, attention and FFN by marker and colour.

    Args:
        points: with `log`, those that are not positive are left out.
        y_label: what the value is.
        log: whether the axis is logarithmic.
    """
    with _style():
        figure, axes = _axes("block", y_label)
        for kind, marker in MARKERS.items():
            own = [(p.block, p.value) for p in points if p.kind == kind and (p.value > 0 or not log)]
            if own:
                x, y = zip(*own, strict=True)
                axes.plot(x, y, marker, markersize=5, linestyle="-", linewidth=0.8, color=COLOURS[kind], clip_on=False)
                axes.lines[-1].set_label(NAMES[kind])
        if log:
            _log_axis(axes.yaxis, *_room(p.value for p in points if p.value > 0))
        else:
            axes.set_ylim(0, max(1.0, 1.05 * max(p.value for p in points)))
        _whole_numbers(axes.xaxis)
        _legend_above(figure, axes)
        return figure


def quality_figure(panels: Sequence[Panel], *, size: tuple[float, float] = SIZE) -> "Figure":
    """Perplexity, or its rise, against what was removed or gained: one or more panels side by side, one legend.

    Args:
        panels: what to draw.
        size: inches of each panel.
    """
    from matplotlib.figure import Figure

    with _style():
        labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines if not line.emphasised))
        figure = Figure(figsize=(size[0] * len(panels), size[1]), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axes, panel in zip(all_axes, panels, strict=True):
            if panel.symlog:
                axes.set_yscale("symlog", linthresh=1.0)
                axes.yaxis.set_major_formatter(_plain())
            axes.axhline(panel.baseline, color=COLOURS["soft"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            for line in panel.lines:
                place = 0 if line.emphasised else labels.index(line.label)
                style = {"linewidth": 3.2, "color": COLOURS["ink"], "marker": "o", "zorder": 4}
                if not line.emphasised:
                    style = {
                        "linewidth": 1.4,
                        "color": COLOURS[CYCLE[place % len(CYCLE)]],
                        "marker": CYCLE_MARKERS[place % len(CYCLE_MARKERS)],
                        "linestyle": "--" if place % 2 else "-",
                        "markersize": 5,
                    }
                (handles[line.label],) = axes.plot(line.x, line.y, **style)
                for name, x, y in zip(line.names, line.x, line.y, strict=False):
                    axes.annotate(name, (x, y), (5, 5), textcoords="offset points", fontsize=9)
            axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
            if panel.title:
                axes.set_title(panel.title, loc="left", fontsize="medium", wrap=True)
        if len(handles) > 1:
            below = size[0] <= SIZE[0]
            figure.legend(
                list(handles.values()),
                list(handles),
                loc="outside lower center" if below else "outside right center",
                ncols=2 * len(panels) - 1 if below else 1,
            )
        return figure


def svg(figure: "Figure", label: str, key: str) -> str:
    """A figure as an SVG element for the inside of a page: themed by CSS variables, without a fetch, labelled.

    Args:
        figure: to draw; colours of `COLOURS` become variables `--figure-ink` and so on.
        label: what it shows, for those who do not see it.
        key: of letters and digits, unlike that of any other figure of the page: element ids begin with it.

    Returns:
        `<svg ...>...</svg>`, well-formed, all text in it escaped.
    """
    buffer = io.StringIO()
    with _style():
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(r"url\(#([^)]+)\)", buffer.getvalue()))
    used |= {element.get(f"{{{XLINK}}}href", "")[1:] for element in root.iter()}
    variables = {colour: f"var(--figure-{name}, {colour})" for name, colour in COLOURS.items()}
    for element in root.iter():
        for name, value in list(element.attrib.items()):
            if name == "id":
                if value in used:
                    element.set(name, f"{key}-{value}")
                else:
                    del element.attrib[name]
            elif name == f"{{{XLINK}}}href":
                element.set(name, f"#{key}-{value[1:]}")
            elif "url(#" in value:
                element.set(name, value.replace("url(#", f"url(#{key}-"))
            elif "#" in value:
                element.set(name, re.sub(r"#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), value))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{SVG}}}style":  # its `*` would mean the whole page
                parent.remove(child)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-label", label)
    for size in ("width", "height"):  # the page's style says how large, the viewBox of which shape
        root.set(size, root.get(size, "").replace("pt", ""))
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _style() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(
        {
            "font.size": 10,
            "axes.labelsize": 10,
            "axes.edgecolor": COLOURS["soft"],
            "axes.labelcolor": COLOURS["ink"],
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": COLOURS["grid"],
            "grid.linewidth": 0.8,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            "lines.solid_capstyle": "round",
            "text.color": COLOURS["ink"],
            "text.parse_math": False,  # a dollar sign in a name is one
            "xtick.color": COLOURS["soft"],
            "ytick.color": COLOURS["soft"],
            "xtick.labelcolor": COLOURS["ink"],
            "ytick.labelcolor": COLOURS["ink"],
            "svg.fonttype": "none",  # text stays text: found, read aloud, and in the page's own font
            "svg.hashsalt": "snp-llm",  # the same numbers, the same file
        }
    )


def _axes(x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    """Axes that start at the same place in every picture of a page; a layout engine would draw each one twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(**MARGINS)
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def _mark_cut(figure: "Figure", axes: "Axes", cut: int, whole: int) -> None:
    """A line at the cut, named above the axes where no curve can be in the way."""
    figure.subplots_adjust(top=TOP_WITH_LABEL)
    axes.set_xlim(0, whole * 1.015)
    _whole_numbers(axes.xaxis)
    axes.axvline(cut, color=COLOURS["cut"], linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    share = cut / whole
    align = "center" if 0.2 < share < 0.8 else "left" if share <= 0.2 else "right"
    axes.annotate(
        f"cut at {cut:,}",
        (cut, 1),
        (0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha=align,
        va="bottom",
        color=COLOURS["cut"],
        fontsize=9.5,
    )


def _beside(cut: int, whole: int) -> Literal["lower left", "upper right"]:
    """A corner that falling curves leave free, away from the cut's line."""
    return "lower left" if cut > whole / 2 else "upper right"


def _whole_numbers(axis: "XAxis | YAxis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True, min_n_ticks=1))
    axis.set_major_formatter(_counts())


def _legend_above(figure: "Figure", axes: "Axes") -> None:
    """Out of the way of whatever is drawn."""
    figure.subplots_adjust(top=TOP_WITH_LABEL)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, handletextpad=0.5, borderaxespad=0.1)


def _formatter(write: Callable[[float], str]) -> "FuncFormatter":
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _place: write(value))


def _counts() -> "FuncFormatter":
    return _formatter(lambda value: f"{value:,.0f}")


def _plain() -> "FuncFormatter":
    return _formatter(lambda value: f"{value:.3g}".replace("-", "\N{MINUS SIGN}"))


def _log_axis(axis: "XAxis | YAxis", low: float, high: float) -> None:
    """Logarithmic between two values, with at most seven ticks: at powers of ten, where there are too few at 2 and 5.

    Ticks say 10⁻³ in plain text: an SVG's own superscripts would be placed for one font only.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    few = math.log10(high / low) < MANY_DECADES

    def write(value: float) -> str:
        digit, exponent = f"{value:.0e}".split("e")
        power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
        return power if digit == "1" else f"{digit}·{power}"

    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_plain() if few and low > SMALLEST_PLAIN else _formatter(write))


def _room(values: Iterable[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    values = list(values)
    return min(values) / 1.6, max(values) * 1.6
