"""Seconds that a block takes at different widths, measured here or read from a file. Chooses nothing."""

import json
import logging
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from snp_llm.evaluate.turns import timed
from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.anatomy import Anatomy, embedding_rows
from snp_llm.models.blocks import capture_calls, run_block, run_without_blocks
from snp_llm.models.calls import BlockCall, move
from snp_llm.models.offload import copy_unhooked, on_device, rest_on_device
from snp_llm.models.site import Site, site_bias, site_weight
from snp_llm.models.surgery import drop_experts, narrow_experts, prune_site
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.runtime.device import compute_device
from snp_llm.runtime.errors import SnpError, reason
from snp_llm.runtime.json_files import read_json

log = logging.getLogger(__name__)

STEPS = 8  # widths measured of a site, besides all units

ROUNDS = 7  # each times every width once, so that drift of the machine falls on all alike; medians count


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward pass.

    Attributes:
        device, dtype, batch_size, seq_len: of the pass.
        whole: the dense model.
        sites: by `key` of a site, seconds of a whole block in which that site alone keeps so many units; of a site that
            is a whole block, none without it.
    """

    device: str
    dtype: str
    batch_size: int
    seq_len: int
    whole: float
    sites: dict[str, dict[int, float]]

    def seconds(self, site: Site) -> dict[int, float]:
        """Seconds of a block by the width of a site.

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
    """Name that all sites of one shape have in a table."""
    return f"{site.kind} of {site.units} {site.unit} of {site.unit_size}, {site.parameters:,} parameters"


