"""One round's choice of greedy elimination in one kernel on a GPU, where a hundred small ones would wait for the host.

What it decides is `ordering._cheap_together`; imported only where Triton is there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _choose(
    inverse, products, costs, pool, alive, scores, gone, removed, going, taken,
    units, last, block, rise,
    POOL: tl.constexpr, SLOTS: tl.constexpr, EXCHANGES: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Eliminates the units of a pool one after the other, passing over those that are dear by then.

    With `A = [G^-1]` and `K = W W^T` of the pool, removing unit j takes `a a_j^T / a_jj` off A, and j's share of W off
    that of the others; a unit then costs `K_ii / A_ii`.
    """
    at = tl.arange(0, SIZE)
    row, column = at[:, None], at[None, :]
    inside = (row < POOL) & (column < POOL)
    A = tl.load(inverse + row * POOL + column, mask=inside, other=0.0)
    K = tl.load(products + row * POOL + column, mask=inside, other=0.0)
    before = tl.load(removed)
    there = units - before
    count = tl.minimum(last - before, block)
    chosen = tl.load(pool + at, mask=at < SLOTS, other=0)  # slots of units that stay are filled with any
    accepted = count * 0
    skipped = count * 0
    for j in range(POOL):
        a = tl.sum(tl.where(column == j, A, 0.0), axis=1)
        k = tl.sum(tl.where(column == j, K, 0.0), axis=1)
        a_jj = tl.sum(tl.where(at == j, a, 0.0), axis=0)
        k_jj = tl.sum(tl.where(at == j, k, 0.0), axis=0)
        in_line = tl.minimum(tl.minimum(count + skipped, there - 1), POOL - 1)
        limit = rise * tl.load(costs + tl.maximum(in_line, 0))
        open_ = (accepted < count) & (j < there) & (skipped <= EXCHANGES)
        cheap = (j == 0) | ((a_jj > 0) & (k_jj <= limit * a_jj))
        take = open_ & cheap
        share = tl.where(take, a / a_jj, 0.0)
        A -= share[:, None] * a[None, :]
        K += (k_jj * share[:, None] - k[:, None]) * share[None, :] - share[:, None] * k[None, :]
        chosen = tl.where((at == accepted) & take, tl.load(pool + j), chosen)
        accepted += take.to(tl.int64)
        skipped += (open_ & (cheap == 0)).to(tl.int64)
    is_slot, is_taken = at < SLOTS, at < accepted
    tl.store(going + at, chosen, mask=is_slot)
    tl.store(taken + at, is_taken, mask=is_slot)
    tl.store(gone + chosen, is_taken, mask=is_taken)
    tl.store(scores + tl.load(alive + chosen, mask=is_taken, other=0), (before + at).to(tl.float64), mask=is_taken)
    tl.store(removed, before + accepted)


def choose(
    inverse: Tensor,
    W: Tensor,
    costs: Tensor,
    pool: Tensor,
    alive: Tensor,
    scores: Tensor,
    gone: Tensor,
    removed: Tensor,
    units: int,
    last: int,
    block: int,
    exchanges: int,
    rise: float,
) -> tuple[Tensor, Tensor]:
    """Which units of a pool go, without a word to the host; `scores`, `gone` and `removed` are brought up to date.

    Args:
        inverse: `[G^-1]` of the pool, cheapest unit first, (u, u), contiguous.
        W: out-projection weight, a row a unit, (u, d_out).
        costs: of removing each unit alone, ascending, (u,).
        pool: the units, as the matrices have them, (u,), int64.
        alive: their numbers, (units left,), int64.
        scores: by number, (units,), float64.
        gone: of the units left, those that went, bool.
        removed: how many went, (), int64.
        units: of the site.
        last: as many are to go.
        block: units that go at most.
        exchanges: of a dear unit for the next one.
        rise: times what the next in line costs: what a unit may come to cost.

    Returns:
        Units in as many slots as can go, (slots,), int64, and which of them do go, (slots,), bool.
    """
    size, slots = len(pool), min(block, len(pool))
    going, taken = pool.new_empty(slots), torch.empty(slots, dtype=torch.bool, device=pool.device)
    _choose[(1,)](
        inverse, W @ W.mT, costs, pool, alive, scores, gone, removed, going, taken,
        units, last, block, rise,
        POOL=size, SLOTS=slots, EXCHANGES=exchanges, SIZE=triton.next_power_of_2(size), num_warps=8,
    )  # fmt: skip
    return going, taken


def works_on(device: torch.device) -> None:
    """Chooses between two units, to raise here what would be raised later where no kernel can be made."""
    two, pool = torch.eye(2, device=device), torch.arange(2, device=device)
    numbers = torch.zeros(2, dtype=torch.float64, device=device), torch.zeros(2, dtype=torch.bool, device=device)
    choose(two, two, torch.ones(2, device=device), pool, pool, *numbers, pool[0].clone(), 2, 2, 1, 1, 1.0)
