"""Numbers as people read them."""

from collections.abc import Sequence


def human_bytes(count: float) -> str:
    """Bytes for people: 1,234,567,890 as "1.23 GB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """A count for people: 1,234,567 as "1.23M", as budgets are written."""
    return _scaled(count, ("", "K", "M", "B", "T")).replace(" ", "")


def human_flops(count: float) -> str:
    """FLOPs for people: 1.2e15 as "1.2 PFLOPs"."""
    return _scaled(count / 1e6, ("MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs"))


def _scaled(count: float, units: Sequence[str]) -> str:
    """A number in the first of units, each a thousand of the one before, that leaves it three digits."""
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} {units[-1]}"


def human_time(seconds: float) -> str:
    """A time in seconds, minutes, hours or days, in two digits."""
    limits = ((90, 1, "seconds"), (5400, 60, "minutes"), (48 * 3600, 3600, "hours"), (float("inf"), 86_400, "days"))
    size, name = next((size, name) for limit, size, name in limits if seconds < limit)
    return f"{seconds / size:.2g} {name}" if seconds < 10 * size else f"{seconds / size:,.0f} {name}"
