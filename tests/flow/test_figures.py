"""What is drawn is what was given: read back from matplotlib's artists and from the SVG."""

from xml.etree import ElementTree

import pytest

from snp_llm.report import drawing, figures
from snp_llm.report.figures import Line, Panel, SitePoint

CHANNELS = [1, 2, 4, 8]
FALLING = [1.0, 0.1, 0.01, 0.0]


def all_figures():
    points = [SitePoint(0, "attention", 0.1), SitePoint(0, "ffn", 0.3), SitePoint(1, "ffn", 0.0)]
    return {
        "widths": figures.widths_figure("ffn", [8, 5], [8, 8], "channels"),
        "spectrum": figures.spectrum_figure("ffn", CHANNELS, FALLING, FALLING, 4),
        "error": figures.error_figure("ffn", CHANNELS, FALLING, 4, 0.02),
        "prediction": figures.prediction_figure(points, points),
        "loss": figures.loss_figure(points),
        "site": figures.site_figure(points, "share", log=False),
        "log": figures.site_figure(points, "dampening", log=True),
        "quality": figures.quality_figure(
            [Panel("", "x", "y", [Line("a", [0, 1], [3, 4]), Line("b", [0, 1], [3, 5])], 3)]
        ),
    }


def points_of(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return [tuple(map(float, xy)) for xy in line.get_xydata()]


def test_widths_are_the_bars():
    (axes,) = figures.widths_figure("attention", [6, 5], [8, 9], "heads").axes
    assert [bar.get_height() for bar in axes.patches] == [8, 9, 6, 5]
    assert axes.get_ylabel() == "heads kept" and axes.get_ylim()[1] > 9


def test_the_spectrum_is_split_at_the_cut_and_zeros_have_no_place_on_its_axis():
    (axes,) = figures.spectrum_figure("ffn", CHANNELS, [0.1, 1.0, 0.01, 0.0], FALLING, 2).axes
    assert points_of(axes, "kept") == [(1, 0.1), (2, 1.0)] and points_of(axes, "removed") == [(4, 0.01)]
    assert points_of(axes, "sorted") == [(1, 1.0), (2, 0.1), (4, 0.01)]
    assert axes.get_yscale() == "log" and [t.get_text() for t in axes.texts] == ["cut at 2"]


def test_the_error_curve_starts_at_one_and_marks_what_was_measured():
    (axes,) = figures.error_figure("ffn", CHANNELS, FALLING, 4, 0.02).axes
    assert points_of(axes, "predicted") == [(0, 1.0), (1, 1.0), (2, 0.1), (4, 0.01)]
    assert points_of(axes, "measured") == [(4, 0.02)]


def test_the_diagonal_goes_from_corner_to_corner():
    points = [SitePoint(b, "ffn", v) for b, v in enumerate([1e-5, 1e-2, 0.0])]
    (axes,) = figures.prediction_figure(points, points[::-1][1:] + points[:1]).axes
    diagonal = axes.lines[0].get_xydata().tolist()
    low, high = axes.get_xlim()
    assert diagonal == [[low, low], [high, high]] and axes.get_ylim() == (low, high) and low < 1e-2 < high


def test_panels_share_a_legend_and_its_colours():
    lines = [Line("b", [0], [1]), Line("ours", [0], [1], emphasised=True), Line("a", [0], [2])]
    figure = figures.quality_figure([Panel("", "", "", lines, 0), Panel("", "", "", lines[::-1], 0)])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["b", "ours", "a"]
    first, second = ({line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes)
    assert {k: v for k, v in first.items() if not k.startswith("_")} == {
        k: v for k, v in second.items() if not k.startswith("_")
    }


@pytest.mark.parametrize(("low", "high"), [(1e-9, 1.0), (2.1e-3, 8e-3), (0.03, 3.0), (0.0999, 0.1001), (3e-6, 4e-6)])
def test_logarithmic_axes_have_labels_at_any_range(low, high):
    points = [SitePoint(0, "ffn", low), SitePoint(1, "ffn", high)]
    figure = figures.site_figure(points, "y", log=True)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    bottom, top = axes.get_ylim()
    labels = [t.get_text() for t in axes.get_yticklabels() if bottom <= t.get_position()[1] <= top]
    assert 1 <= len(labels) <= 8 and all(labels)


@pytest.mark.parametrize("name", all_figures())
def test_an_svg_is_themed_labelled_and_fetches_nothing(name):
    text = drawing.svg(all_figures()[name], 'a "label" & <b>', "one")
    root = ElementTree.fromstring(text)
    assert root.tag == f"{{{drawing.SVG}}}svg" and root.get("role") == "img"
    assert root.get("aria-label") == 'a "label" & <b>' and "<b>" not in text
    assert "var(--figure-ink, #1f2933)" in text
    assert not {"script", "image", "style", "metadata"} & {element.tag.split("}")[1] for element in root.iter()}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids)) and all(i.startswith("one-") for i in ids)
    for element in root.iter():
        for attribute, value in element.attrib.items():
            assert not value.startswith(("http", "//", "data:")), (attribute, value)
            if attribute.endswith("href"):
                assert value[1:] in ids
    colours = {c for c in drawing.COLOURS.values() if c in text.replace(f", {c})", "")}
    assert not colours  # none but as the default of its variable
    assert "fill: #ffffff" not in text  # no background of its own


def test_the_same_numbers_give_the_same_svg():
    first, second = (drawing.svg(all_figures()["spectrum"], "", "k") for _ in range(2))
    assert first == second


def test_text_in_a_figure_is_escaped():
    figure = figures.quality_figure([Panel("<script>alert(1)</script>", "x", "y", [Line("<i>", [0], [1])], 0)])
    assert "<script" not in drawing.svg(figure, "", "k")


def test_a_style_is_not_left_behind():
    import matplotlib

    before = dict(matplotlib.rcParams)
    drawing.svg(all_figures()["error"], "", "k")
    assert dict(matplotlib.rcParams) == before