def read_or_measure(anatomy: Anatomy, recipe: ResolvedRecipe) -> LatencyTable:
    """The table of `recipe.latency_table` if that file is there; else a new one, written there if it is named.

    One that was written where nothing went as a whole is written anew where something may.

    Raises:
        SnpError: the file is no such table.
    """
    file = None if recipe.latency_table is None else Path(recipe.latency_table)
    if file is not None and file.exists():
        table = read_table(file)
        if all(0 in table.sites.get(key(site), [0]) for site in anatomy.sites if site.droppable) and not (
            {key(site) for site in anatomy.sites if site.whole_block} - table.sites.keys()
        ):
            return table
        log.warning("latency table %s does not say what is saved without blocks: measured anew", file)
    table = measure_table(anatomy, recipe)
    if file is not None:
        try:
            file.write_text(json.dumps(asdict(table), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SnpError(f"--latency-table {file}: cannot be written ({reason(error)}).") from error
    return table


def check_table(recipe: Recipe) -> None:
    """Raises SnpError if `recipe.latency_table` could be neither read nor written, before anything is measured."""
    if recipe.latency_table is None:
        return
    file = Path(recipe.latency_table)
    if file.exists():
        read_table(file)
    elif not os.access(file.parent, os.W_OK):
        raise SnpError(
            f"--latency-table {file}: expected a folder there that can be written to. Make it, or name another."
        )


def read_table(file: Path) -> LatencyTable:
    """A table that `read_or_measure` wrote.

    Raises:
        SnpError: something else is there.
    """
    where = f"--latency-table {file}: expected a table written by an earlier run"
    values = read_json(file, where)
    try:
        values["sites"] = {
            name: {int(width): float(seconds) for width, seconds in widths.items()}
            for name, widths in values["sites"].items()
        }
        table = LatencyTable(**{**values, "whole": float(values["whole"])})
        times = [table.whole, *(s for widths in table.sites.values() for width, s in widths.items() if width)]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise SnpError(f"{where} ({reason(error)}).") from error
    if any(len(widths) < 2 or min(widths) < 0 for widths in table.sites.values()):
        raise SnpError(f"{where}, with at least two widths of every site.")
    if not all(0 < seconds < math.inf for seconds in times):
        raise SnpError(f"{where}, with seconds above 0, got {min(times):g} to {max(times):g}.")
    return table


def measure_table(anatomy: Anatomy, recipe: ResolvedRecipe) -> LatencyTable:
    """Times a block of every shape at `STEPS` widths of either site, prefilling one window, and the rest of the model.

    Args:
        anatomy: of the dense model.
        recipe: device, window length.
    """
    device, model, blocks = compute_device(recipe.device), anatomy.model, anatomy.blocks
    tokens = torch.randint(embedding_rows(model), (1, recipe.seq_len), generator=torch.Generator().manual_seed(0))
    hidden, calls = capture_calls(model, blocks, tokens)
    hidden = hidden.to(device)
    found: dict[str, dict[int, float]] = {}
    whole = 0.0
    dense_seconds: dict[tuple[object, ...], float] = {}
    for index, block in enumerate(blocks):
        here = [site for site in anatomy.sites_of(index) if not site.whole_block]
        beside = [(type(child), sum(p.numel() for p in child.parameters())) for child in block.children()]
        shape = (*(key(site) for site in here), *beside)  # mixers and experts take time, too
        if shape not in dense_seconds:
            with on_device(block, device):
                medians = _time_all(block, here, hidden, move(calls[index], device))
            units = {key(site): site.units for site in here}
            for (name, width), seconds in medians.items():
                if name in units:
                    found.setdefault(name, {})[width] = seconds
            seconds = min(s for (name, width), s in medians.items() if width == units.get(name, 0))
            dense_seconds[shape] = seconds
            found.update({key(s): {0: 0.0, 1: seconds} for s in anatomy.sites_of(index) if s.whole_block})
        whole += dense_seconds[shape]
    tokens = tokens.to(device)
    with rest_on_device(model, blocks, device):
        times = [timed(partial(run_without_blocks, model, blocks, tokens), device) for _ in range(ROUNDS)]
    whole += statistics.median(times)
    log.info("latency: %.4g s for one window of %d tokens, blocks timed at %d widths", whole, recipe.seq_len, STEPS)
    return LatencyTable(str(device), str(model.dtype).removeprefix("torch."), 1, recipe.seq_len, whole, found)


def _widths(site: Site) -> list[int]:
    """Widths to measure: equal steps, whole units of every group; none where all of them may go."""
    return sorted({0} if site.droppable else set()) + sorted(
        {max(site.step, round(site.units * i / STEPS / site.step) * site.step) for i in range(1, STEPS + 1)}
    )


def _time_all(block: nn.Module, sites: Sequence[Site], hidden: Tensor, call: BlockCall) -> dict[tuple[str, int], float]:
    """Median seconds of a block at every width of its sites, all taking turns.

    Args:
        block: with its weights, where `hidden` and what is in `call` are.
        sites: of the block.
        hidden: its input.
        call: its other arguments.

    Returns:
        By key and width of a site; of a block without sites as it is, under "" and 0.
    """
    turns: list[tuple[Site | None, int]] = [(s, width) for s in sites for width in sorted({s.units, *_widths(s)})]
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS + 1):
        for site, width in turns or [(None, 0)]:
            # Made anew each time: all of them at once are many blocks.
            narrow = block if site is None else _narrow(block, site, width)
            seconds = timed(partial(run_block, narrow, hidden, call), hidden.device)
            times.setdefault(("" if site is None else key(site), width), []).append(seconds)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}  # the first warms up


def _narrow(block: nn.Module, site: Site, width: int) -> nn.Module:
    """A copy of a block in which one site keeps its first units; what they compute does not matter here."""
    narrow = copy_unhooked(block)
    order = torch.arange(site.units)
    kept = (deal_from_groups(order, site.groups) if site.groups else order)[:width].sort().values
    if site.mixture is not None and site.whole:
        drop_experts(narrow, site.mixture, kept)
        return narrow
    if site.mixture is not None:
        narrow_experts(narrow, site, torch.arange(width)[:, None].expand(-1, site.mixture.count))
        return narrow
    weight = site_weight(narrow, site)
    columns = unit_channels(kept, site.unit_size).to(weight.device)
    prune_site(narrow, site, kept, weight[:, columns], site_bias(narrow, site))
    return narrow
