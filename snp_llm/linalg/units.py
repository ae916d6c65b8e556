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
    within = torch.arange(unit_size, device=units.device)
    return (units[:, None] * unit_size + within).reshape(-1)


def per_unit(values: Tensor, unit_size: int) -> Tensor:
    """Sum of a value per channel over each unit, (n,) to (n / unit_size,)."""
    return values.reshape(-1, unit_size).sum(1)


def diagonal_blocks(matrix: Tensor, unit_size: int) -> Tensor:
    """The blocks on the diagonal, one a unit: (n, n) to (n / unit_size, unit_size, unit_size)."""
    n = matrix.shape[0]
    blocks = matrix.reshape(n // unit_size, unit_size, n // unit_size, unit_size)
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)
