"""RCPU: what is left of an out-projection is turned, by a rotation of its outputs, towards what it put out before.

S. Haruta, K. Matsumoto, Z. Li, Y. Wang, M. Kurokawa, "RCPU: Rotation-Constrained Error Compensation for Structured
Pruning of Large Language Models", arXiv 2510.07782. Channels with the largest `||W_j|| ||X_j|| Var(X_j)` stay. With
Y = W X, Z = W_K X_K and the SVD `Y Z^T = U S V^T` the weight becomes `U V^T W_K`, with scale `tr(S) / ||Z||^2` as a
setting. Blocks are visited in order, on what the pruned ones before put out; biases stay.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.linalg.gram import gram_matrix
from snp_llm.linalg.units import per_unit, unit_channels

from .common import Cut, Prune, Pruned, SiteProblem, best_units, prune_sequentially, pruned
from .widths import UNIFORM, Plan, with_plans

REFERENCE = "Haruta et al., arXiv 2510.07782"


def rotated(W: Tensor, gram: Tensor, kept: Tensor, *, scaled: bool) -> Tensor:
    """`s Q W_K` with the orthogonal Q, and s where `scaled`, that minimise `||W X - s Q W_K X_K||`, (d_out, k).

    Args:
        W: out-projection weight, (d_out, n), float64.
        gram: `X X^T`, (n, n), float64.
        kept: channels K, (k,), int64.
        scaled: whether s may differ from one.
    """
    U, S, Vh = torch.linalg.svd(W @ gram[:, kept] @ W[:, kept].T)
    energy = ((W[:, kept] @ gram[kept][:, kept]) * W[:, kept]).sum()
    return (S.sum() / energy if scaled else 1.0) * (U @ Vh) @ W[:, kept]


def cut(problem: SiteProblem, *, scaled: bool) -> Cut:
    gram = gram_matrix(problem.moments, centred=False)
    square, mean = gram.diagonal(), problem.moments.first.double() / problem.moments.tokens
    variance = (square / problem.moments.tokens - mean.square()).clamp(min=0)
    scores = per_unit(problem.W.norm(dim=0) * square.sqrt() * variance, problem.site.unit_size)
    kept = best_units(scores, problem.width)
    weight = rotated(problem.W, gram, unit_channels(kept, problem.site.unit_size), scaled=scaled)
    return Cut(kept.cpu(), weight, problem.bias)


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int, plan: Plan, *, scaled: bool) -> Prune:
    planned = plan(dense, tokens)

    def prune(sparsity: float) -> Pruned:
        return pruned(dense, prune_sequentially(dense, tokens, planned(sparsity), partial(cut, scaled=scaled)))

    return prune


METHODS = with_plans("rcpu", "RCPU", REFERENCE, partial(prepare, scaled=False)) + with_plans(
    "rcpu-scaled",
    "RCPU",
    REFERENCE,
    partial(prepare, scaled=True),
    {suffix: (f", scaled{said}", plan) for suffix, (said, plan) in UNIFORM.items()},
)
