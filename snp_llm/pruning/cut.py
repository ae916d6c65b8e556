"""One site: order, factor, cut and repair it. Knows one block at a time."""

import torch
from torch import nn

from snp_llm.linalg.ldl import energy_curve, error_curve
from snp_llm.linalg.least_squares import absorb_mean, output_energy, reconstruct
from snp_llm.models.site import Site, site_bias
from snp_llm.models.surgery import prune_site
from snp_llm.pruning.factor import DAMPENING, factor_site
from snp_llm.pruning.repair import chooses_repair, repair_site
from snp_llm.pruning.result import SiteResult, sample_curve
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import Statistics
from snp_llm.runtime.errors import SnpError


def cut(
    block: nn.Module,
    site: Site,
    statistics: Statistics,
    width: int,
    run: Run,
) -> SiteResult:
    """Removes all but `width` units of a site from the block, in place."""
    recipe, clock = run.recipe, run.clock
    if not torch.isfinite(statistics.moments.first).all():
        raise SnpError(f"{site.name}: its inputs hold NaN or Inf; expected finite activations. Try --dtype float32.")
    if width == site.units and statistics.drift is None:  # nothing to do: the weights stay as they are to the bit
        everything = torch.arange(site.units)
        return SiteResult(site, everything, 1.0, 0.0, 0.0, 0.0, 0.0, recipe.dampening or DAMPENING, 0.0)
    with clock.phase("factorisation"):
        factored, gram = factor_site(block, site, statistics, recipe, clock, width)
        W, mean, subspace = factored.W, factored.mean, factored.subspace
        channels = width * site.unit_size
        kept, gone = subspace.order[:channels].sort().values, subspace.order[channels:].sort().values
        bias = site_bias(block, site)
        bias = None if bias is None else bias.to(W)
        energy = float(energy_curve(subspace.D, site.unit_size)[width])
        total, lost = output_energy(W, gram), output_energy(W[:, gone], gram[gone[:, None], gone])
        dampened = total + subspace.dampening * float((gram.diagonal() * W.square().sum(0)).sum())
        errors = error_curve(W[:, subspace.order], subspace.L, subspace.D)
        predicted, curve = float(errors[channels]), sample_curve(subspace.D, errors, factored.tokens, channels)
        chosen = chooses_repair(recipe, statistics)
        at_once = None  # the repair that comes with the factorisation, where its dampening is the one to use
        if not chosen:
            ordered = reconstruct(W[:, subspace.order], subspace.L, channels)
            at_once = ordered[:, subspace.order[:channels].argsort()]
        used, root, centred = subspace.dampening, factored.root, factored.centred
        unit_order = factored.unit_order
        del factored, subspace, gram, errors  # a large site's memory goes to its repair
    with clock.phase("reconstruction"):
        try:
            repaired = repair_site(W, at_once, root, mean, statistics, kept, gone, used, recipe, centred=centred)
        except SnpError as error:
            raise SnpError(f"{site.name}: {error}") from error
        if centred and bias is not None:
            bias = absorb_mean(bias, W, repaired.W, kept, mean) + repaired.shift
        result = SiteResult(
            site=site,
            kept=unit_order[:width].sort().values.cpu(),
            energy=energy,
            predicted_error=predicted / dampened if dampened > 0 else 0.0,
            error=max(0.0, lost + repaired.change) / total if total > 0 else 0.0,
            predicted_loss=None,
            reference_weight=repaired.alpha,
            dampening=repaired.dampening,
            seconds=0.0,
            curve=curve,
        )
    with clock.phase("surgery"):
        prune_site(block, site, result.kept, repaired.W, bias)
    return result
