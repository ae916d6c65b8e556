"""Units and the channels they are made of. Knows only index arithmetic.

A unit is the smallest thing that can be removed from a site: `unit_size` consecutive channels of the out-projection's
inputs (1 for an FFN channel, `head_dim` for a head).
"""

import torch
from torch import Tensor


def unit_channels(units: Tensor, unit_size: int) -> Tensor:
    """Channels of `units`, unit after unit in the order given.

    Args:
        units: unit indices, (u,), int64.
        unit_size: channels a unit has.

    Returns:
        Channel indices, (u * unit_size,), int64.
    """
    if unit_size == 1:
        return units
    within = torch.arange(unit_size, device=units.device)
    return (units[:, None] * unit_size + within).reshape(-1)


def per_unit(values: Tensor, unit_size: int) -> Tensor:
    """Sum of a value per channel over each unit, (n,) to (n / unit_size,)."""
    return values.reshape(-1, unit_size).sum(1)


def deal_from_groups(order: Tensor, groups: int) -> Tensor:
    """An order that takes one unit from each group in turn, the best of each first, then the second best.

    Every multiple of `groups` units, taken from the front, then holds equally many from every group.

    Args:
        order: units, most important first, (u,), int64; units of a group have consecutive indices.
        groups: how many there are, a divisor of u.

    Returns:
        The same units, (u,), int64.
    """
    size = len(order) // groups
    by_group = order[torch.argsort(order // size, stable=True)].reshape(groups, size)
    return by_group.T.reshape(-1)


def diagonal_blocks(matrix: Tensor, unit_size: int) -> Tensor:
    """The blocks on the diagonal, one a unit: (n, n) to (n / unit_size, unit_size, unit_size)."""
    n = matrix.shape[0]
    blocks = matrix.reshape(n // unit_size, unit_size, n // unit_size, unit_size)
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)
