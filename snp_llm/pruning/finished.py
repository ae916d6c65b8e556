"""Blocks that are done: kept by a journal, and made again from what it says of them. Cuts nothing."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.offload import copy_unhooked, leave_on_disk, read_buffers
from snp_llm.models.site import Site
from snp_llm.models.surgery import NoBlock
from snp_llm.pruning.cut import cut_alike
from snp_llm.pruning.result import Curve, SiteResult
from snp_llm.runtime import ranks


def keep_block(block: nn.Module, index: int, journal: Journal, facts: Any = None) -> nn.Module:
    """A block that is done, which waits on disk from now on where the journal is there, with facts beside it."""
    if journal.folder is None:
        return block
    if ranks.rank() == 0:
        journal.put(index, dict(block.state_dict()), facts)
    leave_on_disk(block, journal.file(index))
    return block


def finished_block(block: nn.Module, results: Sequence[SiteResult], file: Path) -> nn.Module:
    """A block that an interrupted run has finished. What was done to it is done again, to tensors that are not there.

    Args:
        block: as it was before the cut; left as it is.
        results: what happened at its sites.
        file: that its tensors are in.
    """
    pruned = copy_unhooked(block)
    for result in results:
        if not result.site.whole_block:
            cut_alike(pruned, result)
        elif not len(result.kept):
            return NoBlock()
    read_buffers(pruned, file)
    leave_on_disk(pruned, file)
    return pruned


def facts_of(result: SiteResult) -> dict[str, Any]:
    """What happened at a site, ready for JSON; `result_of` reads it."""
    facts = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "site"}
    return {**facts, "kept": result.kept.tolist(), "curve": result.curve and asdict(result.curve)}


def result_of(site: Site, facts: dict[str, Any]) -> SiteResult:
    """What happened at a site, from what `facts_of` made of it."""
    kept, curve = torch.tensor(facts["kept"], dtype=torch.int64), facts["curve"]
    return SiteResult(site=site, **{**facts, "kept": kept, "curve": curve and Curve(**curve)})
