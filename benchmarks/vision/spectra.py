"""Latent spectra of some sites in several orders: what the paper's third figure shows.

    python benchmarks/vision/spectra.py vgg-fmnist deit-fmnist --calibration train.parquet --output spectra.png

Of each site the variances of the latents L^-1 x, in the order in which units would stay, on the dense model's inputs.
The faster they fall, the less is lost with the last ones. Prints, for half of the channels, the share of the energy in
them and the squared output error that is left after repair.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure
from torch import Tensor

from snp_llm import checkpoint
from snp_llm.checkpoint.journal import Journal
from snp_llm.linalg.ldl import energy_curve
from snp_llm.models.anatomy import Anatomy, find_anatomy
from snp_llm.models.site import Site, site_weight
from snp_llm.pruning.curves import sum_up
from snp_llm.pruning.factor import factor_site
from snp_llm.pruning.run import Run, read_calibration, resolve
from snp_llm.pruning.shared import weight_sums
from snp_llm.pruning.statistics import Statistics, empty_sums
from snp_llm.pruning.stream import capture
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.device import Clock

ORDERINGS = ("random", "saw", "zca", "greedy")
DEVICE = torch.device("cpu")
KINDS = ("convolution", "ffn", "linear")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("spectra.png"))
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("snp_llm").setLevel(logging.ERROR)
    panels: list[tuple[str, dict[str, Tensor]]] = []
    print(f"| site | {' | '.join(f'{o}: energy | error' for o in ORDERINGS)} |")
    print("|---|" + "---:|" * (2 * len(ORDERINGS)))
    for name in args.models:
        for where, spectra, halves in of_model(name, args):
            panels.append((f"{Path(name).name}, {where}", spectra))
            said = " | ".join(f"{100 * energy:.2f} % | {error:.2e}" for energy, error in halves)
            print(f"| {panels[-1][0]} | {said} |", flush=True)
    draw(panels, args.output)
    return 0


def of_model(name: str, args: argparse.Namespace) -> list[tuple[str, dict[str, Tensor], list[tuple[float, float]]]]:
    """Of the middle site of each kind: where it is, its spectra by ordering, and energy and error at half its width."""
    model, processor = checkpoint.load(name, "auto")
    settings = {"allocation": "uniform", "metric": "error", "reference": "self", "dampening": 0.01}
    recipe = resolve(
        Recipe(name, calibration=args.calibration, num_samples=args.num_samples, **settings), model, processor
    )
    run, anatomy = Run(recipe, Clock(DEVICE), Journal()), find_anatomy(model)
    stream = capture(anatomy, read_calibration(processor, recipe, model).tokens, run)
    own = {kind: [site for site in anatomy.sites if site.kind == kind] for kind in KINDS}
    chosen, found = [sites[len(sites) // 2] for sites in own.values() if sites], []
    for index, block in enumerate(anatomy.blocks):
        here = [site for site in chosen if site.block == index]
        options = {"drifting": False, "holding_out": False}
        sums = [empty_sums(s.name, site_weight(block, s), DEVICE, stream.storage, **options) for s in here]
        held = torch.zeros(len(stream.hidden), dtype=torch.bool)
        sums = sum_up(block, here, sums, stream.before(index), held, run.clock)
        for site, of_site in zip(here, sums, strict=True):
            spectra, halves = {}, []
            for ordering in ORDERINGS:
                ordered = replace(site, order=by_weight(anatomy, site)) if ordering == "saw" else site
                statistics = Statistics(of_site.fitted.moments)
                factored, _ = factor_site(block, ordered, statistics, replace(recipe, ordering=ordering), run.clock)
                D = factored.subspace.D
                spectra[ordering] = D / D.max()
                halves.append((float(energy_curve(D, 1)[len(D) // 2]), float(factored.errors()[len(D) // 2])))
            found.append((site.name, spectra, halves))
    return found


def by_weight(anatomy: Anatomy, site: Site) -> tuple[int, ...]:
    """Units that other blocks make, by their absolute weights; nothing of others, whose own rows say that."""
    if site.shared is None:
        return ()
    return tuple(weight_sums(anatomy, site.shared).argsort(descending=True, stable=True).tolist())


def draw(panels: Sequence[tuple[str, dict[str, Tensor]]], file: Path) -> None:
    """Draws spectra, a panel a site."""
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, spectra) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for ordering, values in spectra.items():
            axes.plot(range(1, 1 + len(values)), values, ".", markersize=3, label=ordering)
        axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("latent, in the site's order")
    figure.axes[0].set_ylabel("variance, of the largest")
    figure.axes[0].legend()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
