"""Which widths a site may have: those that the layout can say and that kernels take. Chooses none."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from snp_llm.linalg.allocation import SiteBudget
from snp_llm.models.anatomy import Anatomy
from snp_llm.models.depth import gone_blocks
from snp_llm.models.experts import find_experts
from snp_llm.models.outline import ffn_kinds, part_widths, structure_of
from snp_llm.models.plain import expert_keys, ffn_key, uniform_widths
from snp_llm.models.projections import Projection, weight_of
from snp_llm.models.site import Site
from snp_llm.pruning.sensitivity import SiteCurves
from snp_llm.recipe.recipe import ResolvedRecipe

KERNEL_BYTES = 16  # that rows of stacked experts are a multiple of


def site_budgets(
    anatomy: Anatomy, recipe: ResolvedRecipe, curves: Sequence[SiteCurves | None], costs: Sequence[Tensor]
) -> list[SiteBudget]:
    """What the allocation may know of every site, and the widths that the layout lets it have.

    Args:
        anatomy: of the dense model.
        recipe: all settings.
        curves: what the visit to the dense model gave for each; None where there was none.
        costs: of each at every width.
    """
    sites = anatomy.sites
    pools = _pools(anatomy) if recipe.layout == "uniform" else [(site.kind, None) for site in sites]
    found = []
    for site, curve, cost, (kind, permitted) in zip(sites, curves, costs, pools, strict=True):
        multiple = recipe.round_to if site.heads is None and not site.whole else site.step
        if site.heads is not None:
            multiple = math.lcm(multiple, recipe.row // math.gcd(recipe.row, site.unit_size))
            permitted = permitted and tuple(width for width in permitted if width % multiple == 0)
        if site.mixture is not None and not site.whole:  # of other widths kernels for stacked experts make nothing
            multiple = math.lcm(multiple, KERNEL_BYTES // min(KERNEL_BYTES, anatomy.model.dtype.itemsize))
        if not site.prunable or saves_nothing(cost):
            permitted = ()
        elif site.whole and permitted is None:
            permitted = whole_widths(site)
        elif site.droppable and site.units == 1:
            permitted = (0,)
        fewest = 0 if site.droppable else multiple
        budget = SiteBudget(
            kind=kind,
            units=site.units,
            costs=cost,
            multiple=multiple,
            minimum=fewest if permitted is None else min(permitted, default=site.units),
            energy=None if curve is None else curve.energy,
            loss=None if curve is None else curve.loss,
            permitted=permitted,
        )
        rows = not site.whole and not site.whole_block and recipe.layout != "padded"
        found.append(_fitting(budget) if rows and site.units * site.unit_size % recipe.row else budget)
    return found


def saves_nothing(cost: Tensor) -> bool:
    """Whether a site costs the same at every width, as whole experts do of FLOPs: a token comes by as many."""
    return bool((cost == cost[-1]).all())


def _fitting(budget: SiteBudget) -> SiteBudget:
    """A budget without the width of all units, whose rows do not fit, if there is another one."""
    *others, _ = budget.widths()
    if not any(others):
        return budget
    most = others[-1]
    return replace(
        budget,
        units=most,
        costs=budget.costs[: most + 1],
        energy=None if budget.energy is None else budget.energy[: most + 1],
        loss=None if budget.loss is None else budget.loss[: most + 1],
        gone=float(budget.costs[-1] - budget.costs[most]),
    )


def rows_that_do_not_fit(anatomy: Anatomy, widths: Sequence[int], recipe: ResolvedRecipe) -> dict[str, int]:
    """Lengths of rows that are no whole number of what `--for` names, by the paths of their projections in a block.

    Where no width would help, since heads or channels stay or there is none that fits, and of what is no site.
    """
    found: dict[str, int] = {}
    gone = gone_blocks(anatomy.sites, widths)
    for index in (index for index in range(len(anatomy.blocks)) if index not in gone):
        block = anatomy.blocks[index]
        lengths = {path: weight_of(m).shape[1] for path, m in block.named_modules() if isinstance(m, Projection)}
        if (mixture := find_experts(block)) is not None:
            lengths[mixture.module] = mixture.channels
        for site, width in zip(anatomy.sites, widths, strict=True):
            if site.block == index and recipe.layout != "padded" and not site.whole:
                of = site.consumers if site.mixture is None else (site.mixture.module,)
                lengths |= dict.fromkeys(of, width * site.unit_size)
        found |= {path: length for path, length in lengths.items() if length % recipe.row}
    return found


def whole_widths(site: Site) -> tuple[int, ...]:
    """The numbers of experts that may be left: as many as a token comes by, and of every group if there are groups."""
    assert site.mixture is not None
    fewest = site.mixture.each * site.step
    return tuple(range(fewest, site.units, site.step))


def _pools(anatomy: Anatomy) -> list[tuple[str, tuple[int, ...] | None]]:
    """For every site a name that those share which one plain config gives the same width, and the widths it can say.

    None stands for any. FFNs of blocks and experts that all tokens share have widths of their own, and so have heads
    of two kinds of attention.
    """
    model, family, structure = anatomy.model, anatomy.family, structure_of(anatomy.model)
    kinds = ffn_kinds(structure)
    free = [ffn_key(model, family, kind.facts) is not None for kind in kinds]
    ffn_of = {block: number for number, kind in enumerate(kinds) for block in kind.blocks}
    mixtures = ffn_kinds(structure, "experts")
    keys_of = [expert_keys(model, kind.facts) for kind in mixtures]
    experts_of = {block: number for number, kind in enumerate(mixtures) for block in kind.blocks}
    heads_of = {block: part_widths(part)[0] for part in structure["parts"] for block in part["of"]}
    heads = sorted({found for found in heads_of.values() if found is not None})
    known: dict[tuple[int, int, int], tuple[int, ...]] = {}  # blocks are mostly alike
    found: list[tuple[str, tuple[int, ...] | None]] = []
    for site in anatomy.sites:
        if site.kind == "ffn":
            number = ffn_of[site.block]
            found.append((site.kind if len(kinds) == 1 else f"ffn {number}", None if free[number] else ()))
            continue
        if site.mixture is not None:
            number = experts_of[site.block]
            found.append((f"experts {number}", None if keys_of[number][site.whole] else ()))
            continue
        if site.heads is None:
            found.append((site.kind, None))
            continue
        shape = (site.units, site.step, site.unit_size)
        if shape not in known:
            known[shape] = uniform_widths(model, family, site)
        own = heads_of[site.block]
        found.append((site.kind if own is None or len(heads) == 1 else f"attention {heads.index(own)}", known[shape]))
    return found
