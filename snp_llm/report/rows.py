"""The figures of dense and pruned side by side, once for the terminal, the model card and the page."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from rich.table import Table

from snp_llm.evaluate.turns import TOO_NOISY, speed_words


@dataclass(frozen=True)
class Row:
    """A figure of the dense and of the pruned model and their ratio, as text."""

    name: str
    dense: str
    pruned: str
    ratio: str


NOT_MEASURED = "not measured"

QUALITIES = {"perplexity": "perplexity", "top1": "top-1, %", "top5": "top-5, %"}  # keys of what models are measured by


@dataclass(frozen=True)
class Words:
    """What figures of a report are of, and what they do not say; by which key of theirs models are compared."""

    key: str
    work: str
    speed: str
    windows: str
    counted: str
    quality: str
    reading: str
    samples: str


TEXT = Words(
    "perplexity",
    "a token",
    "prefill, tokens a second",
    "calibration windows",
    "Sparsity counts the linear weights of the decoder blocks. Embeddings, norms and the LM head are not cut: the",
    "Perplexity is of one text. It says nothing certain of other domains, of other languages, or of tasks",
    "Speed is that of reading one window, on the machine that pruned",
    "Errors and curves are of the calibration tokens that the repair was computed from; on other text they are "
    "larger, the more so the fewer tokens there are for a site's channels.",
)
IMAGES = Words(
    "top1",
    "an image",
    "images a second",
    "calibration images",
    "Sparsity counts the weights of linear layers and convolutions in the blocks, no norms and biases: the",
    "Accuracy is of one set of images. It says nothing certain of others, or of tasks",
    "Speed is that of one batch of images, on the machine that pruned",
    "Errors and curves are of the calibration images that the repair was computed from; on others they are larger, "
    "the more so the fewer images there are for a site's channels.",
)


WORDS = {"text": TEXT, "images": IMAGES}  # by what a report calls the task; older ones do not


def words_of(report: Mapping[str, Any]) -> Words:
    """What the figures of a report are of, by its task."""
    return WORDS[report.get("task", "text")]


def what_went(report: Mapping[str, Any]) -> tuple[str, str]:
    """What was removed, and what was repaired, in the plural; of a run that removed nothing what could have gone."""
    sites = report["sites"]
    if not any(site["kind"] in ("attention", "ffn", "experts") for site in sites):
        return "channels", "layers that read them"
    blocks = {_block(site) for site in sites if site["kind"] == "block" and not site["units_after"]}
    gone = {
        _gone(site)
        for site in sites
        if site["units_after"] < site["units_before"] and (site["kind"] == "block" or _block(site) not in blocks)
    }
    first, *rest = [words for words in GONE if words in gone] or ["FFN neurons", "attention heads"]
    listed = f"{', '.join([first, *rest[:-1]])} and {rest[-1]}" if rest else first
    return listed, "out-projections"


# What may go of a decoder, in the order in which it is said.
GONE = ("blocks", "attentions", "FFNs", "experts", "channels of experts", "FFN neurons", "attention heads")


def _gone(site: Mapping[str, Any]) -> str:
    """One of these, by what a site lost."""
    if site["kind"] == "experts":
        return "experts" if site["unit"] == "experts" else "channels of experts"
    whole, part = {
        "block": ("blocks", "blocks"),
        "attention": ("attentions", "attention heads"),
        "ffn": ("FFNs", "FFN neurons"),
    }[site["kind"]]
    return part if site["units_after"] else whole


def _block(site: Mapping[str, Any]) -> str:
    """The block of a site, as in its name: `block 3` of `block 3 mlp.down_proj`."""
    return " ".join(site["site"].split()[:2])


def measured_by(report: Mapping[str, Any]) -> list[str]:
    """What the models of a report were measured by, in words."""
    return [name.split(",")[0] for key, name in QUALITIES.items() if report["pruned"].get(key) is not None]


def summary(report: Mapping[str, Any]) -> list[Row]:
    """Rows of dense and pruned side by side, from a report."""
    dense, pruned, words = report["dense"], report["pruned"], words_of(report)
    attention, ffn = ([s for s in report["sites"] if s["kind"] == kind] for kind in ("attention", "ffn"))
    heads = [s["heads"] for s in attention if s.get("heads")]
    query, key_value = (
        [sum(h[when][kind] for h in heads) for when in ("before", "after")] for kind in ("query", "key_value")
    )
    rows = [
        ("parameters", dense["size"]["parameters"], pruned["size"]["parameters"], ",.0f"),
        ("block-linear parameters", dense["size"]["block_linear"], pruned["size"]["block_linear"], ",.0f"),
    ]
    if heads:
        rows.append(("attention heads", *query, ",.0f"))
    elif attention:  # a report of an older version, which counts what went together
        rows.append((attention[0]["unit"], *_units(attention), ",.0f"))
    if key_value[0] != query[0]:
        rows.append(("key-value heads", *key_value, ",.0f"))
    if ffn:
        rows.append(("FFN channels", *_units(ffn), ",.0f"))
    experts = [s for s in report["sites"] if s["kind"] == "experts"]
    for unit in dict.fromkeys(s["unit"] for s in experts):
        rows.append((unit, *_units([s for s in experts if s["unit"] == unit]), ",.0f"))
    rows += [
        ("size on disk, MB", dense["disk"] / 1e6, pruned["disk"] / 1e6, ",.2f"),
        (f"MFLOPs {words.work}", dense["size"]["flops"] / 1e6, pruned["size"]["flops"] / 1e6, ",.2f"),
        *((name, dense.get(key), pruned.get(key), ",.2f") for key, name in QUALITIES.items()),
    ]
    found = [
        Row(name, format(before, form), format(after, form), f"{after / before:.3f}" if before else "")
        for name, before, after, form in rows
        if before is not None and after is not None
    ]
    if not measured_by(report):
        found.append(Row(QUALITIES[words.key], "", "", NOT_MEASURED))
    return [*found, speed_row(report)]


def speed_row(report: Mapping[str, Any]) -> Row:
    """Speeds of both with the spread of their ratio, where that was measured and says something."""
    name, speeds = words_of(report).speed, [report[which]["speed"] for which in ("dense", "pruned")]
    if not all(speeds):
        return Row(name, "", "", NOT_MEASURED)
    if (found := report.get("speed_up")) is None:  # a report of an older version
        return Row(name, f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", f"{speeds[1] / speeds[0]:.2f}")
    if (said := speed_words(**found)) == TOO_NOISY:
        return Row(name, "", "", said)
    return Row(name, f"{speeds[0]:,.0f}", f"{speeds[1]:,.0f}", said)


def _units(sites: list[dict[str, Any]]) -> tuple[int, int]:
    return sum(s["units_before"] for s in sites), sum(s["units_after"] for s in sites)


def closing_table(report: Mapping[str, Any]) -> Table:
    """The summary and the seconds of every phase, for the terminal."""
    table = Table()
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for row in summary(report):
        table.add_row(*astuple(row))
    table.add_row("seconds spent pruning", "", f"{sum(report['seconds'].values()):.1f}", "")
    for phase, seconds in report["seconds"].items():
        table.add_row(f"  {phase}", "", f"{seconds:.1f}", "")
    return table


def markdown_table(report: Mapping[str, Any]) -> list[str]:
    """The summary as lines of Markdown, for the model card."""
    rows = [f"| {' | '.join(astuple(row))} |" for row in summary(report)]
    return ["| | dense | pruned | ratio |", "|---|---:|---:|---:|", *rows]
