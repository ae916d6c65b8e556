"""Pruned blocks back in their dense shape, with zeros where units are gone: for comparisons, it saves nothing."""

from collections.abc import Sequence

import torch
from torch import nn

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import Anatomy
from snp_llm.models.offload import copy_unhooked, on_device
from snp_llm.models.surgery import pad_experts, pad_site
from snp_llm.pruning.finished import keep_block
from snp_llm.pruning.result import SiteResult
from snp_llm.runtime import ranks


def padded_blocks(
    anatomy: Anatomy, pruned: nn.ModuleList, results: Sequence[SiteResult], journal: Journal
) -> nn.ModuleList:
    """Copies of pruned blocks in the shape of the dense ones, one of each in memory at a time.

    Args:
        anatomy: of the dense model.
        pruned: blocks as they are; left so.
        results: what happened at every site.
        journal: of this phase; keeps the tensors where there is one on disk.
    """
    blocks = nn.ModuleList()
    for index, (old, new) in enumerate(zip(anatomy.blocks, pruned, strict=True)):
        with on_device(old, torch.device("cpu")), on_device(new, torch.device("cpu")):
            block = copy_unhooked(new)
            for result in results:
                if result.site.block == index and len(result.kept) < result.site.units:
                    pad = pad_site if result.site.mixture is None else pad_experts
                    pad(block, old, result.site, result.kept)
        blocks.append(keep_block(block, index, journal))
    journal.settle()
    ranks.wait()
    return blocks
