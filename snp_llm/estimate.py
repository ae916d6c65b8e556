"""What a prune takes: device memory, host memory, disk and FLOPs, from shapes alone. Knows no weights and cuts nothing.

It describes pruning that reads the dense blocks from disk one at a time. Every part of the sums has a name, so that a
refusal can say which option makes the largest one smaller.
"""

import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from snp_llm.device import ONCE, device_name, synchronize
from snp_llm.errors import SnpError
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.linalg.gram import multiplied_as
from snp_llm.linalg.ordering import LEAST_SIGNS, ZCA_EXACT_UP_TO
from snp_llm.measure import ModelSize, model_size
from snp_llm.models.families import Site, embedding_rows, find_blocks, find_family, find_sites
from snp_llm.recipe import Recipe
from snp_llm.site import DAMPENINGS, VIEWS
from snp_llm.sums import ALGEBRA_MATRICES, FILES_FROM, SINGLE_PRECISION_FROM, enough_windows
from snp_llm.visit import gradient_windows

LIBRARIES = 600_000_000  # bytes that Python, torch, transformers and the dataset library take with nothing loaded
SHARE_OF_GRAM = 9 / 16  # of the products of a Gram matrix, those that are computed
# Factorisations, solves and the many narrow updates of an ordering do not reach the rate of one large product. On a CPU
# they come to about this share of it.
ALGEBRA_SPEED = 0.4
EIGENDECOMPOSITION = 9  # n^3 times so many
PROBE_SECONDS = 0.2
REMEDIES = {
    "block": "--dtype bfloat16",
    "activations": "a smaller --batch-size or --seq-len",
    "logits": "a smaller --seq-len",
    "sums": "--ordering zca --target self --dampening 0.1, which hold fewer sums; on a CPU, --hidden-device disk",
    "algebra": "a device with more memory; matrices as wide as the FFN cannot be smaller",
    "rest": "--dtype bfloat16",
    "hidden": "--hidden-device disk, or fewer --num-samples",
    "hidden on device": "--hidden-device cpu, or fewer --num-samples",
    "hidden on disk": "fewer --num-samples or a smaller --seq-len",
    "visit": "--hidden-device disk, or --allocation uniform --metric error",
    "tokens": "fewer --num-samples",
    "libraries": "a machine with more memory",
    "model": "--dtype bfloat16, or an --output on another disk",
    "gradients": "--allocation uniform --metric error, or an --output on another disk",
}


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


