"""Whether blocks can be made alike: widths that one plain config says of all of them. Chooses none."""

from collections.abc import Sequence

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.depth import gone_blocks, shortened
from snp_llm.models.outline import Widths, block_widths
from snp_llm.models.plain import plain_config
from snp_llm.models.segments import Segments
from snp_llm.models.size import counted_weights
from snp_llm.pruning.widths.costs import sparsity_costs
from snp_llm.pruning.widths.permitted import site_budgets
from snp_llm.recipe.recipe import ResolvedRecipe
from snp_llm.runtime.errors import SnpError


def check_uniform_at_all(anatomy: Anatomy, recipe: ResolvedRecipe) -> None:
    """Raises SnpError where no widths of a model that was pruned before are those of a uniform layout.

    An FFN has gone then, or heads that the plain config cannot say.

    If there are any, the fewest units that all sites of a kind may keep are such widths. Which blocks go, and pairs of
    experts and channels, are chosen later, and looked at then.
    """
    sites = anatomy.sites
    before = not isinstance(anatomy.blocks, Segments) and hasattr(anatomy.model.config, "pruned_structure")
    later = recipe.depth != "never" or any(site.nested for site in sites)
    if recipe.layout != "uniform" or later or not before:
        return
    costs = sparsity_costs(sites, sum(counted_weights(block, recipe.experts) for block in anatomy.blocks))
    budgets = site_budgets(anatomy, recipe, [None] * len(sites), costs.sites)
    fewest = {}
    for kind in {budget.kind for budget in budgets}:
        alike = [budget for budget in budgets if budget.kind == kind]
        common = set.intersection(*(set(budget.widths()) for budget in alike))
        fewest[kind] = min(common, default=min(budget.units for budget in alike))
    now = [block_widths(block) for block in anatomy.blocks]
    check_uniform(anatomy, [fewest[budget.kind] for budget in budgets], now)


def check_uniform(anatomy: Anatomy, widths: Sequence[int], now: Sequence[Widths] | None = None) -> None:
    """Raises SnpError if the widths are not one plain config's: in models whose blocks differed before.

    Args:
        anatomy: of the dense model.
        widths: of every site.
        now: those of every block that the error names; None: these.
    """
    family, sites, gone = anatomy.family, anatomy.sites, gone_blocks(anatomy.sites, widths)
    kept = [index for index in range(len(anatomy.blocks)) if index not in gone]
    chosen: list[Widths] = []
    for index in kept:
        here = [(site, width) for site, width in zip(sites, widths, strict=True) if site.block == index]
        has = block_widths(anatomy.blocks[index])  # an FFN that has gone is no site, and no FFN of a plain config
        heads = next((site.heads_after(width) for site, width in here if site.heads), has.heads)
        ffn = next((width for site, width in here if site.kind == "ffn"), has.ffn)
        experts = {site.whole: width for site, width in here if site.mixture is not None}
        chosen.append(Widths(heads, ffn, experts.get(False, has.channels), experts.get(True, has.experts)))
    if plain_config(shortened(anatomy.model, kept) if gone else anatomy.model, family, chosen) is None:
        raise SnpError(
            f"layout uniform: expected head counts and widths that one plain {family.name} config can hold in every "
            f"block, got {_said(now or chosen)}. The model was pruned before, block by block. Use --layout compact."
        )


def _said(widths: Sequence[Widths]) -> str:
    """The heads and widths of all blocks, each once."""
    heads = sorted({f"{h.query} query and {h.key_value} key-value heads" for h, *_ in widths if h})
    counts = zip(*((of.ffn, of.channels, of.experts) for of in widths), strict=True)
    ffn, channels, experts = (" and ".join(map(str, sorted({n for n in of if n is not None}))) for of in counts)
    said = [", ".join(heads) or "no heads"]
    if ffn or not experts:
        said.append(f"{ffn or 'no'} FFN channels")
    if experts:
        said.append(f"{experts} experts of {channels} channels")
    return ", and ".join(said)
