"""What the numbers of a run do not say, in sentences, once for the page and the card. Measures nothing."""

from collections.abc import Mapping
from typing import Any

from snp_llm.pruning.widths.plan import FARTHEST_FROM_BUDGET
from snp_llm.report.rows import measured_by, words_of
from snp_llm.report.words import percent


def limits(report: Mapping[str, Any], *, benched: bool = False) -> list[str]:
    """What the numbers of a report do not say, in sentences.

    Args:
        report: of a run.
        benched: whether whole models were timed besides, in several ways.
    """
    recipe, words = report["recipe"], words_of(report)
    dense, pruned, sparsity = report["dense"], report["pruned"], report["sparsity"]
    fewer = 1 - pruned["size"]["parameters"] / dense["size"]["parameters"]
    found = [f"{words.counted} whole model has {percent(fewer)} fewer parameters."]
    target = sparsity.get("target")
    if target is not None and abs(target - sparsity["achieved"]) > FARTHEST_FROM_BUDGET:
        steps = f"heads come in whole numbers and FFN widths in multiples of {recipe.get('round_to')}"
        if recipe.get("depth") == "only":
            steps = "blocks, attentions and FFNs go as a whole or not at all"
        steps += ", alike in every block" if recipe.get("layout") == "uniform" and recipe.get("depth") != "only" else ""
        found.append(f"{percent(target)} were asked for and {percent(sparsity['achieved'])} removed: {steps}.")
    if recipe.get("layout") == "padded":
        found.append("The padded layout fills removed units up with zeros: it is for comparisons and saves nothing.")
    if not measured_by(report):
        found.append(f"{words.quality.split()[0]} was not measured.")
    else:
        found.append(words.quality + ("." if report.get("tasks") else ", none of which was measured."))
    if pruned["speed"] is None:
        found.append("Speed was not measured.")
    elif not benched:
        found.append(
            words.reading
            + (f" ({report['device']})" if report.get("device") else "")
            + ". Generation, larger batches and other engines were not measured."
        )
    found.append(words.samples)
    if any(s.get("predicted_loss") is None for s in report["sites"]):
        found.append("No loss was predicted for some sites: that needs the loss gradients, which these settings spare.")
    return found
