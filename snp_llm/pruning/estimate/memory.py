"""Bytes that each phase of a run holds, on the device, in host memory and on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from snp_llm.models.size import ModelSize
from snp_llm.pruning.estimate.shapes import Shapes
from snp_llm.pruning.statistics import ALGEBRA_MATRICES, FILES_FROM, SINGLE_PRECISION_FROM
from snp_llm.recipe.recipe import Recipe

LIBRARIES = 600_000_000  # bytes that Python, torch, transformers and the dataset library take with nothing loaded


@dataclass(frozen=True)
class Part:
    """Bytes of one thing during one phase.

    Attributes:
        phase: of the run; "all" for what is always there. Sums and algebra of the visit to the dense model, and of the
            pruned pass, are phases of their own: activations have gone when a site is factored.
        place: "device", "host" or "disk".
        kind: key of `REMEDIES`.
        what: for people.
        bytes: of it.
    """

    phase: str
    place: str
    kind: str
    what: str
    bytes: int


def peak_part(parts: Sequence[Part], place: str) -> list[Part]:
    """The parts of the phase that takes most, with those that are always there."""
    here = [part for part in parts if part.place == place]
    phases = {part.phase for part in here} - {"all"}
    total = {phase: sum(part.bytes for part in here if part.phase in (phase, "all")) for phase in phases}
    peak = max(total, key=lambda phase: total[phase], default="all")
    return [part for part in here if part.phase in (peak, "all")]


def _hidden_part(phase: str, kind: str, what: str, count: int, recipe: Recipe) -> Part:
    """Hidden states, wherever they wait."""
    place = {"disk": "disk", "cpu": "host"}.get(recipe.hidden_device, "device")
    if kind == "hidden" and place != "host":
        kind = f"hidden on {place}"
    return Part(phase, place, kind, what, count)


def always_held(shapes: Shapes, recipe: Recipe) -> list[Part]:
    staged = 0 if shapes.device == "cpu" else 2 * shapes.block_bytes
    return [
        Part("all", "host", "libraries", "Python and its libraries", LIBRARIES),
        Part("all", "host", "rest", "embeddings, norms and head", shapes.rest_bytes),
        Part("all", "host", "block", "a block read and a block written", staged),
        Part("all", "host", "tokens", "calibration text", shapes.windows * shapes.seq_len * 8 * 9),  # 32 characters
    ]


def _activations(shapes: Shapes, *, kept: bool) -> int:
    """Bytes of one batch inside a block; `kept` for the way back, else only those alive at the widest place."""
    tokens, (attended, inner) = shapes.batch * shapes.seq_len, shapes.widths
    scores = shapes.batch * shapes.query_heads * shapes.seq_len**2 if shapes.eager else 0
    projections = attended * 2 + 2 * shapes.kv_channels
    copies = 2 if shapes.ungated else 4  # of the FFN's width: gate, up, activation, product
    attention = tokens * (2 * shapes.hidden + projections) * shapes.item + scores * (2 * shapes.item + 4)
    ffn = tokens * (3 * shapes.hidden + copies * inner) * shapes.item
    # Sums are taken in float32: a copy of the inputs, split into windows held out and others. (Where half precision is
    # multiplied as it is, a product of column blocks takes the place of one copy, and is smaller.)
    wide = tokens * max(attended, inner) * (4 + shapes.item)
    return attention + ffn + wide + (attention + ffn if kept else 0) if kept else max(attention, ffn) + wide


def _sums(n: int, d: int, *, drifting: bool, holding_out: bool, unreferred: bool) -> int:
    return 4 * ((n * n + (d * n if drifting else 0)) * (2 if holding_out else 1) + n * n * unreferred)


def _sums_parts(
    phase: str, widths: Sequence[int], shapes: Shapes, recipe: Recipe, *, drifting: bool, holding_out: bool
) -> list[Part]:
    """Sums of sites, wherever they wait while they are factored."""
    sizes = {"device": 0, "disk": 0}
    for n in widths:
        in_files = recipe.hidden_device == "disk" and shapes.device == "cpu" and n >= FILES_FROM
        unreferred = drifting and shapes.reference_windows < shapes.windows
        size = _sums(n, shapes.hidden, drifting=drifting, holding_out=holding_out, unreferred=unreferred)
        sizes["disk" if in_files else "device"] += size
    kinds = {"device": "sums", "disk": "hidden on disk"}
    return [Part(phase, place, kinds[place], "sums of inputs", size) for place, size in sizes.items() if size]


def _algebra(n: int, shapes: Shapes, recipe: Recipe) -> int:
    """Matrices as wide as the site, weights (W, weighted, W L, W'), and the metric with its root."""
    wide, d = (4 if n >= SINGLE_PRECISION_FROM else 8), shapes.hidden
    return wide * (ALGEBRA_MATRICES * n * n + 4 * d * n + (3 * d * d if recipe.needs_gradients else 0))


def prune_memory(shapes: Shapes, recipe: Recipe) -> list[Part]:
    d, tokens = shapes.hidden, shapes.windows * shapes.seq_len
    drifting = recipe.reference != "self"
    stream = tokens * d * shapes.item
    inputs = tokens * shapes.widths[0] * shapes.item
    widest = max(shapes.widths)
    always = [
        Part("prune", "device", "block", "a dense block and its copy", 2 * shapes.block_bytes),
        *_sums_parts("prune", [widest], shapes, recipe, drifting=drifting, holding_out=recipe.holds_out),
        _hidden_part("prune", "hidden", "hidden states of the calibration tokens", stream + stream + inputs, recipe),
    ]
    if drifting:
        what = "hidden states of the dense model"
        of_references = 3 * stream * shapes.reference_windows // shapes.windows
        always.append(_hidden_part("prune", "hidden", what, of_references, recipe))
    algebra = _algebra(widest, shapes, recipe)
    return _summed_and_factored("prune", always, _activations(shapes, kept=False), algebra)


def _summed_and_factored(phase: str, always: Sequence[Part], activations: int, algebra: int) -> list[Part]:
    """The two halves of a phase: activations come in batches, and the algebra of a site after the last of them."""
    halves = (
        Part(f"{phase}, sums", "device", "activations", "activations of one batch", activations),
        Part(f"{phase}, algebra", "device", "algebra", "linear algebra of a site", algebra),
    )
    return [part for half in halves for part in (half, *(replace(p, phase=half.phase) for p in always))]


def gradient_memory(shapes: Shapes, recipe: Recipe) -> list[Part]:
    d, tokens = shapes.hidden, shapes.gradient_windows * shapes.seq_len
    kept = (shapes.blocks + 2) * tokens * d * shapes.item
    hidden = _hidden_part("gradients", "visit", "what enters every block, kept for the way back", kept, recipe)
    logits = shapes.seq_len * shapes.vocabulary * (shapes.item + 3 * 4)
    return [
        Part("gradients", "device", "block", "a dense block", shapes.block_bytes),
        Part("gradients", "device", "sums", "gradient moments of both sites", 2 * 4 * d * d),
        Part("gradients", "device", "activations", "activations of one batch", _activations(shapes, kept=True)),
        Part("gradients", "host", "gradients", "gradients of a block's sites", 2 * 2 * 4 * d * d),
        hidden,
        # The loss comes between the ways there and back, when no block is there.
        Part("loss", "device", "rest", "embeddings, norms and head", shapes.rest_bytes * (shapes.device != "cpu")),
        Part("loss", "device", "logits", "logits of one window and their gradient", logits),
        replace(hidden, phase="loss"),
    ]


def curve_memory(shapes: Shapes, recipe: Recipe) -> list[Part]:
    stream = shapes.curve_windows * shapes.seq_len * shapes.hidden * shapes.item
    always = [
        Part("curves", "device", "block", "a dense block", shapes.block_bytes),
        *_sums_parts("curves", shapes.widths, shapes, recipe, drifting=False, holding_out=recipe.needs_gradients),
        _hidden_part("curves", "visit", "hidden states of the visit", stream, recipe),
    ]
    algebra = _algebra(max(shapes.widths), shapes, recipe)
    return _summed_and_factored("curves", always, _activations(shapes, kept=False), algebra)


def disk_needed(shapes: Shapes, recipe: Recipe) -> list[Part]:
    d = shapes.hidden
    stream = shapes.windows * shapes.seq_len * d * shapes.item
    snapshots = stream + stream * shapes.reference_windows // shapes.windows
    parts = [
        Part(
            "all",
            "disk",
            "model",
            "the pruned model, block by block and then in shards",
            2 * pruned_bytes(shapes.size, recipe),
        ),
        Part("all", "disk", "hidden on disk", "hidden states, from which to resume", snapshots),
    ]
    if recipe.needs_gradients:
        gradients = sum(4 * d * d for _ in shapes.all_sites)
        parts.append(Part("all", "disk", "gradients", "gradients of all sites", gradients))
    return parts


def pruned_bytes(size: ModelSize, recipe: Recipe) -> int:
    """Bytes of the pruned model's weights; of the dense model's where the budget does not say."""
    item = size.bytes / size.parameters
    budget = recipe.budget
    if recipe.layout == "padded" or recipe.perplexity_increase is not None:
        return size.bytes
    if budget is None:
        both = [sparsity for kinds, sparsity in recipe.sparsities for _ in kinds]
        # FFN and heads with budgets of their own: the smaller of both, so as to err on the large side.
        return round(size.bytes - min(both) * size.block_linear * item)
    if budget.relative and budget.kind in ("params", "size"):
        return round(budget.amount * size.bytes)
    if budget.kind == "params":
        return min(size.bytes, round(budget.amount * item))
    return min(size.bytes, round(budget.amount)) if budget.kind == "size" else size.bytes
