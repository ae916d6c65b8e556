"""What the peers share: a method's signature, surgery, and the two ways to see the calibration text.

Module names and surgery are the package's; its orderings, allocations by curve and reconstruction are not used here.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.linalg.gram import Moments, add_moments, empty_moments
from snp_llm.linalg.units import unit_channels
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.blocks import capture_calls, input_of, run_block, watch_inputs
from snp_llm.models.families.decoders import find_family
from snp_llm.models.families.family import Family
from snp_llm.models.projections import projection, weight_of
from snp_llm.models.site import Site
from snp_llm.models.size import model_size
from snp_llm.models.structure import find_attention, find_ffn
from snp_llm.models.surgery import prune_site

BATCH = 8  # calibration windows at a time


@dataclass(frozen=True)
class Pruned:
    """A pruned model and the fraction of the dense one's block-linear parameters that is gone from it."""

    model: PreTrainedModel
    achieved: float


Prune = Callable[[float], Pruned]
"""From a sparsity to a pruned model."""
Prepare = Callable[[PreTrainedModel, Tensor, int], Prune]
"""From a dense model, calibration tokens (N, T) and a seed to `Prune`: what all sparsities share is computed here."""


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        name: on the command line.
        title: in tables.
        reference: authors, title, arXiv id.
        prepare: see `Prepare`. The dense model is left as it was.
        family: title of the method that this is a setting of; its own where there is only one.
    """

    name: str
    title: str
    reference: str
    prepare: Prepare
    family: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", self.family or self.title)

    def __call__(self, dense: PreTrainedModel, tokens: Tensor, sparsity: float, seed: int = 0) -> PreTrainedModel:
        """The pruned model, at one sparsity.

        Args:
            dense: model of a supported family.
            tokens: calibration windows, (N, T), int64.
            sparsity: fraction of the block-linear parameters to remove.
            seed: for what is drawn.
        """
        return self.prepare(dense, tokens, seed)(sparsity).model


def model_sites(model: PreTrainedModel) -> tuple[Family, nn.ModuleList, list[Site]]:
    """Family, decoder blocks and sites of a model; an attention unit is a KV group."""
    family = find_family(model.config)
    blocks = find_blocks(model)
    return family, blocks, find_sites(blocks, family)


def pruned(dense: PreTrainedModel, model: PreTrainedModel) -> Pruned:
    """The model with its achieved sparsity, counted from the linears that are left in its blocks."""
    return Pruned(model, 1 - model_size(model, 1).block_linear / model_size(dense, 1).block_linear)


def best_units(scores: Tensor, width: int) -> Tensor:
    """The `width` units with the highest scores, ascending, (width,); of equal ones the first."""
    return torch.argsort(scores, descending=True, stable=True)[:width].sort().values


@dataclass(frozen=True)
class Names:
    """Paths of a block's projections, and of its attention module."""

    attention: str
    qkv: tuple[str, ...]
    attention_out: str
    ffn_in: tuple[str, ...]
    ffn_out: str


def names_of(block: nn.Module) -> Names:
    """Paths in a block with one attention and one FFN."""
    attention, ffn = find_attention(block), find_ffn(block)
    assert attention is not None and ffn is not None
    qkv, ffn_in = (rows.path for rows in attention.rows), (path for path, _ in ffn.rows)
    return Names(attention.module, (*qkv,), attention.out, (*ffn_in,), ffn.out)


def keep_units(
    dense: PreTrainedModel, kept: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None
) -> PreTrainedModel:
    """A copy of the model with only the kept units of each site, out-projection weights as they were.

    Args:
        dense: left as it is.
        kept: kept units of each site, ascending.
        biases: new out-projection bias of each site, or None for the dense one. A projection without gets one.
    """
    model = copy.deepcopy(dense)
    _family, blocks, sites = model_sites(model)
    for index, (site, units) in enumerate(zip(sites, kept, strict=True)):
        if len(units) == site.units:
            continue
        block = blocks[site.block]
        out = projection(block, site.path)
        bias = out.bias if biases is None or biases[index] is None else biases[index]
        prune_site(block, site, units, weight_of(out)[:, unit_channels(units, site.unit_size)], bias)
    return model


