"""FLOPs of each phase of a run, by the type that they are done in. Adds up what the phases' own modules say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from snp_llm.linalg.gram import drift_flops, multiplied_as, triangle_flops
from snp_llm.models.anatomy import embedding_rows
from snp_llm.models.site import Site
from snp_llm.models.size import linear_weights, mean_positions, routed_weights, token_flops
from snp_llm.pruning.algebra import algebra_dtype
from snp_llm.pruning.cut import cut_flops
from snp_llm.pruning.estimate.shapes import Shapes
from snp_llm.pruning.factor import factor_flops, loss_curve_flops
from snp_llm.pruning.refine import refine_tokens
from snp_llm.runtime.device import ONCE

# Factorisations, solves and the many narrow updates of an ordering do not reach the rate of one large product. On a CPU
# they come to about this share of it.
ALGEBRA_SPEED = 0.4


@dataclass(frozen=True)
class Work:
    """FLOPs of one step, in the dtype in which they are done; `algebra` where they are factorisations."""

    what: str
    flops: float
    dtype: torch.dtype
    algebra: bool = False


def work_by_phase(shapes: Shapes) -> Iterator[Work]:
    """FLOPs of every step that takes any."""
    recipe, d, dtype = shapes.recipe, shapes.hidden, shapes.anatomy.model.dtype
    visited_sites, sites = shapes.anatomy.sites, shapes.inside
    tokens, referred, visited, gone_back = (
        windows * recipe.seq_len for windows in (recipe.num_samples, shapes.referred, shapes.visited, shapes.gone_back)
    )
    sums = torch.promote_types(dtype, torch.float32)
    wide = multiplied_as(dtype, sums, shapes.device)
    attended = sum(s.channels for s in sites if s.heads is not None)
    weights = sum(map(linear_weights, shapes.anatomy.blocks)) + routed_weights(shapes.anatomy.model)
    forward = token_flops(weights, attended, mean_positions(recipe.seq_len))
    looked_at, moments = (sum(s.passes * triangle_flops(s.channels) for s in some) for some in (visited_sites, sites))
    if gone_back:
        # Forwards, forwards once more, and back to a block's input alone; of the head back and forth.
        yield Work("visit: there and back", 3 * forward * gone_back, dtype)
        yield Work(f"visit: {ONCE}", 2 * token_flops(d * embedding_rows(shapes.anatomy.model), 0, 0) * gone_back, dtype)
        yield Work("visit: sums of gradients", len(visited_sites) * triangle_flops(d) * gone_back, wide)
    if visited:
        yield Work("visit: forwards", forward * visited, dtype)
        yield Work("visit: sums", looked_at * visited, wide)
        read = [loss_curve_flops(d, s.channels) if gone_back else 0.0 for s in visited_sites]
        curves = [
            s.parts * (factor_flops(d, s.channels, recipe) + more) for s, more in zip(visited_sites, read, strict=True)
        ]
        yield from _algebra("visit: linear algebra", dtype, visited_sites, curves)
    if shapes.measured:  # each from its block on, and through the head
        tried, head = len(shapes.cuts), token_flops(d * embedding_rows(shapes.anatomy.model), 0, 0)
        passed = (tried / 2 + 1) * forward + (tried + 1) * head
        yield Work("visit: measured cuts", passed * shapes.measured * recipe.seq_len, dtype)
    refined = shapes.refined * recipe.seq_len
    if referred or refined:
        yield Work("reference of the dense model", forward * max(referred, refined), dtype)
    # Once all that is before the FFN, the FFN's inputs, and the FFN with its new weights.
    ffn = sum(s.parameters - d * s.channels for s in sites if s.kind == "ffn")
    yield Work("pruned pass", (forward + token_flops(ffn, 0, 0)) * tokens, dtype)
    cross = sum(token_flops(d * s.channels, 0, 0) for s in sites if s.mixture is None)
    yield Work("sums", moments * tokens + cross * referred, wide)
    if referred:
        outputs = sum(drift_flops(d, s.channels) for s in sites if s.mixture is None)
        yield Work("sums of outputs", outputs * (1 + recipe.holds_out), sums)
    widths = [s.units if recipe.depth == "only" else round((1 - recipe.sparsity_of(s.kind)) * s.units) for s in sites]
    cuts = [site.parts * cut_flops(d, site, width, recipe) for site, width in zip(sites, widths, strict=True)]
    yield from _algebra("linear algebra", dtype, sites, cuts)
    if refined:
        gone = sum(s.units * s.cost * recipe.sparsity_of(s.kind) for s in sites if not s.nested)
        kept = 1 - gone / max(shapes.size.block_linear, 1)
        passes = refine_tokens(recipe.refine_steps or 0, shapes.refined, recipe.seq_len)
        yield Work("refinement", kept * forward * passes, sums)


def _algebra(what: str, given: torch.dtype, sites: Sequence[Site], flops: Sequence[float]) -> Iterator[Work]:
    """What is done at every site, by the type that it is done in."""
    types = [algebra_dtype(site.channels, given) for site in sites]
    for dtype in sorted(set(types), key=str):
        done = sum(count for count, its in zip(flops, types, strict=True) if its == dtype)
        yield Work(what, done, dtype, algebra=True)
