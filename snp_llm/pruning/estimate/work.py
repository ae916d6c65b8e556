"""FLOPs of a run by phase, and the speed of this machine. Allocates nothing of the run."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.linalg.gram import multiplied_as
from snp_llm.linalg.ordering import ZCA_EXACT_UP_TO
from snp_llm.linalg.quadrature import LEAST_SIGNS
from snp_llm.pruning.estimate.shapes import SHARE_OF_GRAM, Shapes
from snp_llm.pruning.repair import DAMPENINGS, VIEWS
from snp_llm.pruning.statistics import SINGLE_PRECISION_FROM
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.device import ONCE, synchronize

# Factorisations, solves and the many narrow updates of an ordering do not reach the rate of one large product. On a CPU
# they come to about this share of it.
ALGEBRA_SPEED = 0.4

EIGENDECOMPOSITION = 9  # n^3 times so many

PROBE_SECONDS = 0.2


@dataclass(frozen=True)
class Work:
    """FLOPs of one step, in the dtype in which they are done; `algebra` where they are factorisations."""

    what: str
    flops: float
    dtype: torch.dtype
    algebra: bool = False


def matmul_rates(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, float]:
    """FLOPs a second of a large product, by dtype, probed for a fifth of a second in all."""
    wanted = list(dtypes)
    rates = {}
    for dtype in wanted:
        if dtype == torch.float64 and device.type == "mps":
            rates[dtype] = matmul_rates(torch.device("cpu"), [dtype])[dtype]  # where its float64 is computed
            continue
        size = 512 if device.type == "cpu" else 4096
        a = torch.randn(size, size, device=device).to(dtype)
        a @ a
        synchronize(device)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < PROBE_SECONDS / len(wanted):
            a @ a
            synchronize(device)
            count += 1
        rates[dtype] = 2 * size**3 * count / (time.perf_counter() - start)
    return rates


def work_by_phase(shapes: Shapes, recipe: Recipe) -> list[Work]:
    """FLOPs of every step; a product of (a, b) and (b, c) is 2abc."""
    d, T = shapes.hidden, shapes.seq_len
    tokens, referred, seen, back = (
        n * T for n in (shapes.windows, shapes.reference_windows, shapes.curve_windows, shapes.gradient_windows)
    )
    sites = [(s.channels, s) for s in shapes.all_sites]
    scores = sum(4.0 * n * (T + 1) / 2 for n, s in sites if s.heads is not None)
    forward = 2.0 * shapes.size.block_linear + scores
    ffn = 2.0 * sum(s.parameters for _, s in sites if s.kind == "ffn")
    out_ffn = sum(2.0 * d * n for n, s in sites if s.kind == "ffn")
    wide = multiplied_as(shapes.dtype, torch.promote_types(shapes.dtype, torch.float32), shapes.device)
    holding = len(DAMPENINGS) if recipe.dampening is None else 1
    drifting = recipe.reference != "self"
    work = []
    gram = sum(2.0 * n * n * SHARE_OF_GRAM for n, _ in sites)
    if recipe.needs_gradients:
        moments = 2.0 * d * d * SHARE_OF_GRAM * len(sites)
        work += [
            Work("visit: there and back", 3 * forward * back, shapes.dtype),
            Work(f"visit: {ONCE}", 4.0 * d * shapes.vocabulary * back, shapes.dtype),
            Work("visit: sums of gradients", moments * back, wide),
        ]
    if recipe.allocation in NEEDS_CURVES:
        curves = [(n, _factor_flops(n, d, recipe) + 2.0 * d * n * n) for n, _ in sites]
        if recipe.needs_gradients:
            curves += [(n, 2.0 * n**3 + 2 * d * d * n + 2 * d * n * n) for n, _ in sites]
        work += [Work("visit: forwards", forward * seen, shapes.dtype), Work("visit: sums", gram * seen, wide)]
        work += _algebra_work("visit: linear algebra", curves)
    if drifting:
        work.append(Work("reference of the dense model", forward * referred, shapes.dtype))
    # Once all that is before the FFN, the FFN's inputs, and the FFN with its new weights.
    passes = forward + ffn - out_ffn
    work.append(Work("pruned pass", passes * tokens, shapes.dtype))
    cross = sum(2.0 * d * n for n, _ in sites) if drifting else 0.0
    work.append(Work("sums", gram * tokens + cross * referred, wide))
    if drifting:  # outputs, taken off their reference in the sums
        outputs = sum(2.0 * d * n * n for n, _ in sites) * (1 + recipe.holds_out)
        work.append(Work("sums of outputs", outputs, torch.promote_types(shapes.dtype, torch.float32)))
    cuts = []
    for n, site in sites:
        k = (1 - recipe.sparsity_of(site.kind)) * n
        rows = VIEWS if d >= 2 * VIEWS else d
        repairs = 2 if drifting else 1
        chosen = holding * (k**3 / 3 + repairs * 4 * rows * k * k) if recipe.holds_out else 0.0
        chosen += repairs * (k**3 / 3 + 2 * d * k * k)  # what is chosen, from all tokens
        kept = 0.0 if site.groups else k  # of groups some go that are not among the worst
        cuts.append((n, _factor_flops(n, d, recipe, kept) + chosen + 6.0 * d * n * n))
    work += _algebra_work("linear algebra", cuts)
    return work


def _algebra_work(name: str, flops: Sequence[tuple[int, float]]) -> list[Work]:
    """What is done to sites of so many channels, by the type that it is done in."""
    single = sum(done for n, done in flops if n >= SINGLE_PRECISION_FROM)
    double = sum(done for n, done in flops if n < SINGLE_PRECISION_FROM)
    both = ((single, torch.float32), (double, torch.float64))
    return [Work(name, done, dtype, algebra=True) for done, dtype in both if done]


def _factor_flops(n: int, d: int, recipe: Recipe, kept: float = 0.0) -> float:
    """A Cholesky factorisation before ordering and one after, what the ordering takes, and the metric's root."""
    flops = 2 * n**3 / 3
    if recipe.ordering in ("greedy", "obs", "residual"):
        flops += 2 * n**3 / 3  # the inverse
    if recipe.ordering == "greedy":
        # Inverse and weights brought up to date for everything that goes, a new inverse at every halving.
        flops += 2 * (n**3 - kept**3) / 3 + d * (n * n - kept * kept)
        flops += sum((n / 2**halvings) ** 3 for halvings in range(1, 8) if n / 2**halvings >= max(kept, 1))
    if recipe.ordering == "zca-exact" or (recipe.ordering == "zca" and n <= ZCA_EXACT_UP_TO):
        flops += EIGENDECOMPOSITION * n**3
    elif recipe.ordering == "zca":
        flops += n**3 / 3 + 2 * n * n * max(LEAST_SIGNS, n // 32)  # columns of the inverse factor, random projections
    if recipe.needs_gradients:
        flops += d**3 / 3  # the root
    return flops
