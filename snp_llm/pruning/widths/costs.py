"""What widths cost, in the currency of a budget: parameters, bytes, FLOPs or seconds. Knows nothing of importance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snp_llm.linalg.allocation import linear_costs
from snp_llm.models.anatomy import Anatomy
from snp_llm.models.experts import of_experts
from snp_llm.models.projections import Projection, bias_of
from snp_llm.models.site import Site, consumers_of, site_weight, tensor_or_module
from snp_llm.models.size import ModelSize, linear_weights, model_size, routed_weights, stored_bytes, unit_flops
from snp_llm.models.task import task_of
from snp_llm.pruning.widths.latency import LatencyTable, read_or_measure
from snp_llm.recipe.budget import Budget
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.numbers import human_bytes, human_count


@dataclass(frozen=True)
class Costs:
    """Costs of a model whose sites may be cut.

    Attributes:
        unit: what is counted, in the plural.
        dense: what the whole model costs as it is.
        sites: what each site costs at every width, (units + 1,) each, up to a constant.
    """

    unit: str
    dense: float
    sites: Sequence[Tensor]

    def shown(self, *amounts: float) -> list[str]:
        """Amounts with their unit, as people read them; those that would look alike to the last digit."""
        found = [self._shown(amount) for amount in amounts]
        if self.unit != "seconds" and len(set(found)) < len(set(amounts)):
            return [f"{amount:,.0f} {self.unit}" for amount in amounts]
        return found

    def _shown(self, amount: float) -> str:
        if self.unit == "bytes":
            return human_bytes(amount)
        return f"{1000 * amount:,.4g} ms" if self.unit == "seconds" else f"{human_count(amount)} {self.unit}"


def sparsity_costs(sites: Sequence[Site], block_linear: int) -> Costs:
    """Costs in block-linear parameters, of which a model has so many: sparsity is a fraction of them."""
    costs = [linear_costs(site.units, site.cost, site.beside) for site in sites]
    return Costs("block-linear parameters", float(block_linear), costs)


def budget_costs(anatomy: Anatomy, budget: Budget, recipe: ResolvedRecipe) -> Costs:
    """Costs in the unit of a budget, of the whole model.

    Args:
        anatomy: of the dense model.
        budget: what to count.
        recipe: all settings; FLOPs and latency are those of a window of its length.

    Raises:
        SnpError: a latency table that does not fit the model.
    """
    blocks, sites, size = anatomy.blocks, anatomy.sites, model_size(anatomy.model, recipe.seq_len)
    if budget.kind == "latency":
        return latency_costs(sites, read_or_measure(anatomy, recipe))
    found = []
    for site in sites:
        block = blocks[site.block]
        parameters = site.cost + unit_values(block, site)
        attended = site.unit_size if site.heads is not None else 0
        weights = 0 if site.whole else site.cost * site.passes / site.parts  # that a token goes through
        if site.whole_block:
            parameters, weights = _beside(anatomy, site)
        item = site_weight(block, site).element_size()
        of_unit, beside = (
            {"params": p, "size": p * item, "flops": unit_flops(anatomy.model, w, a, recipe.seq_len)}[budget.kind]
            for p, w, a in ((parameters, weights, attended), (values_beside(block, site), site.beside, 0))
        )
        found.append(linear_costs(site.units, of_unit, beside))
    unit, dense = {
        "params": ("parameters", size.parameters),
        "size": ("bytes", stored_bytes(anatomy.model)),
        "flops": (f"FLOPs {task_of(anatomy.model.config).work}", size.flops),
    }[budget.kind]
    return Costs(unit, float(dense), found)


def _beside(anatomy: Anatomy, site: Site) -> tuple[int, float]:
    """Parameters of a block beside the units of its other sites, and linear weights that a token goes through."""
    block, inside = anatomy.blocks[site.block], [s for s in anatomy.sites_of(site.block) if not s.whole_block]
    parameters = sum(p.numel() for p in block.parameters())
    own = [s.units * (s.cost + unit_values(block, s)) + values_beside(block, s) for s in inside if not s.nested]
    weights: float = linear_weights(block) + routed_weights(anatomy.model, block)
    weights -= sum(s.units * s.cost * s.passes / s.parts + s.beside for s in inside if not s.whole)
    return parameters - sum(own), weights


def unit_values(block: nn.Module, site: Site) -> int:
    """Parameters of one unit beside linear weights: biases of its rows, and of norms and tensors that go along."""
    count = 0
    if site.mixture is not None:
        stacked, rows = site.mixture.stacked, dict(site.mixture.rows) if site.whole else {}
        named = dict(block.named_parameters())
        biases = [path for path, p in named.items() if p.dim() == 2 and (site.whole or path in stacked)]
        counted = {*(path for path in biases if of_experts(path)), *(path for path in rows if path in named)}
        return sum(named[path].numel() for path in counted) // site.units
    for producer in site.producers:
        found = tensor_or_module(block, producer.path)
        own = [found] if isinstance(found, Tensor) else [*found.parameters(recurse=False)]
        beside = [t for t in own if not isinstance(found, Projection) or t.dim() == 1]
        count += producer.per_unit * sum(tensor[0].numel() for tensor in beside if tensor.dim())
    return count


def values_beside(block: nn.Module, site: Site) -> int:
    """Parameters of an attention that may go that are no unit's, and go with all of them; its last bias stays."""
    if not site.droppable or site.heads is None or site.module is None:
        return 0
    module, (out,) = block.get_submodule(site.module), consumers_of(block, site)
    stays = 0 if (bias := bias_of(out)) is None else bias.numel()
    whole = sum(p.numel() for p in module.parameters()) - stays
    return whole - site.units * (site.cost + unit_values(block, site))


