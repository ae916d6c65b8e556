"""Widths for peers that say which units go but not how many at each site: uniform, FFNs alone, by block influence.

X. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853,
measures a block by how far it turns the stream. C.-H. Lin et al., "MoDeGPT", arXiv 2408.09632, makes widths of that:
what goes from block i is its share `softmax(-influence / temperature)_i` of all that goes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.linalg.allocation import SiteBudget, linear_costs, uniform
from snp_llm.models.blocks import capture_calls, run_block
from snp_llm.models.site import Site
from snp_llm.runtime.errors import SnpError

from .common import BATCH, Method, Prune, model_sites

FFN_MULTIPLE = 8  # FFN widths are multiples of this, as by default in the package
MOST_REMOVED = 0.95  # of a block's FFN, by block influence
TEMPERATURES = (0.02, 0.1, 0.5)  # from widths that differ much to nearly uniform ones

Widths = Callable[[float], list[int]]
"""From a sparsity, the share of all block-linear parameters that goes, to the units that each site keeps."""
Plan = Callable[[PreTrainedModel, Tensor], Widths]
"""From a dense model and calibration tokens (N, T) to its widths."""


def everywhere(dense: PreTrainedModel, _tokens: Tensor) -> Widths:
    """Heads and FFN channels alike lose the same share, in every block."""
    return partial(uniform_widths, model_sites(dense)[2])


def ffn_alone(dense: PreTrainedModel, _tokens: Tensor) -> Widths:
    """Heads stay; FFNs lose what the budget asks for, the same share in every block."""
    return partial(ffn_widths, model_sites(dense)[2])


def by_influence(dense: PreTrainedModel, tokens: Tensor, *, temperature: float) -> Widths:
    """Heads stay; FFNs lose the more the less their block turns the stream."""
    influence = block_influence(dense, tokens)
    return lambda sparsity: influence_widths(model_sites(dense)[2], sparsity, influence, temperature)


def uniform_widths(sites: Sequence[Site], sparsity: float) -> list[int]:
    """Units that each site keeps under the package's uniform allocation.

    Heads round to the nearest whole unit; FFN widths, in multiples of 8, take up the difference.
    """
    multiples = [FFN_MULTIPLE if site.kind == "ffn" else 1 for site in sites]
    budgets = [
        SiteBudget(site.kind, site.units, linear_costs(site.units, site.cost), multiple, minimum=multiple)
        for site, multiple in zip(sites, multiples, strict=True)
    ]
    return uniform(budgets, 1 - sparsity)


def ffn_widths(sites: Sequence[Site], sparsity: float) -> list[int]:
    """Units that each site keeps where heads stay, FFNs in multiples of 8.

    Raises:
        SnpError: FFNs do not have as many parameters as are to go.
    """
    ffns = [site for site in sites if site.kind == "ffn"]
    share = ffn_share(sites, sparsity)
    widths = iter(uniform_widths(ffns, share))
    return [next(widths) if site.kind == "ffn" else site.units for site in sites]


def ffn_share(sites: Sequence[Site], sparsity: float) -> float:
    """The share of FFN parameters that goes where heads stay."""
    ffn, all_of_them = (
        sum(s.parameters for s in sites if s.kind in kinds) for kinds in (("ffn",), ("ffn", "attention"))
    )
    if sparsity * all_of_them > MOST_REMOVED * ffn:
        raise SnpError(
            f"sparsity {sparsity:g}: expected at most {MOST_REMOVED * ffn / all_of_them:.3f} where heads stay, since "
            "FFNs have no more parameters. Choose another sparsity."
        )
    return sparsity * all_of_them / ffn


@torch.no_grad()
def block_influence(dense: PreTrainedModel, tokens: Tensor) -> Tensor:
    """`1 - mean of cos(input, output)` of each block over all tokens, (blocks,), float64."""
    _, blocks, _ = model_sites(dense)
    turned = torch.zeros(len(blocks), dtype=torch.float64)
    for batch in tokens.split(BATCH):
        hidden, calls = capture_calls(dense, blocks, batch)
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            out = run_block(block, hidden, call)
            cosine = torch.nn.functional.cosine_similarity(hidden.double(), out.double(), dim=-1)
            turned[index] += (1 - cosine).sum().cpu()
            hidden = out
    return turned / tokens.numel()


def influence_shares(influence: Tensor, temperature: float, mean: float) -> Tensor:
    """What each block loses, in proportion to `softmax(-influence / temperature)`, (blocks,), float64.

    No block loses more than 95 %; what that leaves over the others lose, in the same proportion.

    Args:
        influence: of each block, (blocks,).
        temperature: the higher, the more alike the blocks.
        mean: share that all of them lose together.
    """
    weights = torch.softmax(-influence.double() / temperature, 0).clamp(min=1e-9)
    low, high = 0.0, mean * len(weights) / float(weights.min())
    for _ in range(200):
        middle = (low + high) / 2
        enough = float((middle * weights).clamp(max=MOST_REMOVED).mean()) >= mean
        low, high = (low, middle) if enough else (middle, high)
    return (high * weights).clamp(max=MOST_REMOVED)


def influence_widths(sites: Sequence[Site], sparsity: float, influence: Tensor, temperature: float) -> list[int]:
    """FFN widths, in multiples of 8, where heads stay and blocks lose `influence_shares`.

    Args:
        sites: of all blocks.
        sparsity: share of all block-linear parameters that goes.
        influence: of each block, (blocks,).
        temperature: the higher, the more alike the blocks.
    """
    shares = influence_shares(influence, temperature, ffn_share(sites, sparsity))
    widths, owed = [], 0.0  # channels that rounding has kept too many, carried on to the next block
    for site in sites:
        if site.kind != "ffn":
            widths.append(site.units)
            continue
        exact = site.units * (1 - float(shares[site.block])) - owed
        width = min(site.units, max(FFN_MULTIPLE, FFN_MULTIPLE * round(exact / FFN_MULTIPLE)))
        owed = width - exact
        widths.append(width)
    return widths


PlannedPrepare = Callable[[PreTrainedModel, Tensor, int, Plan], Prune]

UNIFORM = {"": ("", everywhere), "-ffn": (", FFN alone", ffn_alone)}
INFLUENCE = {
    f"-influence-{t:g}": (f", FFN alone, widths by influence / {t:g}", partial(by_influence, temperature=t))
    for t in TEMPERATURES
}


def with_plans(
    name: str, title: str, reference: str, prepare: PlannedPrepare, plans: dict[str, tuple[str, Plan]] | None = None
) -> tuple[Method, ...]:
    """One method for each plan of its widths; heads and FFNs alike, and FFNs alone, unless others are given."""
    return tuple(
        Method(name + suffix, title + said, reference, partial(_planned, prepare, plan), title)
        for suffix, (said, plan) in (plans or UNIFORM).items()
    )


def _planned(prepare: PlannedPrepare, plan: Plan, dense: PreTrainedModel, tokens: Tensor, seed: int) -> Prune:
    return prepare(dense, tokens, seed, plan)
