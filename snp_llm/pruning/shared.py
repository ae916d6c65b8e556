"""Units that several blocks share: their order before the first cut, their channels taken away after the last."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import Anatomy
from snp_llm.models.offload import copy_unhooked, on_device
from snp_llm.models.projections import Projection, weight_of
from snp_llm.models.site import Shared, tensor_or_module
from snp_llm.models.surgery import drop_shared
from snp_llm.pruning.finished import keep_block
from snp_llm.pruning.result import SiteResult
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks

DATA_FREE = "saw"  # an ordering that asks the rows which make units


def with_order(anatomy: Anatomy, curves: Sequence[SiteCurves | None], widths: Sequence[int], recipe: Recipe) -> Anatomy:
    """The anatomy with what is known of its sites before the first cut: one order of the units that several share, and
    which of them come after a cut.

    Args:
        anatomy: of the dense model.
        curves: of its sites.
        widths: units to keep at each.
        recipe: the ordering.
    """
    known: dict[Shared, tuple[int, ...]] = {}
    for shared, numbers in readers(anatomy).items():
        if recipe.ordering == DATA_FREE:
            known[shared] = tuple(weight_sums(anatomy, shared).argsort(descending=True, stable=True).tolist())
        elif len(numbers) > 1:
            together, _ = shared_order([found for n in numbers if (found := curves[n]) is not None])
            known[shared] = tuple(together.tolist())
    sites, drifts = [], False
    for (_, _), group in groupby(zip(anatomy.sites, widths, strict=True), lambda p: (p[0].block, p[0].stage)):
        here = list(group)
        for site, _ in here:
            order = known.get(site.shared, ()) if site.shared is not None else ()
            sites.append(replace(site, order=order, drifts=drifts and bool(site.norm)))
        drifts = drifts or any(width < site.units for site, width in here)
    return replace(anatomy, sites=tuple(sites))


def shared_order(curves: Sequence[SiteCurves]) -> tuple[Tensor, Tensor]:
    """One order of the units that several sites share, and the predicted rise of the loss at every width in it.

    What a unit costs where it is the last to go from a site stands in the site's own curve. These costs add up over
    sites, each made to fall along the site's order, so that sites which agree are followed.

    Returns:
        Units, most important first, (units,), int64, and (units + 1,), float64.
    """
    ranked: Tensor | None = None
    plain: Tensor | None = None
    for curve in curves:
        assert curve.order is not None and curve.rises is not None
        falling = curve.rises.flip(0).cummax(0).values.flip(0)
        own = torch.empty_like(curve.rises).index_copy(0, curve.order, curve.rises)
        scores = torch.empty_like(curve.rises).index_copy(0, curve.order, falling)
        ranked, plain = (scores, own) if ranked is None or plain is None else (ranked + scores, plain + own)
    assert ranked is not None and plain is not None
    order = ranked.argsort(descending=True, stable=True)
    lost = plain[order].flip(0).cumsum(0).flip(0)
    return order, torch.cat([lost, lost.new_zeros(1)]).cummin(0).values


def weight_sums(anatomy: Anatomy, shared: Shared) -> Tensor:
    """Sum of absolute weights in the rows of each unit, (units,), float64."""
    total: Tensor | None = None
    for index, producer in shared.producers:
        module = tensor_or_module(anatomy.blocks[index], producer.path)
        if isinstance(module, Projection):
            with on_device(anatomy.blocks[index], torch.device("cpu")):
                sums = weight_of(module).abs().sum(1, dtype=torch.float64)
            total = sums if total is None else total + sums
    assert total is not None
    return total


def readers(anatomy: Anatomy) -> dict[Shared, list[int]]:
    """By what is shared, the numbers of the sites that read it."""
    found: dict[Shared, list[int]] = {}
    for number, site in enumerate(anatomy.sites):
        if site.shared is not None:
            found.setdefault(site.shared, []).append(number)
    return found


def narrowed_blocks(
    anatomy: Anatomy, blocks: nn.ModuleList, results: Sequence[SiteResult], journal: Journal
) -> nn.ModuleList:
    """Pruned blocks without the channels that have gone from what they share; as they are where nothing is shared.

    Args:
        anatomy: of the dense model.
        blocks: pruned, with these channels in them.
        results: what happened at every site.
        journal: of this phase; keeps the tensors where there is one on disk.
    """
    kept = {r.site.shared: r.kept for r in results if r.site.shared is not None and len(r.kept) < r.site.units}
    if not kept:
        return blocks
    found = nn.ModuleList()
    for index, old in enumerate(blocks):
        with on_device(old, torch.device("cpu")):
            block = copy_unhooked(old)
            for shared, units in kept.items():
                here = [s for s in anatomy.sites if s.block == index and s.shared == shared]
                drop_shared(block, index, shared, here, units)
        found.append(keep_block(block, index, journal))
    journal.settle()
    ranks.wait()
    return found
