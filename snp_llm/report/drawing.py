"""How a figure is drawn: axes, style, SVG. Knows not what is in it."""

import io
import math
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal
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
    "experts": "#5b6abf",
    "convolution": "#2c6e9b",
    "stream": "#8a5a00",
    "linear": "#3d7a3a",
    "block": "#6b5b4b",
    "cut": "#b3234b",
    "green": "#2f7d4f",
    "violet": "#8250a8",
    "olive": "#7a6a00",
    "teal": "#0f7f8c",
    "brown": "#8c564b",
    "pink": "#d1579b",
}

MARKERS = {"attention": "o", "ffn": "s", "experts": "X", "convolution": "D", "stream": "^", "linear": "v", "block": "P"}

NAMES = {
    "attention": "attention",
    "ffn": "FFN",
    "experts": "experts",
    "convolution": "convolutions",
    "stream": "streams",
    "linear": "linear layers",
    "block": "whole block",
}

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
    with drawing_style():
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


def drawing_style() -> AbstractContextManager[None]:
    """Style of every figure, for as long as one is made or drawn."""
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


def draw_axes(x_label: str, y_label: str) -> tuple["Figure", "Axes"]:
    """Axes that start at the same place in every picture of a page; a layout engine would draw each one twice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    figure.subplots_adjust(**MARGINS)
    axes = figure.subplots()
    axes.set(xlabel=x_label, ylabel=y_label)
    return figure, axes


def mark_cut(figure: "Figure", axes: "Axes", cut: int, whole: int) -> None:
    """A line at the cut, named above the axes where no curve can be in the way."""
    figure.subplots_adjust(top=TOP_WITH_LABEL)
    axes.set_xlim(0, whole * 1.015)
    whole_numbers(axes.xaxis)
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


def beside(cut: int, whole: int) -> Literal["lower left", "upper right"]:
    """A corner that falling curves leave free, away from the cut's line."""
    return "lower left" if cut > whole / 2 else "upper right"


def whole_numbers(axis: "XAxis | YAxis") -> None:
    """Puts ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(MOST_TICKS, integer=True, min_n_ticks=1))
    axis.set_major_formatter(_counts())


def legend_above(figure: "Figure", axes: "Axes") -> None:
    """A legend above the axes, out of the way of whatever is drawn."""
    figure.subplots_adjust(top=TOP_WITH_LABEL)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, handletextpad=0.5, borderaxespad=0.1)


def _formatter(write: Callable[[float], str]) -> "FuncFormatter":
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _place: write(value))


def _counts() -> "FuncFormatter":
    return _formatter(lambda value: f"{value:,.0f}")


def plain_number() -> "FuncFormatter":
    """Ticks in three digits, with a minus sign that is one."""
    return _formatter(lambda value: f"{value:.3g}".replace("-", "\N{MINUS SIGN}"))


def log_axis(axis: "XAxis | YAxis", low: float, high: float) -> None:
    """Makes an axis logarithmic, with at most seven ticks: at powers of ten, where there are too few at 2 and 5.

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
    axis.set_major_formatter(plain_number() if few and low > SMALLEST_PLAIN else _formatter(write))


def make_room(values: Iterable[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis around positive values."""
    values = list(values)
    return min(values) / 1.6, max(values) * 1.6
