"""Numbers and settings as a page says them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from snp_llm.evaluate.turns import TOO_NOISY, says_something
from snp_llm.recipe.budget import GOALS, read_budget
from snp_llm.recipe.checks import flag
from snp_llm.recipe.recipe import SPARSITY
from snp_llm.report.rows import words_of

LARGE = 1e4  # from here on without decimals


def said_of(report: Mapping[str, Any]) -> list[str]:
    """Sentences that stand below the summary of a report."""
    found = []
    if report.get("evaluation") is not None:
        found.append(f"{words_of(report).quality.split()[0]} on {report['evaluation']}.")
    if report.get("predicted_perplexity_ratio") is not None:
        found.append(f"A ratio of {report['predicted_perplexity_ratio']:.3f} was predicted for calibration text.")
    if report.get("largest_logit_difference") is not None:
        difference = report["largest_logit_difference"]
        same = "are the same to the bit" if difference == 0 else f"differ by {difference:.1e} of the largest"
        found.append(f"Reloaded in a fresh process, its logits {same}.")
    if (latency := latency_line(report)) is not None:
        found.append(f"{latency}.")
    return found


def latency_line(report: Mapping[str, Any]) -> str | None:
    """What a latency that was asked for came to where both models ran; None where none was, or none was measured.

    Widths follow from times of blocks one by one, before pruning: this is what became of them.
    """
    recipe, found = report["recipe"], report.get("speed_up")
    if (goal := recipe.get("target_latency")) is None or found is None:
        return None
    of = f"{flag('target_latency')} {goal}: measured afterwards, a window of {recipe['seq_len']:,} tokens"
    if not says_something(**found):
        return f"{of} was {TOO_NOISY}"
    if read_budget("latency", goal).relative:
        middle, low, high = (1 / found[name] for name in ("ratio", "high", "low"))
        took = f"{middle:.2f} ({low:.2f} to {high:.2f}) of the dense model's time"
    else:
        took = f"{1000 * recipe['seq_len'] / report['pruned']['speed']:,.4g} ms"
    return f"{of} took {took}"


def sample_lines(report: Mapping[str, Any]) -> list[str]:
    """The first sentence of a report that both models go on with, in three lines; none where there is none."""
    for sample in report.get("samples", []):
        if "prompt" in sample:
            ways = [" ".join(sample[name].split()) for name in ("dense", "pruned")]
            return [f"{sample['prompt']} ...", f"  dense:  ... {ways[0]}", f"  pruned: ... {ways[1]}"]
    return []


def title_of(path: Sequence[str]) -> str:
    """Title of a value in nested JSON, from the keys on the way to it."""
    return ", ".join(path).replace("_", " ")


def flattened(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested JSON objects, each with the keys on the way to it."""
    for key, inner in value.items():
        name = f"{path}, {key}" if path else str(key)
        if isinstance(inner, dict):
            yield from flattened(inner, name)
        else:
            yield name, inner


def setting_words(value: Any) -> str:
    """A setting's value, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < LARGE else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(setting_words, value))
    return "-" if value is None else str(value)


def change_words(ratio: float) -> str:
    """A ratio as what it changes: −23.0 %, +1.5 %."""
    return f"{100 * (ratio - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def count(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"


def percent(value: float) -> str:
    """A share in per cent, with one decimal where it has one."""
    return f"{100 * value:.1f} %".replace(".0 %", " %")


def brief(value: float | None) -> str:
    """A number in three digits, for tables: 0.0123, 1.2e-05."""
    return "" if value is None else "0" if value == 0 else f"{value:.3g}"


def brief_count(value: float) -> str:
    """A count in three digits: 1.29M, 6.74B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"


def asked(recipe: Mapping[str, Any], share: Callable[[float], str] = "{:g}".format) -> str:
    """The budget that a recipe's settings ask for, by name; `share` writes a sparsity."""
    for goal in GOALS:
        if recipe.get(goal) is not None:
            return f"{flag(goal)} {recipe[goal]}"
    common, *own = (recipe.get(name) for name in ("sparsity", "head_sparsity", "ffn_sparsity"))
    common = SPARSITY if common is None else common
    if own == [None, None]:
        return share(common)
    attention, ffn = (share(common if value is None else value) for value in own)
    return f"{attention} of attention and {ffn} of FFN"
