"""The figures of dense and pruned side by side, for the terminal."""

from rich.table import Table

from snp_llm.pruning.pipeline import PrunedModel
from snp_llm.report.facts import Measured


def closing_table(dense: Measured, after: Measured, pruned: PrunedModel) -> Table:
    """Dense and pruned side by side, with their ratio."""
    table = Table()
    for column in ("", "dense", "pruned", "ratio"):
        table.add_column(column, justify="left" if not column else "right")

    def row(name: str, before: float | None, now: float | None, form: str) -> None:
        if before is not None and now is not None:
            table.add_row(name, format(before, form), format(now, form), f"{now / before:.3f}")

    row("parameters", dense.size.parameters, after.size.parameters, ",")
    row("block-linear parameters", dense.size.block_linear, after.size.block_linear, ",")
    attention = [(r.site.heads, r.site.heads_after(len(r.kept))) for r in pruned.sites if r.site.heads]
    row("attention heads", sum(b.query for b, _ in attention), sum(a.query for _, a in attention), ",")
    if any(before.query != before.key_value for before, _ in attention):
        row("key-value heads", sum(b.key_value for b, _ in attention), sum(a.key_value for _, a in attention), ",")
    ffn = [r for r in pruned.sites if r.site.kind == "ffn"]
    row("FFN channels", sum(r.site.units for r in ffn), sum(len(r.kept) for r in ffn), ",")
    row("size on disk, MB", dense.disk / 1e6, after.disk / 1e6, ",.2f")
    row("MFLOPs a token", dense.size.flops / 1e6, after.size.flops / 1e6, ",.2f")
    row("perplexity", dense.perplexity, after.perplexity, ",.2f")
    row("prefill, tokens a second", dense.speed, after.speed, ",.0f")
    table.add_row("seconds spent pruning", "", f"{sum(pruned.seconds.values()):.1f}", "")
    for phase, seconds in pruned.seconds.items():
        table.add_row(f"  {phase}", "", f"{seconds:.1f}", "")
    return table
