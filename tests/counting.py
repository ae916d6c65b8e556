"""Counts the FLOPs that torch is asked for: matrix products, and the linear algebra on demand."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
ALGEBRA = {
    aten.linalg_cholesky_ex: lambda a, *_, **__: batch(a) * a.shape[-1] ** 3 / 3,
    aten.cholesky_inverse: lambda a, *_, **__: batch(a) * 2 * a.shape[-1] ** 3 / 3,
    aten.linalg_solve_triangular: lambda a, b, *_, **__: batch(b) * a.shape[-1] * b.shape[-2] * b.shape[-1],
    aten._linalg_solve_ex: lambda a, b, *_, **__: batch(a) * 2 * a.shape[-1] ** 3 / 3 + 2 * a.shape[-1] * b.numel(),
    aten.linalg_inv_ex: lambda a, *_, **__: batch(a) * 2 * a.shape[-1] ** 3,
    aten._linalg_eigh: lambda a, *_, **__: batch(a) * 9 * a.shape[-1] ** 3,
}


def batch(a: torch.Tensor) -> int:
    """How many matrices."""
    return a.shape[:-2].numel()


class Products(TorchDispatchMode):
    """Counts the FLOPs of all matrix products but those in float64, which are the linear algebra's.

    With `algebra` it counts those as well, and factors, solves and inverses.
    """

    def __init__(self, *, algebra: bool = False):
        super().__init__()
        self.flops, self.algebra = 0.0, algebra

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        with self:  # in inference mode compound operations arrive whole
            result = function.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        result = function(*args, **(kwargs or {}))
        packet = function._overloadpacket
        if self.algebra and packet in ALGEBRA:
            self.flops += ALGEBRA[packet](*args)
        # Sums are taken in place, which torch's own counter overlooks.
        count = flop_registry.get(aten.addmm if packet is aten.addmm_ else packet)
        if count is not None:
            first = result if isinstance(result, torch.Tensor) else result[0]
            if self.algebra or first.dtype != torch.float64:
                self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result
