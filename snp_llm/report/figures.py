"""Pictures of widths, spectra, errors and perplexities: from plain numbers to a matplotlib figure.

Knows no model and no report. Matplotlib is imported when the first figure is made: a command line starts without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snp_llm.report.drawing import (
    COLOURS,
    CYCLE,
    CYCLE_MARKERS,
    MARKERS,
    NAMES,
    SIZE,
    SMALL_LOSS,
    beside,
    draw_axes,
    drawing_style,
    legend_above,
    log_axis,
    make_room,
    mark_cut,
    plain_number,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SitePoint:
    """A value at a site.

    Attributes:
        block: its index.
        kind: of the site.
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
        kind: of these sites.
        kept, before: units, by block.
        unit: what they are, in the plural.
    """
    with drawing_style():
        figure, axes = draw_axes("block", f"{unit} kept")
        blocks = range(len(kept))
        axes.bar(blocks, before, color=COLOURS["gone"], width=0.8)
        axes.bar(blocks, kept, color=COLOURS[kind], width=0.8)
        axes.set_xlim(-0.7, len(kept) - 0.3)
        axes.set_ylim(0, 1.04 * max(before))
        for axis in (axes.xaxis, axes.yaxis):
            whole_numbers(axis)
        return figure


def segments_figure(sites: Sequence[tuple[int, str, int, int]]) -> "Figure":
    """Channels kept at every site of a convolutional network, segment after segment, before faint bars of what was.

    Args:
        sites: segment, kind, channels kept, and channels before, of each in the order of the network.
    """
    with drawing_style():
        figure, axes = draw_axes("segment", "channels kept")
        places = range(len(sites))
        axes.bar(places, [before for *_, before in sites], color=COLOURS["gone"], width=0.8)
        for kind in dict.fromkeys(kind for _, kind, *_ in sites):
            at = [place for place in places if sites[place][1] == kind]
            axes.bar(at, [sites[place][2] for place in at], color=COLOURS[kind], width=0.8, label=NAMES[kind])
        first = {segment: place for place, (segment, *_) in reversed([*enumerate(sites)])}
        axes.set_xticks([*first.values()], [str(segment) for segment in first])
        axes.set_xlim(-0.7, len(sites) - 0.3)
        axes.set_ylim(0, 1.04 * max(before for *_, before in sites))
        whole_numbers(axes.yaxis)
        legend_above(figure, axes)
        return figure


def spectrum_figure(
    kind: str, channels: Sequence[int], variance: Sequence[float], spectrum: Sequence[float], cut: int
) -> "Figure":
    """Latent variances on a logarithmic axis: in the site's order, kept and removed, and sorted; the cut marked.

    Args:
        kind: of the site.
        channels: positions, ascending.
        variance: of the latents there, in order.
        spectrum: of the latents there when sorted, the largest first.
        cut: channels kept.
    """
    with drawing_style():
        figure, axes = draw_axes("latent, in the site's order", "variance")
        for place, name, colour in ((True, "kept", COLOURS[kind]), (False, "removed", COLOURS["soft"])):
            points = [(c, v) for c, v in zip(channels, variance, strict=True) if (c <= cut) == place and v > 0]
            if points:
                axes.plot(*zip(*points, strict=True), ".", markersize=4.5, color=colour, label=name, zorder=3)
        ranked = [(c, v) for c, v in zip(channels, spectrum, strict=True) if v > 0]
        if ranked:
            axes.plot(*zip(*ranked, strict=True), "-", linewidth=1.2, color=COLOURS["ink"], label="sorted", zorder=2)
        log_axis(axes.yaxis, *make_room(v for v in (*variance, *spectrum) if v > 0))
        mark_cut(figure, axes, cut, channels[-1])
        axes.legend(loc="best", handletextpad=0.5, borderaxespad=0.3, markerscale=2)
        return figure


def error_figure(
    kind: str, channels: Sequence[int], error: Sequence[float], cut: int, measured: float | None
) -> "Figure":
    """Relative reconstruction error of every width on a logarithmic axis, with the cut and what was measured there.

    Args:
        kind: of the site.
        channels: widths, ascending.
        error: relative squared output error when the first so many channels are kept.
        cut: channels kept.
        measured: the error of the weights that were written, if it is known.
    """
    with drawing_style():
        figure, axes = draw_axes("channels kept", "relative squared error")
        points = [(0, 1.0), *((c, e) for c, e in zip(channels, error, strict=True) if e > 0)]
        axes.plot(*zip(*points, strict=True), "-", linewidth=1.8, color=COLOURS[kind], label="predicted", zorder=2)
        if measured is not None and measured > 0:
            axes.plot(
                [cut], [measured], "D", markersize=5.5, color=COLOURS["cut"], label="measured", linestyle="", zorder=3
            )
        log_axis(axes.yaxis, *make_room([e for _, e in points] + ([measured] if measured else [])))
        mark_cut(figure, axes, cut, channels[-1])
        axes.legend(loc=beside(cut, channels[-1]), handletextpad=0.5, borderaxespad=0.3)
        return figure


def prediction_figure(
    predicted: Sequence[SitePoint],
    measured: Sequence[SitePoint],
    names: tuple[str, str] = ("predicted error", "measured error"),
    size: tuple[float, float] = SIZE,
) -> "Figure":
    """Measured against predicted errors, a point a site, logarithmic, with the diagonal.

    Args:
        predicted, measured: of the same sites; those that are not positive have no place on such an axis.
        names: of both.
        size: inches.
    """
    with drawing_style():
        figure, axes = draw_axes(*names)
        figure.set_size_inches(*size)
        pairs = [(p, m) for p, m in zip(predicted, measured, strict=True) if p.value > 0 and m.value > 0]
        low, high = make_room(point.value for pair in pairs for point in pair)
        axes.plot([low, high], [low, high], color=COLOURS["soft"], linewidth=0.9, zorder=1)
        for kind, marker in MARKERS.items():
            own = [(p.value, m.value) for p, m in pairs if p.kind == kind]
            if own:
                axes.plot(
                    *zip(*own, strict=True), marker, markersize=5, color=COLOURS[kind], label=NAMES[kind], alpha=0.85
                )
        for axis in (axes.xaxis, axes.yaxis):
            log_axis(axis, low, high)
        axes.legend(loc="upper left", handletextpad=0.3, borderaxespad=0.3)
        return figure


def loss_figure(points: Sequence[SitePoint]) -> "Figure":
    """Predicted rise of the mean loss at every site, bars of each kind side by side.

    Args:
        points: values in nats a token, at least one.
    """
    with drawing_style():
        scale = 1000.0 if max(abs(p.value) for p in points) < SMALL_LOSS else 1.0  # ticks with few digits
        figure, axes = draw_axes("block", "rise of the loss, " + ("10⁻³ nats" if scale > 1 else "nats"))
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
        axes.yaxis.set_major_formatter(plain_number())
        whole_numbers(axes.xaxis)
        legend_above(figure, axes)
        return figure


def site_figure(points: Sequence[SitePoint], y_label: str, *, log: bool) -> "Figure":
    """A value at every site against its block, kinds told apart by marker and colour.

    Args:
        points: with `log`, those that are not positive are left out.
        y_label: what the value is.
        log: whether the axis is logarithmic.
    """
    with drawing_style():
        figure, axes = draw_axes("block", y_label)
        for kind, marker in MARKERS.items():
            own = [(p.block, p.value) for p in points if p.kind == kind and (p.value > 0 or not log)]
            if own:
                x, y = zip(*own, strict=True)
                axes.plot(x, y, marker, markersize=5, linestyle="-", linewidth=0.8, color=COLOURS[kind], clip_on=False)
                axes.lines[-1].set_label(NAMES[kind])
        if log:
            log_axis(axes.yaxis, *make_room(p.value for p in points if p.value > 0))
        else:
            axes.set_ylim(0, max(1.0, 1.05 * max(p.value for p in points)))
        whole_numbers(axes.xaxis)
        legend_above(figure, axes)
        return figure


def quality_figure(panels: Sequence[Panel], *, size: tuple[float, float] = SIZE) -> "Figure":
    """Perplexity, or its rise, against what was removed or gained: one or more panels side by side, one legend.

    Args:
        panels: what to draw.
        size: inches of each panel.
    """
    from matplotlib.figure import Figure

    with drawing_style():
        labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines if not line.emphasised))
        figure = Figure(figsize=(size[0] * len(panels), size[1]), layout="constrained")
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        handles: dict[str, Any] = {}
        for axes, panel in zip(all_axes, panels, strict=True):
            if panel.symlog:
                axes.set_yscale("symlog", linthresh=1.0)
                axes.yaxis.set_major_formatter(plain_number())
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