def latency_costs(sites: Sequence[Site], table: LatencyTable) -> Costs:
    """Costs in seconds, from a table of measured widths, with straight lines between them."""
    curves = []
    for site in sites:
        known = table.seconds(site)
        widths = torch.tensor(sorted(known), dtype=torch.float64)
        seconds = torch.tensor([known[int(w)] for w in widths], dtype=torch.float64).cummax(0).values
        curves.append(_interpolate(torch.arange(site.units + 1, dtype=torch.float64), widths, seconds))
    for number, site in enumerate(sites):
        if site.whole_block:  # what the block takes beside its other sites
            inside = [i for i, s in enumerate(sites) if s.block == site.block and not s.whole_block]
            gone = saved([sites[i] for i in inside], [curves[i] for i in inside], [0] * len(inside))
            beside = curves[number][1] - sum(gone)
            curves[number] = torch.stack([beside.new_zeros(()), beside.clamp(min=0)])
    return Costs("seconds", table.whole, curves)


def share_left(cost: Tensor) -> Tensor:
    """What a site of whole experts costs at every width, as a share of all of it, (units + 1,); 1 where that is none.

    So much of what their channels cost is left: of FLOPs, in which a token comes by as many experts, it is all.
    """
    return cost / cost[-1] if cost[-1] > 0 else torch.ones_like(cost)


def saved(sites: Sequence[Site], costs: Sequence[Tensor], widths: Sequence[int]) -> list[float]:
    """What goes at every site, in the unit of its costs; of channels of experts, at those that are left."""
    found, left = [], 1.0
    for site, cost, width in zip(sites, costs, widths, strict=True):
        found.append((left if site.nested else 1.0) * float(cost[-1] - cost[width]))
        left = float(share_left(cost)[width])
    return found


def removal_wanted(costs: Costs, budget: Budget) -> float:
    """What has to go, in the unit of the costs.

    Raises:
        SnpError: the model costs less already.
    """
    allowed = budget.amount * costs.dense if budget.relative else budget.amount
    if allowed > costs.dense:
        has, got = costs.shown(costs.dense, allowed)
        raise SnpError(f"--target-{budget.kind}: expected less than the model has, {has}; got {got}.")
    return costs.dense - allowed


def pruned_bytes(size: ModelSize, recipe: Recipe) -> int:
    """Bytes of a pruned model's weights, before anything is known but the budget; of the dense model's where that does
    not say.

    Args:
        size: of the dense model.
        recipe: the budget, and the layout.
    """
    item = size.bytes / size.parameters
    budget = recipe.budget
    if recipe.layout == "padded" or recipe.perplexity_increase is not None:
        return size.bytes
    if budget is None:
        both = [sparsity for kinds, sparsity in recipe.sparsities for _ in kinds]
        # FFN and heads with budgets of their own: the smaller of both, so as to err on the large side.
        return round(size.bytes - min(both) * size.block_linear * item)
    if budget.kind not in ("params", "size"):
        return size.bytes
    amount = budget.amount * (size.bytes if budget.relative else item if budget.kind == "params" else 1)
    return min(size.bytes, round(amount))


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Straight lines through the points (x, y), level outside of them."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    left = right - 1
    share = ((at - x[left]) / (x[right] - x[left])).clamp(0, 1)
    return y[left] + share * (y[right] - y[left])
