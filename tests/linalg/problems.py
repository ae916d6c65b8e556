"""Random sites with the trouble of real ones: correlated channels, very different scales, a mean."""

import torch


def make_inputs(tokens=200, n=12, *, seed=0, mean=0.5):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n, n, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, n, dtype=torch.float64)
    return torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ mixing * scales + mean


def make_weight(d_out=7, n=12, *, seed=1):
    return torch.randn(d_out, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_squares(X, target, kept):
    """Weight W' that minimises ||X[:, kept] W'^T - target||, by an algorithm that never forms a Gram matrix."""
    return torch.linalg.lstsq(X[:, kept], target, driver="gelsd").solution.T


def relative_error(W, W_new, kept, gram):
    """`||X (W - W')^T||_F^2 / ||X W^T||_F^2` for W' on the kept channels, from `G = X^T X`."""
    difference = W.clone()
    difference[:, kept] -= W_new
    return float(((difference @ gram) * difference).sum() / ((W @ gram) * W).sum())
