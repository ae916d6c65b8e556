"""Ridge against rotation: what a repair of one out-projection leaves of its error, on windows that were not seen.

    python benchmarks/repairs.py MODEL --calibration wiki.valid.tokens --windows 4 --seq-len 512 --blocks 3,12 \
        --text wiki=wiki.test.raw --text prose=heldout.txt

Sites of the dense model one at a time, inputs as in the dense model, units chosen by `obs`. `ridge` is this package's
repair, at the dampening that is best on half of the first text; `rotation` turns what is left, `Q W_K` (RCPU, arXiv
2510.07782), `scaled` with a factor; `both` turns the ridge's. Errors are relative to the dense output, in float64.
"""

import argparse

import torch
import transformers
from peers.rcpu import rotated
from torch import Tensor

from snp_llm import checkpoint
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import evaluation_windows
from snp_llm.linalg.ldl import make_definite
from snp_llm.linalg.least_squares import repair
from snp_llm.linalg.ordering import OrderingProblem, order_units
from snp_llm.linalg.units import unit_channels
from snp_llm.models.anatomy import find_anatomy
from snp_llm.models.blocks import capture_calls, run_block
from snp_llm.models.site import Site, site_weight
from snp_llm.pruning.repair import DAMPENINGS
from snp_llm.pruning.taps import tapped


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument(
        "--text", action="append", required=True, metavar="NAME=TEXT", help="dampening: half of the first"
    )
    parser.add_argument("--windows", type=int, default=16, help="to calibrate on, and of each text")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--blocks", type=lambda text: [int(n) for n in text.split(",")], default=[0])
    parser.add_argument("--kept", type=lambda text: [float(n) for n in text.split(",")], default=[0.8, 0.5])
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    model, tokenizer = checkpoint.load(args.model, "float32")
    texts = dict(text.split("=", 1) for text in args.text)
    tokens = [
        evaluation_windows(tokenizer, Dataset(text), seq_len=args.seq_len, max_windows=args.windows).tokens
        for text in (args.calibration, *texts.values())
    ]
    first, *others = tokens
    parts = [first, *others[0].tensor_split(2), *others[1:]]
    anatomy = find_anatomy(model, "auto", "never")
    hidden, calls = capture_calls(model, anatomy.blocks, torch.cat(parts))
    print("| site | tokens a channel | kept | text | none | ridge | rotation | scaled | both |")
    print(f"|---|{'---:|' * 8}")
    for index in range(max(args.blocks) + 1):
        block, sites = anatomy.blocks[index], anatomy.sites_of(index)
        with tapped(block, sites) as taps:
            output = run_block(block, hidden, calls[index])
            inputs = taps.read(hidden, output)
        hidden = output
        for site, x in zip(sites, inputs, strict=True):
            if index in args.blocks and x is not None:
                grams = [gram(some) for some in x.double().flatten(0, -2).split([part.numel() for part in parts])]
                for share in args.kept:
                    row = errors(site, site_weight(block, site).double(), grams, share)
                    for name, found in zip(texts, row, strict=True):
                        cells = " | ".join(f"{error:.4f}" for error in found)
                        print(f"| {site.name} | {first.numel() / x.shape[-1]:.1f} | {share} | {name} | {cells} |")


def gram(inputs: Tensor) -> Tensor:
    """`X^T X` of inputs, (tokens, n)."""
    return inputs.T @ inputs


def errors(site: Site, W: Tensor, grams: list[Tensor], share: float) -> list[list[float]]:
    """Relative errors without repair, of the ridge, the rotation, that with a scale, and both, on each text.

    Args:
        site: that is cut.
        W: its out-projection weight, (d_out, n).
        grams: of the calibration text, of the half that chooses the dampening, and of what is reported.
        share: of the units that stay.
    """
    fit, choosing, *reported = grams
    fit.diagonal().add_((fit.diagonal() == 0).double())  # a dead channel is repaired by nothing and repairs nothing
    problem = OrderingProblem(make_definite(fit.clone(), 0.1), W, torch.zeros(site.units), site.unit_size, 0)
    K = unit_channels(order_units("obs", problem)[: max(1, round(share * site.units))].sort().values, site.unit_size)
    gone = torch.ones(len(fit), dtype=torch.bool).index_fill_(0, K, False)
    cross = W[:, gone] @ fit[gone][:, K]
    ridges = [W[:, K] + repair(fit[K][:, K].clone(), cross.clone(), dampening) for dampening in DAMPENINGS]
    ridge = min(ridges, key=lambda weight: error(W, K, weight, choosing))
    rotations = [rotated(W, fit, K, scaled=scaled) for scaled in (False, True)]
    candidates = [W[:, K], ridge, *rotations, turned(W, fit, K, ridge)]
    return [[error(W, K, weight, of) for weight in candidates] for of in reported]


def turned(W: Tensor, fit: Tensor, K: Tensor, weight: Tensor) -> Tensor:
    """`Q M` with the orthogonal Q that minimises `||W X - Q M X_K||`, for the weight M on channels K."""
    U, _, Vh = torch.linalg.svd(W @ fit[:, K] @ weight.T)
    return U @ Vh @ weight


def error(W: Tensor, K: Tensor, weight: Tensor, of: Tensor) -> float:
    """`||W X - M X_K||^2 / ||W X||^2` for the weight M on channels K, from the Gram matrix of X."""
    lost = W.clone()
    lost[:, K] -= weight
    return float(((lost @ of) * lost).sum() / ((W @ of) * W).sum())


if __name__ == "__main__":
    main()
