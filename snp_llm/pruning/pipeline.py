"""From a model and a recipe to a pruned model: visit, widths, the sequential loop, assembly. Writes no files."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.checkpoint.journal import Journal
from snp_llm.data.windows import Windows, split_windows
from snp_llm.evaluate.perplexity import perplexity
from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.models.anatomy import Anatomy, find_anatomy
from snp_llm.models.depth import gone_blocks, recipe_anatomy
from snp_llm.models.layouts import assemble
from snp_llm.models.site import Site
from snp_llm.models.staying import what_stays
from snp_llm.models.task import Loss
from snp_llm.pruning.distances import with_distances
from snp_llm.pruning.estimate.estimate import decide
from snp_llm.pruning.identity import decided_widths, identity
from snp_llm.pruning.measured import measures
from snp_llm.pruning.padded import padded_blocks
from snp_llm.pruning.result import SiteResult
from snp_llm.pruning.run import Run, announce_experts, announce_heads, check_weights, read_calibration, resolve
from snp_llm.pruning.sensitivity import SiteCurves, visit_dense, visit_passes
from snp_llm.pruning.sequential import prune_blocks, steps_a_block
from snp_llm.pruning.shared import narrowed_blocks, with_order
from snp_llm.pruning.stream import capture
from snp_llm.pruning.trial_cut import try_cuts, try_dropped, try_without
from snp_llm.pruning.widths.depth import lost_with
from snp_llm.pruning.widths.plan import widths_of
from snp_llm.pruning.widths.search import HELD_OUT_WINDOWS, largest_sparsity
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.runtime.device import Clock, compute_device, exact_products
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.signs import UNWATCHED, Signs

log = logging.getLogger(__name__)

Measure = Callable[[PreTrainedModel], float]


@dataclass(frozen=True)
class Given:
    """What a program that prunes has of its own, in place of what a recipe names.

    Attributes:
        data: in memory, to calibrate on in place of the text that the recipe names; see `data.given`.
        measure: what a permitted rise is of, the smaller the better; None: perplexity on held-out calibration text.
        loss: whose gradients weigh errors; None: the task's own.
    """

    data: Any = None
    measure: Measure | None = None
    loss: Loss | None = None


NOTHING = Given()


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
        stays: what of the blocks is no site, in a line each.
        trials: sparsities that a search tried, and the relative rise of perplexity at each; empty without a search.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: ResolvedRecipe
    sites: list[SiteResult]
    calibration: Windows
    seconds: dict[str, float]
    sparsity: float | None
    stays: list[str]
    trials: list[tuple[float, float]] = field(default_factory=list)

    @property
    def gone(self) -> list[int]:
        """Numbers of the dense model's blocks that it does not have."""
        return gone_blocks([result.site for result in self.sites], [len(result.kept) for result in self.sites])


@exact_products()
def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    given: Given = NOTHING,
    journal: Journal | None = None,
    signs: Signs = UNWATCHED,
) -> PrunedModel:
    """Remove units from every attention and FFN site and repair the out-projections by least squares.

    Args:
        model: dense model of a supported family; left as it was.
        tokenizer: its tokenizer.
        recipe: all settings. Everything about files and evaluation is ignored here.
        given: what the caller has of its own.
        journal: where the run keeps what it has done, and what an interrupted one had; None: in memory.
        signs: told how many steps there will be, of each site, of each block of the dense model's visit, and of what
            begins.

    Raises:
        SnpError: unsupported model, unusable data or settings, numerical failure (with the block's name).
    """
    resolved = decide(model, resolve(recipe, model, tokenizer))
    clock = Clock(compute_device(resolved.device))
    journal = replace(journal or Journal(), clock=clock)
    run = Run(resolved, clock, journal, signs, given.loss)
    allowed = resolved.perplexity_increase
    if allowed is None:  # a search's end is not known
        signs.expect(steps(resolved, model))
    signs.begin(f"reading {resolved.calibration}")
    if allowed is not None:
        drawn = read_calibration(tokenizer, resolved, model, HELD_OUT_WINDOWS, given.data)
        windows, unseen = split_windows(drawn, resolved.num_samples, HELD_OUT_WINDOWS)
        begin_journal(journal, partial(identity, model, tokenizer, windows, resolved), signs)
        visited = visit(model, windows, run.phase("visit"))

        def held_out(model: PreTrainedModel) -> float:
            return perplexity(model, unseen.tokens, batch_size=resolved.batch_size, device=clock.device)

        def attempt(sparsity: float) -> tuple[PreTrainedModel, list[SiteResult]]:
            once = replace(resolved, sparsity=sparsity, max_perplexity_increase=None)
            return cut_once(visited, windows.tokens, replace(run.phase(f"sparsity-{sparsity:.5f}"), recipe=once))

        def predicted(sparsity: float) -> float | None:
            return predicted_rise(visited, replace(resolved, sparsity=sparsity, max_perplexity_increase=None))

        found = largest_sparsity(model, allowed, given.measure or held_out, attempt, predicted)
        facts = (windows, clock.seconds, found.sparsity, what_stays(visited.anatomy), found.trials)
        return PrunedModel(found.model, tokenizer, resolved, found.results, *facts)
    windows = read_calibration(tokenizer, resolved, model, data=given.data)
    begin_journal(journal, partial(identity, model, tokenizer, windows, resolved), signs)
    visited = visit(model, windows, run.phase("visit"))
    pruned, results = cut_once(visited, windows.tokens, run.phase("cut"))
    sparsity, stays = None if resolved.separate else resolved.sparsity, what_stays(visited.anatomy)
    return PrunedModel(pruned, tokenizer, resolved, results, windows, clock.seconds, sparsity, stays)


