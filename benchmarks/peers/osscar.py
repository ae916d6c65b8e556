"""OSSCAR: greedy removal on the layer-wise quadratic, then swaps while they help, least squares throughout.

X. Meng, S. Ibrahim, K. Behdin, H. Hazimeh, N. Ponomareva, R. Mazumder, "OSSCAR: One-Shot Structured Pruning in Vision
and Language Models with Combinatorial Optimization", arXiv 2403.12983. Blocks are visited in order, each on what the
pruned ones before it put out; the same widths in every block; biases stay as they are.

With H the dampened Gram matrix of the inputs, keeping the channels K and removing P costs `tr(W_P S W_P^T)`, S the
Schur complement `H_PP - H_PK H_KK^-1 H_KP`. A symmetric table holds `H_KK^-1` and `-S`, and beside it the refitted
weights on K and `W_P S` on P; moving a unit from one side to the other is one pivot of rank unit_size in either
direction, and the cost of every single move can be read off the diagonal blocks.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.linalg.gram import gram_matrix
from snp_llm.linalg.units import diagonal_blocks, unit_channels

from .common import (
    Cut,
    Prune,
    Pruned,
    SiteProblem,
    least_squares,
    prune_sequentially,
    pruned,
)
from .widths import INFLUENCE, UNIFORM, Plan, with_plans

DAMPENING = 0.01  # of the mean of the Gram matrix's diagonal, added to all of it
ONE_AT_A_TIME = 1024  # units of a site, up to which the greedy search removes one a round
ROUNDS = 256  # otherwise, removing several a round
MOST_SWAPS = 256  # a site


@dataclass
class Table:
    """A state of the search.

    Attributes:
        T: `H_KK^-1` and, on the removed channels, `-S`, (n, n), float64.
        V: refitted weights on K, `W_P S` on P, (d_out, n), float64.
        kept: (units,), bool.
        unit_size: channels a unit has.
        objective: `tr(W_P S W_P^T)`.
    """

    T: Tensor
    V: Tensor
    kept: Tensor
    unit_size: int
    objective: float = 0.0

    def costs(self) -> Tensor:
        """By how much the objective would change if the unit moved to the other side, (units,)."""
        if self.unit_size == 1:
            return self.V.square().sum(0) / self.T.diagonal()
        columns = self.V.reshape(self.V.shape[0], -1, self.unit_size).permute(1, 2, 0)  # (units, unit_size, d_out)
        return (columns * torch.linalg.solve(diagonal_blocks(self.T, self.unit_size), columns)).sum((1, 2))

    def move(self, units: Tensor) -> None:
        """Moves units, all on one side, to the other side, in place."""
        removing = bool(self.kept[units[0]])
        channels = unit_channels(units, self.unit_size)
        rows, weights = self.T[channels], self.V[:, channels]
        pivot = torch.linalg.inv(rows[:, channels])
        pivot = (pivot + pivot.T) / 2
        share = pivot @ rows
        self.objective += float(((weights @ pivot) * weights).sum())
        self.T.addmm_(rows.T, share, alpha=-1)
        self.V.addmm_(weights, share, alpha=-1)
        sign = 1 if removing else -1
        self.T[channels], self.T[:, channels] = sign * share, sign * share.T
        self.T[channels[:, None], channels] = -pivot
        self.V[:, channels] = sign * weights @ pivot
        self.kept[units] = not removing


def start(W: Tensor, gram: Tensor, unit_size: int) -> Table:
    """Nothing removed.

    Args:
        W: out-projection weight, (d_out, n), float64.
        gram: H, positive definite, (n, n), float64.
        unit_size: channels a unit has.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    kept = torch.ones(len(gram) // unit_size, dtype=torch.bool, device=gram.device)
    return Table(inverse, W.clone(), kept, unit_size)


def remove_greedily(table: Table, width: int) -> None:
    """Removes the cheapest unit until `width` are left; several at a time in wide layers."""
    units = len(table.kept)
    at_once = 1 if units <= ONE_AT_A_TIME else units // ROUNDS
    while (excess := int(table.kept.sum()) - width) > 0:
        costs = table.costs().masked_fill(~table.kept, torch.inf)
        table.move(torch.argsort(costs, stable=True)[: min(at_once, excess)])


def swap_while_better(table: Table, most: int) -> int:
    """Removes the cheapest unit and takes back the one that then helps most, while the objective falls.

    Returns:
        How many swaps were made.
    """
    for swaps in range(most):
        before = table.objective
        out = table.costs().masked_fill(~table.kept, torch.inf).argmin().reshape(1)
        table.move(out)
        back = table.costs().masked_fill(table.kept, torch.inf).argmin().reshape(1)
        gain = float(table.costs()[back])
        if int(back) == int(out) or table.objective + gain >= before * (1 - 1e-9):
            table.move(out)
            table.objective = before
            return swaps
        table.move(back)
    return most


def cut(problem: SiteProblem, *, local_search: bool) -> Cut:
    gram = gram_matrix(problem.moments, centred=False)
    gram.diagonal().add_(DAMPENING * gram.diagonal().mean())
    table = start(problem.W, gram, problem.site.unit_size)
    remove_greedily(table, problem.width)
    if local_search:
        swap_while_better(table, MOST_SWAPS)
    kept = table.kept.nonzero().squeeze(1)
    # Solved afresh: what many pivots have rounded decides which units stay, never what is written.
    weight = least_squares(problem.W, gram, unit_channels(kept, problem.site.unit_size))
    return Cut(kept.cpu(), weight, problem.bias)


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int, plan: Plan, *, local_search: bool) -> Prune:
    planned = plan(dense, tokens)

    def prune(sparsity: float) -> Pruned:
        return pruned(
            dense, prune_sequentially(dense, tokens, planned(sparsity), partial(cut, local_search=local_search))
        )

    return prune


PLANS = UNIFORM | INFLUENCE
REFERENCE = "Meng et al., arXiv 2403.12983"
METHODS = (
    *with_plans("osscar-greedy", "OSSCAR without local search", REFERENCE, partial(prepare, local_search=False), PLANS),
    *with_plans("osscar", "OSSCAR", REFERENCE, partial(prepare, local_search=True), PLANS),
)