@dataclass(frozen=True)
class Work:
    """FLOPs of one step, in the dtype in which they are done; `algebra` where they are factorisations."""

    what: str
    flops: float
    dtype: torch.dtype
    algebra: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a prune takes at its peak. Where the device is the CPU, host memory holds the device's part as well.

    Attributes:
        device_bytes, host_bytes, disk_bytes: the largest of the phases' sums.
        breakdown: all parts.
        work: all FLOPs.
    """

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    breakdown: tuple[Part, ...]
    work: tuple[Work, ...]

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.work)

    def parts(self, place: str) -> list[Part]:
        """The parts that make up the peak of a place, largest first."""
        return sorted(_peak(self.breakdown, place), key=lambda part: -part.bytes)

    def seconds(self, rates: Mapping[torch.dtype, float]) -> float:
        """Roughly how long, from FLOPs a second by dtype (`matmul_rates`)."""
        return sum(w.flops / rates[w.dtype] / (ALGEBRA_SPEED if w.algebra else 1.0) for w in self.work)

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {work.dtype for work in self.work}


def estimate(model: PreTrainedModel, recipe: Recipe) -> Estimate:
    """What `recipe` takes on a model; weights are not looked at, so that a skeleton on the meta device will do.

    Evaluation is left out: it takes a whole model on the device where that fits, and is skipped where it does not.

    Args:
        model: dense model, or its skeleton.
        recipe: all settings, resolved (`pipeline.resolve`).
    """
    assert recipe.seq_len is not None
    shapes = _shapes(model, recipe)
    parts = [*_always(shapes, recipe), *_prune_memory(shapes, recipe), *_disk(shapes, recipe)]
    if recipe.needs_gradients:
        parts += _gradient_memory(shapes, recipe)
    if recipe.allocation in NEEDS_CURVES:
        parts += _curve_memory(shapes, recipe)
    parts = [part for part in parts if part.bytes]
    on_cpu = shapes.device == "cpu"
    if on_cpu:
        parts = [replace(part, place="host") if part.place == "device" else part for part in parts]
    sums = {place: sum(part.bytes for part in _peak(parts, place)) for place in ("device", "host", "disk")}
    work = tuple(w for w in _work(shapes, recipe) if w.flops)
    return Estimate(sums["device"], sums["host"], sums["disk"], tuple(parts), work)


def refuse_what_cannot_fit(needed: Estimate, device: torch.device, hidden_device: str, output_folder: Path) -> None:
    """Compares an estimate with what is free now.

    Args:
        needed: by a run.
        device: that it computes on.
        hidden_device: where its hidden states wait.
        output_folder: that it writes, there or not yet.

    Raises:
        SnpError: something does not fit, with the option that helps.
    """
    parent = output_folder.absolute()
    while not parent.exists():
        parent = parent.parent
    free = {"host": free_host_bytes(), "disk": shutil.disk_usage(parent).free}
    if device.type == "cuda":
        free["device"] = torch.cuda.mem_get_info(device)[0]
    names = {"device": f"memory of {device}", "host": "host memory", "disk": f"disk at {parent}"}
    wanted = {"device": needed.device_bytes, "host": needed.host_bytes, "disk": needed.disk_bytes}
    for place in ("device", "host", "disk"):
        if place not in free or wanted[place] <= free[place]:
            continue
        parts = needed.parts(place)
        largest = parts[0]
        # What no option makes smaller is not worth naming while something else can give way enough.
        for part in parts:
            if part.kind not in ("libraries", "algebra") and wanted[place] - part.bytes <= free[place]:
                largest = part
                break
        remedy = REMEDIES[largest.kind]
        if largest.kind in ("hidden", "visit") and hidden_device == "disk":
            remedy = "fewer --num-samples or a smaller --batch-size"
        raise SnpError(
            f"{names[place]}: about {human_bytes(wanted[place])} needed, {human_bytes(free[place])} free. "
            f"{largest.what[0].upper()}{largest.what[1:]} takes {human_bytes(largest.bytes)} of it: use {remedy}."
        )


def free_host_bytes() -> int:
    """Memory that a process may still take, without swapping where the system says so, within its control group."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int(used.read_text()))
    return free


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


def human_bytes(count: float) -> str:
    """1,234,567,890 as "1.23 GB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """1,234,567 as "1.23M", as budgets are written."""
    return _scaled(count, ("", "K", "M", "B", "T")).replace(" ", "")


def human_flops(count: float) -> str:
    """1.2e15 as "1.2 PFLOPs"."""
    return _scaled(count / 1e6, ("MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs"))


def _scaled(count: float, units: Sequence[str]) -> str:
    """In the first unit, each a thousand of the one before, that leaves three digits; in the last at most."""
    for unit in units[:-1]:
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} {units[-1]}"


def human_time(seconds: float) -> str:
    """Seconds, minutes, hours or days, in two digits."""
    limits = ((90, 1, "seconds"), (5400, 60, "minutes"), (48 * 3600, 3600, "hours"), (float("inf"), 86_400, "days"))
    size, name = next((size, name) for limit, size, name in limits if seconds < limit)
    return f"{seconds / size:.2g} {name}" if seconds < 10 * size else f"{seconds / size:,.0f} {name}"


# What follows is one function for each phase; all sizes are in bytes or in elements, as their names say.


@dataclass(frozen=True)
class _Shapes:
    """Everything that the sums need.

    Attributes:
        size: of the dense model.
        sites: of one block each: the widest attention and the widest FFN.
        all_sites: of all blocks.
        blocks: how many.
        block_bytes: of the largest block.
        rest_bytes: of embeddings, norms and head.
        hidden: d.
        vocabulary: rows of the head.
        query_heads: of the widest attention.
        kv_channels: of keys in the widest attention.
        item: bytes of a weight.
        dtype: of the weights.
        eager: whether attention scores are materialised.
        device: kind.
        windows, seq_len, batch: of calibration.
        target_windows: those with targets, of the first ones; 0 without targets.
        curve_windows, gradient_windows: of the visit, 0 where it reads no such thing.
    """

    size: ModelSize
    sites: tuple[Site, Site]
    all_sites: Sequence[Site]
    blocks: int
    block_bytes: int
    rest_bytes: int
    hidden: int
    vocabulary: int
    query_heads: int
    kv_channels: int
    item: int
    dtype: torch.dtype
    eager: bool
    device: str
    windows: int
    seq_len: int
    batch: int
    target_windows: int
    curve_windows: int
    gradient_windows: int

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the out-projections' inputs."""
        return self.sites[0].channels, self.sites[1].channels

    @property
    def ungated(self) -> bool:
        """Whether the FFN has a single in-projection, of the width of its out-projection."""
        return self.sites[1].parameters == 2 * self.hidden * self.widths[1]


