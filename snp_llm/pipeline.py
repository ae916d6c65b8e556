"""From a model and a recipe to a pruned model: visit, widths, the sequential loop, assembly. Writes no files."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import ranks
from snp_llm.data import Windows, adds_bos, calibration_windows, split_windows
from snp_llm.device import Clock, compute_device
from snp_llm.errors import SnpError
from snp_llm.files import checksum
from snp_llm.journal import Journal
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.models.blocks import on_device, rest_on_device
from snp_llm.models.families import Family, Site, embedding_rows, find_blocks, find_family, find_sites
from snp_llm.models.layouts import FEWEST_STEPS, KERNEL_MULTIPLE, assemble, check_code
from snp_llm.models.on_disk import fingerprint
from snp_llm.models.surgery import pad_site
from snp_llm.recipe import Bos, Recipe
from snp_llm.search import HELD_OUT_WINDOWS, largest_sparsity
from snp_llm.sequential import Finish, prune_blocks
from snp_llm.site import SiteResult
from snp_llm.stream import capture
from snp_llm.tokenizer_files import tokenizer_sum
from snp_llm.version import __version__
from snp_llm.visit import OnStep, SiteCurves, visit_dense, visit_passes
from snp_llm.widths import find_target, plan_widths

LONGEST_DEFAULT_WINDOW = 2048
# Settings without influence on the pruned weights; the model and its texts are known by their contents.
NO_MATTER = (
    *("model", "output", "overwrite", "resume", "save_every", "dry_run", "hidden_device", "trust_remote_code"),
    *(
        "calibration",
        "calibration_split",
        "text_column",
        "bos",
        "eval",
        "eval_dataset",
        "eval_split",
        "push_to_hub",
        "private",
    ),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model with everything that is known about it.

    Attributes:
        model: an ordinary transformers model; its untouched tensors are the dense model's own.
        tokenizer: the dense model's.
        recipe: with the defaults that depend on the model filled in.
        sites: results in pruning order.
        calibration: the windows that were used.
        seconds: by phase.
        sparsity: of all sites together, asked for or found by a search; None where the budget was another.
        trials: sparsities that a search tried, and the relative rise of perplexity at each; empty without a search.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    sites: list[SiteResult]
    calibration: Windows
    seconds: dict[str, float]
    sparsity: float | None
    trials: list[tuple[float, float]] = field(default_factory=list)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    journal: Journal | None = None,
    on_step: OnStep = lambda _line: None,
) -> PrunedModel:
    """Remove units from every attention and FFN site and repair the out-projections by least squares.

    Args:
        model: dense model of a supported family; left as it was.
        tokenizer: its tokenizer.
        recipe: all settings. Everything about files and evaluation is ignored here.
        journal: where the run keeps what it has done, and what an interrupted one had; None: in memory.
        on_step: called with a line of text after each site, and after each block of the dense model's visit.

    Raises:
        SnpError: unsupported model, unusable data or settings, numerical failure (with the block's name).
    """
    recipe, journal = resolve(recipe, model, tokenizer), journal or Journal()
    clock = Clock(compute_device(recipe.device))
    allowed = recipe.perplexity_increase
    if allowed is not None:
        windows, unseen = split_windows(read_calibration(tokenizer, recipe, model, HELD_OUT_WINDOWS), HELD_OUT_WINDOWS)
        journal.belongs_to(partial(identity, model, tokenizer, windows, recipe))
        visited = visit(model, windows, recipe, clock, journal.phase("visit"), on_step)

        def attempt(sparsity: float) -> tuple[PreTrainedModel, list[SiteResult]]:
            phase = journal.phase(f"sparsity-{sparsity:.5f}")
            once = replace(recipe, sparsity=sparsity, max_perplexity_increase=None)
            return cut_once(visited, once, clock, phase, on_step)

        def predicted(sparsity: float) -> float | None:
            return predicted_rise(visited, replace(recipe, sparsity=sparsity, max_perplexity_increase=None))

        found = largest_sparsity(model, unseen.tokens, allowed, attempt, predicted, recipe.batch_size, clock)
        facts = (windows, clock.seconds, found.sparsity, found.trials)
        return PrunedModel(found.model, tokenizer, recipe, found.results, *facts)
    windows = read_calibration(tokenizer, recipe, model)
    journal.belongs_to(partial(identity, model, tokenizer, windows, recipe))
    if recipe.steps == 1:
        visited = visit(model, windows, recipe, clock, journal.phase("visit"), on_step)
        pruned, results = cut_once(visited, recipe, clock, journal.phase("cut"), on_step)
    else:
        pruned, results = cut_in_steps(model, windows, recipe, clock, journal, on_step)
    sparsity = None if recipe.separate else recipe.sparsity
    return PrunedModel(pruned, tokenizer, recipe, results, windows, clock.seconds, sparsity)


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    on_step: OnStep = lambda _line: None,
) -> list[tuple[Site, int]]:
    """The width of every site that `prune` would choose, without pruning.

    Raises:
        SnpError: the widths follow from pruning itself: in several steps, or from a permitted rise of perplexity.
    """
    if recipe.steps > 1 or recipe.perplexity_increase is not None:
        raise SnpError(
            "--dry-run: expected a budget whose widths are known before anything is cut, got --steps or "
            "--max-perplexity-increase. Leave them out, or run without --dry-run."
        )
    recipe = resolve(recipe, model, tokenizer)
    clock = Clock(compute_device(recipe.device))
    windows = read_calibration(tokenizer, recipe, model) if recipe.allocation in NEEDS_CURVES else None
    visited = visit(model, windows, recipe, clock, Journal(), on_step)
    return list(zip(visited.sites, visited.widths(recipe), strict=True))


@dataclass(frozen=True)
class Visited:
    """A dense model of which everything is known that has to be before the first cut.

    Attributes:
        model, family, blocks, sites: what is to be cut.
        windows: calibration windows; None where nothing but a plan of fixed widths is wanted.
        curves: of every site, or None each.
    """

    model: PreTrainedModel
    family: Family
    blocks: nn.ModuleList
    sites: Sequence[Site]
    windows: Windows | None
    curves: Sequence[SiteCurves | None]

    def gradient(self, number: int) -> Tensor | None:
        """F of a site, by its number, read when it is asked for."""
        curves = self.curves[number]
        return None if curves is None else curves.gradient

    def widths(self, recipe: Recipe) -> list[int]:
        """Units kept at every site under a recipe's budget."""
        target = find_target(self.model, self.family, self.sites, recipe)
        return plan_widths(self.model, self.family, self.sites, self.curves, target, recipe)


def visit(
    model: PreTrainedModel, windows: Windows | None, recipe: Recipe, clock: Clock, journal: Journal, on_step: OnStep
) -> Visited:
    """Checks a model and reads off it what the recipe needs; the budget may still change afterwards."""
    family = find_family(model.config)
    blocks = find_blocks(model, family)
    sites = find_sites(blocks, family, recipe.head_unit)
    check_weights(model, blocks)
    announce_heads(sites, recipe)
    curves: Sequence[SiteCurves | None] = [None] * len(sites)
    if windows is not None and visit_passes(recipe):
        curves = visit_dense(model, family, blocks, sites, windows.tokens, recipe, clock, journal, on_step)
    return Visited(model, family, blocks, sites, windows, curves)


def cut_once(
    visited: Visited, recipe: Recipe, clock: Clock, journal: Journal, on_step: OnStep
) -> tuple[PreTrainedModel, list[SiteResult]]:
    """The pruned model and what happened at every site."""
    finish = partial(pad, visited.family, []) if recipe.layout == "padded" else None
    widths = decided_widths(lambda: visited.widths(recipe), recipe, journal)
    blocks, results = cut_blocks(visited, visited.blocks, widths, finish, recipe, clock, journal, on_step)
    return assemble(visited.model, visited.family, blocks), results


def cut_in_steps(
    model: PreTrainedModel, windows: Windows, recipe: Recipe, clock: Clock, journal: Journal, on_step: OnStep
) -> tuple[PreTrainedModel, list[SiteResult]]:
    """The same in several rounds, each with statistics, gradients and widths of its own.

    Every round removes as much of the budget's unit as any other. What sites are repaired to give stays that of the
    first model. Errors in the results are those of the last round; predicted losses and seconds add up.
    """
    family = find_family(model.config)
    dense_blocks = find_blocks(model, family)
    first = find_sites(dense_blocks, family, recipe.head_unit)
    target = find_target(model, family, first, recipe)
    current = model
    results: list[SiteResult] = []
    for step in range(1, recipe.steps + 1):
        visited = visit(current, windows, recipe, clock, journal.phase(f"visit-{step}"), on_step)
        rest = target.rest([site.units for site in visited.sites], step / recipe.steps, first)
        phase = journal.phase(f"cut-{step}")
        decide = partial(plan_widths, current, family, visited.sites, visited.curves, rest, recipe)
        widths = decided_widths(decide, recipe, phase)
        padded = recipe.layout == "padded" and step == recipe.steps
        finish = partial(pad, family, results) if padded else None
        blocks, found = cut_blocks(visited, dense_blocks, widths, finish, recipe, clock, phase, on_step)
        results = [before.then(after) for before, after in zip(results, found, strict=True)] if results else found
        current = assemble(current, family, blocks)
    return current, results


def pad(
    family: Family,
    earlier: Sequence[SiteResult],
    block: nn.Module,
    dense_block: nn.Module,
    results: Sequence[SiteResult],
) -> None:
    """Puts a pruned block back into its dense shape, in place, with zeros where units are gone.

    Args:
        family: its family.
        earlier: what happened at all sites in earlier rounds, if there were any.
        block: as it is.
        dense_block: as it was at first.
        results: what happened at its sites in this round.
    """
    for result in results:
        before = [r for r in earlier if r.site.name == result.site.name]
        whole = before[0].then(result) if before else result
        if len(whole.kept) < whole.site.units:
            pad_site(block, dense_block, family, whole.site, whole.kept)


def cut_blocks(
    visited: Visited,
    reference: nn.ModuleList,
    widths: Sequence[int],
    finish: Finish | None,
    recipe: Recipe,
    clock: Clock,
    journal: Journal,
    on_step: OnStep,
) -> tuple[nn.ModuleList, list[SiteResult]]:
    """All blocks cut to the given widths, in sequence, repaired towards what the reference blocks give."""
    assert visited.windows is not None
    stream = capture(visited.model, visited.blocks, visited.windows.tokens, recipe, clock, journal.folder)
    pruned_blocks, results = prune_blocks(
        visited.blocks,
        reference,
        visited.family,
        visited.sites,
        stream,
        widths,
        visited.gradient,
        finish,
        recipe,
        clock,
        journal,
        on_step,
    )
    losses = [None if c is None else c.loss for c in visited.curves]
    return pruned_blocks, [
        result if loss is None else replace(result, predicted_loss=float(loss[width]))
        for result, loss, width in zip(results, losses, widths, strict=True)
    ]


def decided_widths(decide: Callable[[], list[int]], recipe: Recipe, journal: Journal) -> list[int]:
    """Units to keep at every site: decided once, since latencies never come out the same again, and on rank 0.

    Raises:
        SnpError: the latency table is not the one that an interrupted run has decided them from.
    """
    table = None if recipe.latency_table is None else Path(recipe.latency_table)

    def plan() -> dict[str, Any]:
        return {"widths": decide(), "latency table": table and checksum(table)}

    def decided() -> list[int]:
        found = journal.remembered("plan", plan)
        if table is not None and table.exists() and checksum(table) != found["latency table"]:
            raise SnpError(
                f"--resume: latency table {table} is not the one that the unfinished run has chosen its widths from. "
                "Put that back or remove it, or start anew with --overwrite."
            )
        widths: list[int] = found["widths"]
        return widths

    return ranks.from_rank(0, decided)


def identity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows, recipe: Recipe
) -> dict[str, Any]:
    """What a pruned model depends on; an unfinished run is only gone on with where all of it is the same."""
    generation = model.generation_config
    return {
        "setting": {key: value for key, value in recipe.as_dict().items() if key not in NO_MATTER},
        "config": _config_values(model.config),
        "generation config": {} if generation is None else _config_values(generation),
        "tokenizer": tokenizer_sum(tokenizer),
        "weights": fingerprint(model),
        "calibration text": windows.digest,
        "version": {"snp_llm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _config_values(config: PretrainedConfig | GenerationConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_name_or_path")}