def begin_journal(journal: Journal, identify: Callable[[], dict[str, Any]], signs: Signs) -> None:
    """Checks that a journal is that of this run; said before, since it reads all weights."""
    if journal.folder is not None:
        signs.begin("hashing the weights")
    journal.belongs_to(identify)


def steps(recipe: Recipe, model: PreTrainedModel, *, cut: bool = True) -> int:
    """How many steps `prune` takes; without `cut` those of its visit to the dense model, which are all of `plan`."""
    anatomy = find_anatomy(model, recipe.head_unit, recipe.experts)
    return (visit_passes(recipe) + measures(anatomy, recipe) + cut * steps_a_block(recipe)) * len(anatomy.blocks)


@exact_products()
def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    *,
    signs: Signs = UNWATCHED,
) -> list[tuple[Site, int]]:
    """The width of every site that `prune` would choose, without pruning.

    Raises:
        SnpError: the widths follow from pruning itself, by a permitted rise of perplexity.
    """
    if recipe.perplexity_increase is not None:
        raise SnpError(
            "--dry-run: expected a budget whose widths are known before anything is cut, got "
            "--max-perplexity-increase. Leave it out, or run without --dry-run."
        )
    resolved = decide(model, resolve(recipe, model, tokenizer))
    clock = Clock(compute_device(resolved.device))
    signs.expect(steps(resolved, model, cut=False))
    signs.begin(f"reading {resolved.calibration}")
    windows = read_calibration(tokenizer, resolved, model) if resolved.allocation in NEEDS_CURVES else None
    visited = visit(model, windows, Run(resolved, clock, Journal(), signs))
    return list(zip(visited.anatomy.sites, visited.widths(resolved), strict=True))


@dataclass(frozen=True)
class Visited:
    """A dense model of which everything is known that has to be before the first cut.

    Attributes:
        anatomy: what is to be cut.
        curves: of every site, or None each.
    """

    anatomy: Anatomy
    curves: Sequence[SiteCurves | None]

    def gradient(self, number: int) -> Tensor | None:
        """Second moment F of the gradient at a site, by the site's number, read when it is asked for."""
        curves = self.curves[number]
        return None if curves is None else curves.gradient

    def widths(self, recipe: ResolvedRecipe) -> list[int]:
        """Units kept at every site under a recipe's budget."""
        return widths_of(self.anatomy, self.curves, recipe)


def visit(model: PreTrainedModel, windows: Windows | None, run: Run) -> Visited:
    """Checks a model and reads off it what the recipe needs; the budget may still change afterwards.

    Args:
        model: dense.
        windows: of the calibration text; None where nothing but a plan of fixed widths is wanted.
        run: of this phase.
    """
    recipe = run.recipe
    anatomy = recipe_anatomy(model, recipe)
    run.signs.begin("checking the weights")
    with run.clock.phase("loading"):
        check_weights(anatomy, run.clock.device)
    if windows is not None and not anatomy.family.alike:
        run.signs.begin("trying a cut of every kind")
        kinds = dict.fromkeys(site.kind for site in anatomy.sites)
        try_cuts(anatomy, windows.tokens, [kind for kind in kinds if recipe.sparsity_of(kind) > 0])
    if windows is not None and recipe.depth != "never":
        anatomy = try_dropped(anatomy, windows.tokens)
    announce_heads(anatomy.sites, recipe)
    announce_experts(anatomy, recipe)
    for line in what_stays(anatomy):
        log.warning("%s", line)
    curves: Sequence[SiteCurves | None] = [None] * len(anatomy.sites)
    if windows is not None and visit_passes(recipe, anatomy.sites):
        run.signs.begin("visiting the dense model")
        curves = visit_dense(anatomy, windows.tokens, run)
        if recipe.depth_score != "loss":
            curves = with_distances(curves, anatomy, windows.tokens, run.phase("distances"))
    return Visited(anatomy, curves)


def cut_once(visited: Visited, tokens: Tensor, run: Run) -> tuple[PreTrainedModel, list[SiteResult]]:
    """The pruned model and what happened at every site, calibrated on tokens, (windows, T)."""
    anatomy = visited.anatomy
    run.signs.begin("choosing widths")
    widths = decided_widths(lambda: visited.widths(run.recipe), run.recipe, run.journal)
    try_without(anatomy, tokens, gone_blocks(anatomy.sites, widths))
    stream = capture(anatomy, tokens, run)
    anatomy = with_order(anatomy, visited.curves, widths, run.recipe)
    blocks, results = prune_blocks(anatomy, stream, widths, visited.gradient, run)
    if run.recipe.layout != "padded":
        blocks = narrowed_blocks(anatomy, blocks, results, run.journal.phase("narrowed"))
    else:
        blocks = padded_blocks(anatomy, blocks, results, run.journal.phase("padded"))
    losses = lost_with(anatomy.sites, visited.curves, widths)
    return assemble(anatomy.model, anatomy.family, blocks), [
        replace(result, predicted_loss=loss) for result, loss in zip(results, losses, strict=True)
    ]


def predicted_rise(visited: Visited, recipe: ResolvedRecipe) -> float | None:
    """Predicted rise of the mean loss under a recipe's budget, or None where no gradients were read."""
    losses = lost_with(visited.anatomy.sites, visited.curves, visited.widths(recipe))
    known = [loss for loss in losses if loss is not None]
    return sum(known) if len(known) == len(losses) else None
