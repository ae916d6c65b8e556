"""How far blocks move the stream: the scores by which others drop blocks. Knows nothing of losses and budgets."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.blocks import frozen
from snp_llm.models.offload import on_device
from snp_llm.pruning.run import Run
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.pruning.stream import advance, capture
from snp_llm.runtime import ranks
from snp_llm.runtime.device import in_float64


def with_distances(curves: list[SiteCurves], anatomy: Anatomy, tokens: Tensor, run: Run) -> list[SiteCurves]:
    """The curves with distances at the sites of whole blocks, read in one pass over the dense model.

    "influence": of a block, `1 - mean_t cos(x_t, y_t)`, with x before it and y behind it (ShortGPT, arXiv 2403.03853).
    "angular": of n blocks in a row, `mean arccos(cos(x, y)) / pi` over the last tokens of windows, with x before the
    first and y behind the last of them (Gromov et al., arXiv 2403.17887).

    Args:
        curves: of every site.
        anatomy: of the dense model, with sites of blocks.
        tokens: calibration windows, (windows, T), int64.
        run: of this phase.
    """
    by, count = run.recipe.depth_score, len(anatomy.blocks)
    found = torch.zeros(count, count if by == "angular" else 1, dtype=torch.float64)
    stream, seen = capture(anatomy, tokens, run), list[Tensor]()
    with frozen(anatomy.model):
        for index, block in enumerate(anatomy.blocks):
            before = stream.hidden
            seen.append(_last(before))
            with on_device(block, run.clock.device), run.clock.phase("forward passes"):
                advance(block, stream.before(index))  # all of it there when the phase ends
            if by == "influence":
                found[index, 0] = (1 - in_float64(_cosines(before, stream.hidden))).mean(-1).sum()
    if by == "angular":
        seen.append(_last(stream.hidden))
        for first in range(count):
            for behind in range(first + 1, count + 1):
                angles = _cosines(seen[first], seen[behind]).double().clamp(-1, 1).acos() / torch.pi
                found[first, behind - first - 1] = angles.sum()
    ranks.add_up([found])
    found /= len(tokens)
    return [
        replace(curve, distances=found[site.block]) if site.whole_block else curve
        for site, curve in zip(anatomy.sites, curves, strict=True)
    ]


def _last(hidden: Tensor) -> Tensor:
    return hidden[:, -1].float().cpu()


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(one.float(), other.to(one.device).float(), dim=-1)
