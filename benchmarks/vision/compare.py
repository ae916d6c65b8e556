"""Ways to prune a classifier of images, one model, the same images, the same share of its weights removed.

    python benchmarks/vision/compare.py MODEL --calibration train.parquet --evaluation test.parquet --work cells.jsonl

Top-1 of the dense model and of each method at each sparsity and seed, as it comes out of the cut and with the
statistics of all batch norms estimated again on the calibration images. Without that second figure a comparison would
flatter methods that set the statistics themselves, as this package does. Cells are kept in --work, a line each, and not
measured again. Prints a table in Markdown: mean over the seeds, and half their range.

Methods that do not repair are made from the same loop with the repair taken out: SAW (sum of absolute weights), VBP
(variance, with the mean of what goes moved into the bias; arXiv 2507.12988), PFA (of the two most correlated channels
one goes, as in PFA-EN, arXiv 1807.10585, whose own widths are replaced by uniform ones), and random. Intra-Fusion
(`intra_fusion.py`) sees no images, and of convolutional networks alone.
"""

import argparse
import contextlib
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm import checkpoint
from snp_llm.data.images import calibration_images, labelled_batches
from snp_llm.data.pictures import Pictures
from snp_llm.evaluate.accuracy import accuracy
from snp_llm.evaluate.material import form_of
from snp_llm.linalg import ordering
from snp_llm.linalg.ordering import OrderingProblem
from snp_llm.models.anatomy import find_anatomy
from snp_llm.models.segments import find_segments
from snp_llm.pruning import cut as cutting
from snp_llm.pruning.pipeline import prune
from snp_llm.pruning.repair import RepairedSite
from snp_llm.pruning.run import resolve
from snp_llm.pruning.widths.plan import widths_of
from snp_llm.recipe.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from intra_fusion import fused


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        settings: of the recipe.
        repaired: whether what stays is repaired, and batch norms are set in closed form.
        shifted: whether the mean of what goes is moved into biases and batch norms.
        fused: whether units are fused, and not dropped.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    repaired: bool = True
    shifted: bool = True
    fused: bool = False


