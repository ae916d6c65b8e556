"""Statistics of a batch norm after a cut, in closed form from sums that are there. Runs nothing."""

import torch
from torch import Tensor, nn

from snp_llm.linalg.gram import Moments, completed
from snp_llm.linalg.units import unit_channels
from snp_llm.models.projections import bias_of, projection, weight_of
from snp_llm.models.site import Site, norm_of


@torch.no_grad()
def restate(block: nn.Module, site: Site, kept: Tensor, moments: Moments) -> None:
    """Mean and variance of what a site's consumer now puts out, in the batch norm after it, in place.

    With m the mean and C the covariance of what arrives, the mean of `W x + b` is `W m + b` and its variance
    `diag(W C W^T)`.

    Args:
        block: in which the site has been cut.
        site: with a norm.
        kept: units, ascending, (u,), int64.
        moments: of its inputs, all units.
    """
    consumer, norm = projection(block, site.consumers[0]), norm_of(block, site)
    moments, W = completed(moments), weight_of(consumer).double()
    mean = moments.first.to(W) / moments.tokens
    covariance = moments.second.to(W) / moments.tokens
    covariance.addr_(mean, mean, alpha=-1)
    if site.shared is None:
        at = unit_channels(kept, site.unit_size).to(W.device)
        mean, covariance = mean[at], covariance[at[:, None], at]
    bias = bias_of(consumer)
    put(norm, W @ mean + (0 if bias is None else bias), ((W @ covariance) * W).sum(1))


def put(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Sets a batch norm's statistics, (channels,) each, in place."""
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp_min(0))
