"""What a page is made of: tables and pictures. Knows not what they say."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from snp_llm.report import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def as_picture(figure: "Figure", title: str, note: str, said: str, key: str) -> Picture:
    """A figure drawn for a page.

    Args:
        figure: to draw.
        title: above it.
        note: below it.
        said: what it shows, for those who do not see it.
        key: unlike that of any other picture of the page.
    """
    return Picture(title, note, Markup(drawing.svg(figure, f"{title}: {said}.", key)))