PLAIN = {"allocation": "uniform", "metric": "error", "reference": "self"}
METHODS = {
    "ours": Method(),
    "the paper": Method({**PLAIN, "ordering": "zca", "allocation": "variance", "dampening": 0.01}),
    "zca uniform": Method({"ordering": "zca", **PLAIN}),
    "SAW with repair": Method({"ordering": "saw", **PLAIN}),
    "SAW": Method({"ordering": "saw", **PLAIN}, repaired=False, shifted=False),
    "VBP": Method({"ordering": "variance", **PLAIN}, repaired=False),
    "Intra-Fusion": Method({"ordering": "saw", **PLAIN}, fused=True),
    "PFA": Method({"ordering": "pfa", **PLAIN}, repaired=False, shifted=False),
    "random": Method({"ordering": "random", **PLAIN}, repaired=False, shifted=False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--sparsities", default="0.2,0.4,0.6")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--num-samples", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("cells.jsonl"))
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("snp_llm").setLevel(logging.ERROR)
    model, processor = checkpoint.load(args.model, "auto")
    form = form_of(model.config, processor, model.dtype)
    test = list(labelled_batches(form, Pictures(args.evaluation), batch_size=250)[0])
    name = Path(args.model).name
    dense = accuracy([model], test)[0].top1
    print(f"{name}, dense {dense:.2f}", flush=True)
    convolutional = find_segments(model) is not None
    methods = [m for m in args.methods.split(",") if convolutional or not METHODS[m].fused]
    for seed in map(int, args.seeds.split(",")):
        for method in methods:
            for sparsity in map(float, args.sparsities.split(",")):
                key = [name, args.calibration, args.num_samples, method, sparsity, seed]
                if any(cell["key"] == key for cell in read(args.work)):
                    continue
                start = time.time()
                recipe = make_recipe(args, method, sparsity, seed)
                pruned, again = pruned_by(METHODS[method], model, processor, recipe)
                seconds = time.time() - start
                found = {"plain": accuracy([pruned], test)[0].top1}
                if any(isinstance(module, nn.BatchNorm2d) for module in pruned.modules()):
                    pictures = Pictures(args.calibration)
                    drawn = calibration_images(form, pictures, num_samples=args.num_samples, seed=seed)
                    estimate_again(again, drawn.tokens)
                    found["again"] = accuracy([again], test)[0].top1
                cell = {"key": key, "dense": dense, "seconds": seconds, **found}
                with open(args.work, "a", encoding="utf-8") as file:
                    file.write(json.dumps(cell) + "\n")
                print(json.dumps(cell), flush=True)
    print(table(read(args.work), name, args.num_samples, args.calibration))
    return 0


def make_recipe(args: Any, method: str, sparsity: float, seed: int) -> Recipe:
    settings = {**METHODS[method].settings, "absorb_bias": METHODS[method].shifted}
    if settings.get("ordering") == "pfa":
        settings["ordering"] = "residual"  # in whose place it is put
    return Recipe(
        args.model, sparsity=sparsity, calibration=args.calibration, num_samples=args.num_samples, seed=seed, **settings
    )


def pruned_by(
    method: Method, model: PreTrainedModel, processor: Any, recipe: Recipe
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The pruned model, and the one whose batch norms are estimated again: another where they were merged."""
    if method.fused:
        resolved, anatomy = resolve(recipe, model), find_anatomy(model)
        widths = widths_of(anatomy, [None] * len(anatomy.sites), resolved)
        return fused(model, widths, merged=True), fused(model, widths, merged=False)
    with contextlib.ExitStack() as stack:
        if not method.repaired:
            stack.enter_context(without_repair())
        if method.settings.get("ordering") == "pfa":
            stack.enter_context(mock.patch.dict(ordering.ORDERINGS, {"residual": least_correlated}))
        pruned = prune(model, processor, recipe).model
        return pruned, pruned


@contextlib.contextmanager
def without_repair() -> Iterator[None]:
    """Takes the repair, and the statistics of batch norms, out of the loop."""

    def kept_as_is(parted: Any, _statistics: Any, _recipe: Any) -> RepairedSite:
        W = parted.W[:, parted.kept]
        return RepairedSite(W, torch.zeros_like(W[:, 0]), 0.0, parted.dampening, 0.0)

    with (
        mock.patch.object(cutting, "repair_site", kept_as_is),
        mock.patch.object(cutting, "restate", lambda *_: None),
    ):
        yield


def least_correlated(problem: OrderingProblem) -> Tensor:
    """Of the two most correlated units the one goes that is more correlated with all others, again and again."""
    gram = problem.definite.gram
    units = len(gram) // problem.unit_size
    blocks = gram.reshape(units, problem.unit_size, units, problem.unit_size)
    energy = torch.einsum("iaja->ij", blocks)
    scale = energy.diagonal().clamp_min(1e-30).sqrt()
    correlation = (energy / scale[:, None] / scale).abs().fill_diagonal_(0)
    gone = []
    for _ in range(units):
        worst = int(correlation.max(1).values.add(1e-6 * correlation.sum(1)).argmax())
        gone.append(worst)
        correlation[worst], correlation[:, worst] = -1, -1
        correlation[gone] = -1
    return torch.empty(units, dtype=gram.dtype).index_copy(0, torch.tensor(gone), torch.arange(units).to(gram.dtype))


@torch.no_grad()
def estimate_again(model: nn.Module, pixels: Tensor) -> None:
    """Statistics of all batch norms anew, from one pass over images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # an average over all batches
        norm.train()
    for batch in pixels.split(64):
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def table(cells: list[dict[str, Any]], name: str, samples: int, calibration: str) -> str:
    own = [cell for cell in cells if cell["key"][:3] == [name, calibration, samples]]
    sparsities = sorted({cell["key"][4] for cell in own})
    kinds = [(s, kind) for s in sparsities for kind in ("plain", "again") if any(kind in cell for cell in own)]
    titles = [f"{100 * s:g} %" if kind == "plain" else "+BN" for s, kind in kinds]
    lines = [f"| {name}, dense {own[0]['dense']:.2f} | {' | '.join(titles)} |", "|---|" + "---:|" * len(kinds)]
    for method in dict.fromkeys(cell["key"][3] for cell in own):
        row = []
        for sparsity, kind in kinds:
            values = [c[kind] for c in own if c["key"][3] == method and c["key"][4] == sparsity and kind in c]
            spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.2f}{spread}" if values else "")
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