def predicted_rise(visited: Visited, recipe: Recipe) -> float | None:
    """Predicted rise of the mean loss under a recipe's budget, or None where no gradients were read."""
    losses = [c.loss for c in visited.curves if c is not None and c.loss is not None]
    if len(losses) < len(visited.sites):
        return None
    return sum(float(loss[width]) for loss, width in zip(losses, visited.widths(recipe), strict=True))


def resolve(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Recipe:
    """The recipe with window length and rounding filled in from the model, sparsity, and BOS from a tokenizer.

    Raises:
        SnpError: the window is longer than the model's positions; the model is not of a supported family, or has code
            of its own.
    """
    check_code(model)
    positions = int(getattr(model.config, "max_position_embeddings", LONGEST_DEFAULT_WINDOW))
    seq_len = window_length(recipe.seq_len, positions)
    if tokenizer is not None:
        recipe = replace(recipe, bos=resolve_bos(recipe.bos, model, tokenizer))
    kind = compute_device("auto").type if recipe.device == "auto" else recipe.device
    if recipe.hidden_device not in ("cpu", "disk", kind):
        raise SnpError(f"--hidden-device {recipe.hidden_device}: expected cpu, disk, or {kind}, where blocks are run.")
    recipe = replace(recipe, seq_len=seq_len, sparsity=recipe.common_sparsity)
    if recipe.round_to is not None:
        return recipe
    family = find_family(model.config)
    narrowest = min(s.units for s in find_sites(find_blocks(model, family), family) if s.kind == "ffn")
    coarse = recipe.layout == "uniform" and narrowest >= KERNEL_MULTIPLE * FEWEST_STEPS
    return replace(recipe, round_to=KERNEL_MULTIPLE if coarse else 8)


def window_length(asked: int | None, positions: int) -> int:
    """Tokens a window: what was asked for, or the model's maximum, at most 2048."""
    if asked is not None and asked > positions:
        raise SnpError(f"--seq-len: expected at most the model's {positions:,} positions, got {asked:,}.")
    return asked or min(positions, LONGEST_DEFAULT_WINDOW)


def resolve_bos(asked: Bos, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Bos:
    """Where BOS stands: "always" before every window, "once" at the start of the text, or "never".

    "auto" asks for what the numbers of others are made with: once, if the tokenizer adds it; but before every window
    for families that are lost without it. Where a tokenizer adds none, nothing is added for it.
    """
    if asked != "auto":
        return asked
    return "always" if find_family(model.config).needs_bos and adds_bos(tokenizer) else "once"


def announce_heads(sites: Sequence[Site], recipe: Recipe) -> None:
    """Says what head units became of those asked for, where the model has no such choice."""
    first = next(site for site in sites if site.kind == "attention")
    assert first.heads is not None
    if recipe.head_unit == "kv_group" and first.groups:
        log.warning("%s: one key-value head; query heads are the units instead of KV groups", first.name)
    elif recipe.head_unit == "query" and not first.groups:
        log.warning("%s: every key-value head has one query head; both go together", first.name)


def check_weights(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Raises SnpError with the tensor's name if a weight is NaN or Inf; one block is in memory at a time."""
    names = {id(module): name for name, module in model.named_modules()}
    cpu = torch.device("cpu")

    def check(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta and not torch.isfinite(parameter).all():
                    raise SnpError(
                        f"{names[id(module)]}.{name}: weights hold NaN or Inf; expected finite numbers. The checkpoint "
                        "is damaged."
                    )

    with rest_on_device(model, blocks, cpu):
        check(model.modules())  # blocks that are on disk are passed over here
    for block in blocks:
        with on_device(block, cpu):
            check(block.modules())


def read_calibration(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, model: PreTrainedModel, more: int = 0
) -> Windows:
    """The calibration windows of a resolved recipe, and `more` after them, checked against the model's vocabulary."""
    assert recipe.seq_len is not None
    windows = calibration_windows(
        tokenizer,
        recipe.calibration or "wikitext2",
        split=recipe.calibration_split,
        column=recipe.text_column,
        num_samples=recipe.num_samples + more,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        bos=resolve_bos(recipe.bos, model, tokenizer),
    )
    check_tokens(windows, model)
    return windows


def check_tokens(windows: Windows, model: PreTrainedModel) -> None:
    """Raises SnpError if a text has a token that the model has no embedding for."""
    rows = embedding_rows(model)
    if (largest := int(windows.tokens.max())) >= rows:
        raise SnpError(
            f"{windows.description}: token id {largest:,} is in the text; the model embeds ids below {rows:,}. Take "
            "that token out of the text, or use the model's own tokenizer."
        )
