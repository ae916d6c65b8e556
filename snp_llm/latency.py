"""Seconds that a block takes at different widths, measured here or read from a file. Chooses nothing."""

import copy
import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.device import compute_device, synchronize
from snp_llm.errors import SnpError
from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.blocks import BlockCall, capture_calls, on_device, rest_on_device, run_block, run_without_blocks
from snp_llm.models.families import Family, Site, embedding_rows, find_blocks, linear, weight_of
from snp_llm.models.surgery import prune_site
from snp_llm.recipe import Recipe

STEPS = 8  # widths measured of a site, besides all units
ROUNDS = 7  # each times every width once, so that drift of the machine falls on all alike; medians count

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward pass.

    Attributes:
        device, dtype, batch_size, seq_len: of the pass.
        whole: the dense model.
        sites: by `key` of a site, seconds of a whole block in which that site alone keeps so many units.
    """

    device: str
    dtype: str
    batch_size: int
    seq_len: int
    whole: float
    sites: dict[str, dict[int, float]]

    def seconds(self, site: Site) -> dict[int, float]:
        """Seconds by width.

        Raises:
            SnpError: the table has no site of this shape.
        """
        if key(site) not in self.sites:
            raise SnpError(
                f"latency table: has {', '.join(self.sites)}; expected {key(site)} as in {site.name}. It was measured "
                "on another model."
            )
        return self.sites[key(site)]


def key(site: Site) -> str:
    """Sites of one shape have one key."""
    return f"{site.kind} of {site.units} {site.unit} of {site.unit_size}, {site.parameters:,} parameters"


def read_or_measure(model: PreTrainedModel, family: Family, sites: Sequence[Site], recipe: Recipe) -> LatencyTable:
    """The table of `recipe.latency_table` if that file is there; else a new one, written there if it is named.

    Raises:
        SnpError: the file is no such table.
    """
    file = None if recipe.latency_table is None else Path(recipe.latency_table)
    if file is not None and file.exists():
        return read_table(file)
    table = measure_table(model, family, sites, recipe)
    if file is not None:
        file.write_text(json.dumps(asdict(table), indent=1) + "\n", encoding="utf-8")
    return table


def read_table(file: Path) -> LatencyTable:
    """A table that `read_or_measure` wrote."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values["sites"] = {
            name: {int(width): float(seconds) for width, seconds in widths.items()}
            for name, widths in values["sites"].items()
        }
        table = LatencyTable(**values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SnpError(f"--latency-table {file}: expected a table written by an earlier run ({error}).") from error
    if any(len(widths) < 2 for widths in table.sites.values()):
        raise SnpError(f"--latency-table {file}: expected at least two widths of every site.")
    return table


def measure_table(model: PreTrainedModel, family: Family, sites: Sequence[Site], recipe: Recipe) -> LatencyTable:
    """Times a block of every shape at `STEPS` widths of either site, prefilling one window, and the rest of the model.

    Args:
        model: dense model.
        family: its family.
        sites: of all its blocks.
        recipe: resolved: device, window length.
    """
    assert recipe.seq_len is not None
    device, blocks = compute_device(recipe.device), find_blocks(model, family)
    tokens = torch.randint(embedding_rows(model), (1, recipe.seq_len), generator=torch.Generator().manual_seed(0))
    hidden, calls = capture_calls(model, blocks, tokens)
    hidden = hidden.to(device)
    found: dict[str, dict[int, float]] = {}
    whole = 0.0
    dense_seconds: dict[tuple[str, str], float] = {}
    for index, block in enumerate(blocks):
        here = [s for s in sites if s.block == index]
        shape = (key(here[0]), key(here[1]))
        if shape not in dense_seconds:
            variants: dict[tuple[str, int], nn.Module] = {}
            for site in here:
                for width in sorted({site.units, *_widths(site)}):
                    variants[key(site), width] = _narrow(block, family, site, width)
            medians = _time_all({name: (variant, hidden, calls[index]) for name, variant in variants.items()}, device)
            for (name, width), seconds in medians.items():
                found.setdefault(name, {})[width] = seconds
            dense_seconds[shape] = min(medians[key(site), site.units] for site in here)
        whole += dense_seconds[shape]
    with rest_on_device(model, blocks, device):
        times = []
        for _ in range(ROUNDS):
            synchronize(device)
            start = time.perf_counter()
            run_without_blocks(model, blocks, tokens.to(device))
            synchronize(device)
            times.append(time.perf_counter() - start)
    whole += statistics.median(times)
    log.info("latency: %.4g s for one window of %d tokens, blocks timed at %d widths", whole, recipe.seq_len, STEPS)
    return LatencyTable(str(device), str(model.dtype).removeprefix("torch."), 1, recipe.seq_len, whole, found)


def _widths(site: Site) -> list[int]:
    """Widths to measure: equal steps, whole units of every group."""
    step = site.groups or 1
    return sorted({max(step, round(site.units * i / STEPS / step) * step) for i in range(1, STEPS + 1)})


def _narrow(block: nn.Module, family: Family, site: Site, width: int) -> nn.Module:
    """A copy of a block in which one site keeps its first units; what they compute does not matter here."""
    narrow = copy.deepcopy(block)
    order = torch.arange(site.units)
    kept = (deal_from_groups(order, site.groups) if site.groups else order)[:width].sort().values
    out = linear(narrow, site.out_projection)
    bias = None if out.bias is None else out.bias.detach()
    prune_site(narrow, family, site, kept, weight_of(out)[:, unit_channels(kept, site.unit_size)], bias)
    return narrow


def _time_all(
    passes: dict[tuple[str, int], tuple[nn.Module, Tensor, BlockCall]], device: torch.device
) -> dict[tuple[str, int], float]:
    """Median seconds of each (block, hidden states, call), all taking turns."""
    times: dict[tuple[str, int], list[float]] = {name: [] for name in passes}
    for _ in range(ROUNDS + 1):
        for name, (block, hidden, call) in passes.items():
            with on_device(block, device):
                synchronize(device)
                start = time.perf_counter()
                run_block(block, hidden, call)
                synchronize(device)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first warms up
