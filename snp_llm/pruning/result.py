"""What happened at a site, and its curves as they are drawn. Computes nothing else."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from snp_llm.models.site import Site

CURVE_POINTS = 128  # of a curve that is kept for pictures; the cut comes on top


@dataclass(frozen=True)
class Curve:
    """What one factorisation says of a site: its spectrum, and what every width would cost, at some of the widths.

    Attributes:
        channels: numbers of channels kept, ascending, from 1 to all, the cut among them, (p,).
        cut: channels kept.
        variance: of the last latent kept at each of them, in squared activations, dampening included; about the mean
            where the bias absorbs that, about zero elsewhere, (p,).
        spectrum: variances of all latents, the largest first, read at the same places, (p,).
        error: relative squared output error after repair, on the tokens that the site was factored from, (p,).
    """

    channels: list[int]
    cut: int
    variance: list[float]
    spectrum: list[float]
    error: list[float]


def sample_curve(D: Tensor, errors: Tensor, tokens: int, cut: int) -> Curve:
    """A site's curve at no more than `CURVE_POINTS` widths, evenly spaced, and at the cut.

    Args:
        D: latent energies summed over the tokens, in the site's order, (n,), float64.
        errors: squared output error of keeping the first k channels, (n + 1,), float64.
        tokens: that D was summed over.
        cut: channels kept, 1 <= cut <= n.
    """
    points = torch.linspace(1, len(D), min(CURVE_POINTS, len(D)), dtype=torch.float64).round().long()
    channels = torch.cat([points, torch.tensor([cut])]).unique()
    at = (channels - 1).to(D.device)
    whole = float(errors[0])
    return Curve(
        channels=channels.tolist(),
        cut=cut,
        variance=(D[at] / tokens).tolist(),
        spectrum=(D.sort(descending=True).values[at] / tokens).tolist(),
        error=(errors[at + 1] / whole if whole > 0 else torch.zeros_like(errors[at])).tolist(),
    )


@dataclass(frozen=True)
class SiteResult:
    """What happened at one site.

    Attributes:
        site: as it was.
        kept: kept units, ascending, (u,), int64, on the CPU; of experts (u, experts), those of each in a column.
        energy: share of the latent energy in what was kept.
        predicted_error: relative squared output error read off the error curve (dampened Gram matrix).
        error: relative squared output error of the cut with its own repair, computed from the weights.
        predicted_loss: rise of the mean loss that the visit to the dense model predicted; None without gradients.
        reference_weight: alpha, the share of the drift's repair that the out-projection took up.
        dampening: relative dampening used; more than the recipe's where the factorisation failed at that.
        seconds: spent on this site.
        curve: spectrum and errors of every width, for pictures; None where nothing was to be cut or repaired, or all of
            several experts.
        refinement: at the last site of a block that was refined, the block's error on held-out windows after that over
            the error before; 1 where it stayed as it was. None elsewhere.
        experts: of each of these the tokens that came by, its dampening and its error.
    """

    site: Site
    kept: Tensor
    energy: float
    predicted_error: float
    error: float
    predicted_loss: float | None
    reference_weight: float
    dampening: float
    seconds: float
    curve: Curve | None = None
    refinement: float | None = None
    experts: list[dict[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        units = f"{len(self.kept):,} of {self.site.units:,} {self.site.unit}"
        repaired = f"error {self.error:.2e}, drift repaired {100 * self.reference_weight:.0f} %"
        return f"{self.site.name}: kept {units}, {repaired}, {self.seconds:.1f} s"


def nothing_left(site: Site) -> SiteResult:
    """What happened at a site whose block has gone, or at that block."""
    return SiteResult(site, torch.arange(0), 0.0, 1.0, 1.0, None, 0.0, 0.0, 0.0)