def _shapes(model: PreTrainedModel, recipe: Recipe) -> _Shapes:
    assert recipe.seq_len is not None
    family = find_family(model.config)
    blocks = find_blocks(model, family)
    sites = find_sites(blocks, family, recipe.head_unit)
    attention = max(sites[::2], key=lambda s: s.parameters)
    ffn = max(sites[1::2], key=lambda s: s.parameters)
    heads = attention.heads
    assert heads is not None
    size = model_size(model, recipe.seq_len)
    enough = enough_windows(max(s.channels for s in sites), recipe.seq_len)
    hidden = int(model.config.hidden_size)
    curves = enough if recipe.allocation in NEEDS_CURVES else 0
    targeted = enough if recipe.target != "self" else 0
    gradients = gradient_windows(hidden, recipe.seq_len) if recipe.needs_gradients else 0
    each = [_bytes(block) for block in blocks]
    return _Shapes(
        size=size,
        sites=(attention, ffn),
        all_sites=sites,
        blocks=len(blocks),
        block_bytes=max(each),
        rest_bytes=size.bytes - sum(each),
        hidden=hidden,
        vocabulary=embedding_rows(model),
        query_heads=heads.query,
        kv_channels=heads.key_value * heads.size,
        item=model.dtype.itemsize,
        dtype=model.dtype,
        eager=model.config._attn_implementation == "eager",
        device=device_name(recipe.device),
        windows=recipe.num_samples,
        seq_len=recipe.seq_len,
        batch=min(recipe.batch_size, recipe.num_samples),
        target_windows=min(targeted, recipe.num_samples),
        curve_windows=min(curves, recipe.num_samples),
        gradient_windows=min(gradients, recipe.num_samples),
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _peak(parts: Sequence[Part], place: str) -> list[Part]:
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


def _always(shapes: _Shapes, recipe: Recipe) -> list[Part]:
    staged = 0 if shapes.device == "cpu" else 2 * shapes.block_bytes
    return [
        Part("all", "host", "libraries", "Python and its libraries", LIBRARIES),
        Part("all", "host", "rest", "embeddings, norms and head", shapes.rest_bytes),
        Part("all", "host", "block", "a block read and a block written", staged),
        Part("all", "host", "tokens", "calibration text", shapes.windows * shapes.seq_len * 8 * 9),  # 32 characters
    ]


def _activations(shapes: _Shapes, *, kept: bool) -> int:
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


def _sums(n: int, d: int, *, drifting: bool, holding_out: bool, untargeted: bool) -> int:
    return 4 * ((n * n + (d * n if drifting else 0)) * (2 if holding_out else 1) + n * n * untargeted)


def _sums_parts(
    phase: str, widths: Sequence[int], shapes: _Shapes, recipe: Recipe, *, drifting: bool, holding_out: bool
) -> list[Part]:
    """Sums of sites, wherever they wait while they are factored."""
    sizes = {"device": 0, "disk": 0}
    for n in widths:
        in_files = recipe.hidden_device == "disk" and shapes.device == "cpu" and n >= FILES_FROM
        untargeted = drifting and shapes.target_windows < shapes.windows
        size = _sums(n, shapes.hidden, drifting=drifting, holding_out=holding_out, untargeted=untargeted)
        sizes["disk" if in_files else "device"] += size
    kinds = {"device": "sums", "disk": "hidden on disk"}
    return [Part(phase, place, kinds[place], "sums of inputs", size) for place, size in sizes.items() if size]


def _algebra(n: int, shapes: _Shapes, recipe: Recipe) -> int:
    """Matrices as wide as the site, weights (W, weighted, W L, W'), and the metric with its root."""
    wide, d = (4 if n >= SINGLE_PRECISION_FROM else 8), shapes.hidden
    return wide * (ALGEBRA_MATRICES * n * n + 4 * d * n + (3 * d * d if recipe.needs_gradients else 0))


def _prune_memory(shapes: _Shapes, recipe: Recipe) -> list[Part]:
    d, tokens = shapes.hidden, shapes.windows * shapes.seq_len
    drifting = recipe.target != "self"
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
        of_targets = 3 * stream * shapes.target_windows // shapes.windows
        always.append(_hidden_part("prune", "hidden", what, of_targets, recipe))
    algebra = _algebra(widest, shapes, recipe)
    return _summed_and_factored("prune", always, _activations(shapes, kept=False), algebra)


def _summed_and_factored(phase: str, always: Sequence[Part], activations: int, algebra: int) -> list[Part]:
    """The two halves of a phase: activations come in batches, and the algebra of a site after the last of them."""
    halves = (
        Part(f"{phase}, sums", "device", "activations", "activations of one batch", activations),
        Part(f"{phase}, algebra", "device", "algebra", "linear algebra of a site", algebra),
    )
    return [part for half in halves for part in (half, *(replace(p, phase=half.phase) for p in always))]


def _gradient_memory(shapes: _Shapes, recipe: Recipe) -> list[Part]:
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


def _curve_memory(shapes: _Shapes, recipe: Recipe) -> list[Part]:
    stream = shapes.curve_windows * shapes.seq_len * shapes.hidden * shapes.item
    always = [
        Part("curves", "device", "block", "a dense block", shapes.block_bytes),
        *_sums_parts("curves", shapes.widths, shapes, recipe, drifting=False, holding_out=recipe.needs_gradients),
        _hidden_part("curves", "visit", "hidden states of the visit", stream, recipe),
    ]
    algebra = _algebra(max(shapes.widths), shapes, recipe)
    return _summed_and_factored("curves", always, _activations(shapes, kept=False), algebra)


def _disk(shapes: _Shapes, recipe: Recipe) -> list[Part]:
    d = shapes.hidden
    stream = shapes.windows * shapes.seq_len * d * shapes.item
    snapshots = stream + stream * shapes.target_windows // shapes.windows
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


def _work(shapes: _Shapes, recipe: Recipe) -> list[Work]:
    """FLOPs of every step; a product of (a, b) and (b, c) is 2abc."""
    d, T = shapes.hidden, shapes.seq_len
    tokens, targeted, seen, back = (
        n * T for n in (shapes.windows, shapes.target_windows, shapes.curve_windows, shapes.gradient_windows)
    )
    sites = [(s.channels, s) for s in shapes.all_sites]
    scores = sum(4.0 * n * (T + 1) / 2 for n, s in sites if s.kind == "attention")
    forward = 2.0 * shapes.size.block_linear + scores
    ffn = 2.0 * sum(s.parameters for _, s in sites if s.kind == "ffn")
    out_ffn = sum(2.0 * d * n for n, s in sites if s.kind == "ffn")
    wide = multiplied_as(shapes.dtype, torch.promote_types(shapes.dtype, torch.float32), shapes.device)
    holding = len(DAMPENINGS) if recipe.dampening is None else 1
    drifting = recipe.target != "self"
    work = []
    rounds = recipe.steps
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
        work.append(Work("targets of the dense model", forward * targeted, shapes.dtype))
    # Once all that is before the FFN, the FFN's inputs, and the FFN with its new weights.
    passes = forward + ffn - out_ffn
    work.append(Work("pruned pass", passes * tokens, shapes.dtype))
    cross = sum(2.0 * d * n for n, _ in sites) if drifting else 0.0
    work.append(Work("sums", gram * tokens + cross * targeted, wide))
    if drifting:  # outputs, taken off their targets in the sums
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
    return [replace(w, flops=w.flops * rounds) for w in work]


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