@dataclass(frozen=True)
class ChannelStatistics:
    """Of a site's inputs on the dense model: mean and mean square of each channel, (n,), float64, and tokens seen."""

    mean: Tensor
    square: Tensor
    tokens: int


@torch.no_grad()
def channel_statistics(dense: PreTrainedModel, tokens: Tensor) -> list[ChannelStatistics]:
    """Mean and mean square of every channel at every site of the dense model, in one pass."""
    _, blocks, sites = model_sites(dense)
    outs = [projection(blocks[site.block], site.path) for site in sites]
    sums = [torch.zeros(2, weight_of(out).shape[1], dtype=torch.float64) for out in outs]

    def add(total: Tensor, inputs: Tensor) -> None:
        x = inputs.reshape(-1, inputs.shape[-1]).double().to(total.device)
        total += torch.stack([x.sum(0), x.square().sum(0)])

    watchers = {out: lambda x, total=total: add(total, x) for out, total in zip(outs, sums, strict=True)}
    with watch_inputs(watchers):
        for batch in tokens.split(BATCH):
            dense.base_model(batch.to(dense.device), use_cache=False)
    count = tokens.numel()
    return [ChannelStatistics(total[0] / count, total[1] / count, count) for total in sums]


@dataclass(frozen=True)
class SiteProblem:
    """A site on its turn: its dense weights, and moments of what the pruned blocks before it make arrive there.

    Attributes:
        block: that the site is in, its FFN still dense where the site is attention.
        family, site: of the block.
        moments: of the out-projection's inputs.
        W: out-projection weight, (d_out, n), float64.
        bias: its bias, (d_out,), float64, or None.
        width: units to keep.
    """

    block: nn.Module
    family: Family
    site: Site
    moments: Moments
    W: Tensor
    bias: Tensor | None
    width: int


@dataclass(frozen=True)
class Cut:
    """Kept units, ascending, (u,), and the out-projection's weight (d_out, u * unit_size) and bias on them."""

    kept: Tensor
    weight: Tensor
    bias: Tensor | None


def prune_sequentially(
    dense: PreTrainedModel, tokens: Tensor, widths: Sequence[int], cut: Callable[[SiteProblem], Cut]
) -> PreTrainedModel:
    """Cuts site after site, attention before FFN, each on the activations of the model as pruned so far.

    Args:
        dense: left as it is.
        tokens: calibration windows, (N, T).
        widths: units that each site keeps.
        cut: what to do at a site.
    """
    model = copy.deepcopy(dense)
    family, blocks, sites = model_sites(model)
    captured = [capture_calls(model, blocks, batch) for batch in tokens.split(BATCH)]
    hidden = [first for first, _ in captured]  # one (batch, T, d) a batch
    for index, block in enumerate(blocks):
        calls = [call[index] for _, call in captured]
        for at in (2 * index, 2 * index + 1):
            site, width = sites[at], widths[at]
            if width == site.units:
                continue
            out = projection(block, site.path)
            moments = empty_moments(weight_of(out).shape[1], out.weight.dtype, out.weight.device)
            for batch, call in zip(hidden, calls, strict=True):
                moments = add_moments(moments, input_of(out, block, batch, call))
            bias = None if out.bias is None else out.bias.detach().double()
            result = cut(SiteProblem(block, family, site, moments, weight_of(out).double(), bias, width))
            prune_site(block, site, result.kept, result.weight, result.bias)
        hidden = [run_block(block, batch, call) for batch, call in zip(hidden, calls, strict=True)]
    return model


def least_squares(W: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """`W' = W[:, K] + W[:, P] G[P, K] G[K, K]^-1`, which minimises `tr((W - W') G (W - W')^T)` on the channels K.

    Args:
        W: out-projection weight, (d_out, n), float64.
        gram: G, positive definite, (n, n), float64.
        kept: K, (k,), int64.

    Returns:
        W', (d_out, k), float64.
    """
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[kept] = False
    cholesky = torch.linalg.cholesky(gram[kept][:, kept])
    return W[:, kept] + torch.cholesky_solve(gram[kept][:, gone] @ W[:, gone].T, cholesky).T
