"""What lies between the ratio of FLOPs and that of times, in sentences."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from snp_llm.evaluate.cells import Comparison
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.models.layouts import KERNEL_MULTIPLE
from snp_llm.models.size import ModelSize

MODELS = ("dense", "pruned")


def remarks(results: Sequence[Comparison], models: Sequence[PreTrainedModel], sizes: Sequence[ModelSize]) -> list[str]:
    """Sentences on how far measured speed-ups are from what FLOPs promise, and why, as far as it can be told."""
    lines = []
    prefills = [r for r in results if r.cell.kind == "prefill"]
    decodes = [r for r in results if r.cell.kind == "decode"]
    linear = sizes[0].block_linear / sizes[1].block_linear
    one = max(prefills, key=lambda r: r.cell.tokens)
    reasons = []
    if one.flops_ratio < 0.98 * linear:
        reasons.append(
            f"block-linear parameters are {linear:.2f} times fewer, but attention scores and the head were not cut as "
            "much, which is in the FLOPs"
        )
    if odd := odd_widths(models[1]):
        reasons.append(f"{odd} of its FFN widths are no multiples of {KERNEL_MULTIPLE}, which kernels like less")
    if one.speedup < one.flops_ratio:
        reasons.append("norms, activation functions and memory traffic of the hidden states cost what they did")
    lines.append(
        f"Prefill of {one.cell.batch} x {one.cell.length:,} tokens is {one.speedup:.2f} times as fast, where FLOPs "
        f"alone would give {one.flops_ratio:.2f}: {_distance(one)}. {_sentence(reasons)}".strip()
    )
    if decodes:
        one = min(decodes, key=lambda r: (r.cell.batch, r.cell.length))
        lines.append(
            f"Decoding (batch {one.cell.batch} after {one.cell.length:,} tokens) is {one.speedup:.2f} times as fast, "
            f"where FLOPs alone would give {one.flops_ratio:.2f}: {_distance(one)}. In small batches it is bound by "
            f"reading weights, of which there are {one.bytes_ratio:.2f} times fewer bytes, head included, and by "
            "the overhead of many small kernels."
        )
    return lines


def _distance(result: Comparison) -> str:
    """Share of the promised gain that was measured, in words."""
    if result.flops_ratio <= 1:
        return "nothing to gain"
    if result.speedup <= 1:
        return "none of that gain"
    return f"{100 * (result.speedup - 1) / (result.flops_ratio - 1):.0f} % of that gain"


def _sentence(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    text = "; ".join(reasons)
    return f"{text[0].upper()}{text[1:]}."


def odd_widths(model: PreTrainedModel) -> int:
    """Blocks whose FFN width is no multiple of what kernels like."""
    family = find_family(model.config)
    sites = find_sites(find_blocks(model), family)
    return sum(site.kind == "ffn" and site.units % KERNEL_MULTIPLE > 0 for site in sites)
