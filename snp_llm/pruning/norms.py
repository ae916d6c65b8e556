"""Statistics of batch norms after a cut: in closed form from sums that are there, or from a pass over the images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from snp_llm.linalg.gram import Moments, completed
from snp_llm.linalg.units import unit_channels
from snp_llm.models.blocks import input_of
from snp_llm.models.projections import bias_of, projection, weight_of
from snp_llm.models.site import Site, norm_of
from snp_llm.pruning.result import SiteResult
from snp_llm.pruning.stream import Stream
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.device import in_float64


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
    moments = completed(moments)
    W = in_float64(weight_of(consumer)).to(moments.second.device)  # which may be the CPU, where there was room
    mean = moments.first.to(W) / moments.tokens
    covariance = moments.second.to(W) / moments.tokens
    covariance.addr_(mean, mean, alpha=-1)
    if site.shared is None:
        at = unit_channels(kept, site.unit_size).to(W.device)
        mean, covariance = mean[at], covariance[at[:, None], at]
    bias = bias_of(consumer)
    put(norm, W @ mean + (0 if bias is None else bias.to(W)), ((W @ covariance) * W).sum(1))


@torch.no_grad()
def estimate(block: nn.Module, paths: Sequence[str], stream: Stream) -> None:
    """Mean and variance of what batch norms get, over all positions of all images, in place.

    One pass through the block up to each norm, in the order in which they run: what a norm gets follows from the
    statistics of those before it.

    Args:
        block: on the compute device.
        paths: of the norms.
        stream: before the block; left as it is.
    """
    for path in paths:
        norm = block.get_submodule(path)
        assert isinstance(norm, nn.BatchNorm2d)
        sums, count = torch.zeros(2, norm.num_features, dtype=torch.float64), 0

        def arriving(at: slice, norm: nn.Module = norm) -> Tensor:
            return input_of(norm, block, stream.hidden[at], stream.call)

        for _, values in in_batches(len(stream.windows), stream.batch, arriving):
            values = in_float64(values.transpose(0, 1).flatten(1))
            sums += torch.stack([values.sum(1), values.square().sum(1)]).cpu()
            count += values.shape[1]
        ranks.add_up([sums])
        first, second = sums / sum(ranks.from_all(count))
        put(norm, first, second - first.square())


def norms_left(results: Sequence[SiteResult]) -> list[str]:
    """Paths of the batch norms that no closed form was for: of a convolution whose channels are mixed no sums are there
    over pairs of taps."""
    cut = [r.site for r in results if r.site.drifts or len(r.kept) < r.site.units]
    return [site.norm for site in cut if site.norm and site.taps]


def norms_of(block: nn.Module) -> list[str]:
    """Paths of the batch norms in a block, in the order in which they run."""
    return [path for path, module in block.named_modules() if isinstance(module, nn.BatchNorm2d)]


def put(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Sets a batch norm's statistics, (channels,) each, in place."""
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance.clamp_min(0))
