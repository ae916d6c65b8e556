"""`snp-llm prune`: from a recipe to a finished folder and what is printed of it. Parses no arguments."""

import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import checkpoint
from snp_llm.checkpoint import contents, hub, output
from snp_llm.checkpoint.journal import Journal
from snp_llm.checkpoint.readers import reader_for
from snp_llm.checkpoint.skeleton import check_reader, check_text_weights, load_config, load_skeleton
from snp_llm.cli.estimates import estimate_facts, estimate_line, print_estimate
from snp_llm.cli.layouts import depth_line, layout_facts, layout_line
from snp_llm.cli.push import run_push
from snp_llm.cli.report import write_page
from snp_llm.data.sources import BUNDLED
from snp_llm.evaluate.material import Figures, material_of
from snp_llm.evaluate.turns import Speeds
from snp_llm.models import size as model_sizes
from snp_llm.models.anatomy import find_anatomy
from snp_llm.models.layouts import possible_types
from snp_llm.models.registry import dense_type
from snp_llm.models.staying import what_stays
from snp_llm.pruning import pipeline, run
from snp_llm.pruning.estimate.estimate import decide, estimate
from snp_llm.pruning.estimate.refuse import refuse_what_cannot_fit
from snp_llm.pruning.widths.latency import check_table
from snp_llm.pruning.widths.plan import check_budget, removed_weights
from snp_llm.recipe.checks import check_output_name
from snp_llm.recipe.commands import PushRecipe, Talk
from snp_llm.recipe.recipe import Recipe, ResolvedRecipe
from snp_llm.report import facts
from snp_llm.report.folder import describe
from snp_llm.report.rows import closing_table, measured_by
from snp_llm.report.words import asked, latency_line, sample_lines
from snp_llm.runtime import ranks
from snp_llm.runtime.device import (
    Clock,
    compute_device,
    describe_device,
    hand_back,
    place_for_another,
    where_it_fits,
)
from snp_llm.runtime.numbers import human_bytes
from snp_llm.runtime.terminal import print_json, print_table, progress, watching

log = logging.getLogger("snp_llm")


def run_prune(recipe: Recipe, command: Sequence[str], talk: Talk, config: str | None = None) -> None:
    """Load, prune, save, verify, measure, print the closing table; on several ranks, rank 0 writes and prints.

    Args:
        recipe: of the run.
        command: as it was typed.
        talk: what to print.
        config: the recipe file that it started from.
    """
    folder, inputs = output_folder(recipe), inputs_of(recipe, config)
    if not recipe.dry_run:
        output.check_output(folder, overwrite=recipe.overwrite, inputs=inputs)
        if recipe.push_to_hub is not None:
            hub.check_access(recipe.push_to_hub)
    material = material_of(load_config(recipe.model, trust_remote_code=recipe.trust_remote_code))
    material.check(recipe, "calibration")
    if recipe.eval:
        material.check(recipe, "evaluation")
    check_model(recipe)
    if recipe.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            rehearse(recipe, folder, Path(scratch), talk)
        return
    with ranks.joined(recipe.device):
        if ranks.rank():
            log.setLevel(logging.ERROR)  # rank 0 says it for all
        with output.finished_folder(folder, overwrite=recipe.overwrite, resume=recipe.resume, inputs=inputs) as partial:
            summary = prune_into(partial, recipe, command, talk)
        if ranks.rank() == 0:
            finish(recipe, folder, summary, talk)


def output_folder(recipe: Recipe) -> Path:
    """Where the pruned model goes: what was asked for, or a name of its own here, or beside the model in whose folder
    this is."""
    check_output_name(recipe.output_folder)
    folder, model = Path(recipe.output_folder), Path(recipe.model).resolve()
    if recipe.output is None and (model / "config.json").exists() and Path.cwd().is_relative_to(model):
        folder = model.parent / folder
        log.warning("you are inside of %s: the pruned model goes beside it, to %s", model, folder)
    return folder


def check_model(recipe: Recipe) -> None:
    """Refuses, by the model's config alone, what cannot be built, pruned, or brought down to the budget."""
    skeleton = load_skeleton(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    check_reader(recipe.model, skeleton.config)
    check_text_weights(recipe.model, skeleton)
    check_table(recipe)
    check_budget(skeleton, run.resolve(recipe, skeleton))


def prune_into(partial: Path, recipe: Recipe, command: Sequence[str], talk: Talk) -> dict[str, Any]:
    """Does everything between a parsed recipe and a folder that only has to get its name.

    Returns:
        The report; empty but on rank 0.
    """
    device = compute_device(recipe.device)
    clock = Clock(device)
    with clock.phase("loading"):
        dense, tokenizer = load_on_disk(recipe, partial)
    resolved = decide(dense, run.resolve(recipe, dense, tokenizer))
    material, reader = material_of(dense.config), reader_for(dense.config)
    files = reader.files(checkpoint.find_model(resolved.model), tokenizer)
    reader.check(resolved.model, files, tokenizer, possible_types(dense, resolved.layout))
    announce(dense, resolved, partial.parent, talk)
    # Read before pruning, so that a mistake in it costs seconds.
    evaluation = material.evaluation(tokenizer, resolved, dense) if resolved.eval else None
    journal = Journal(partial / contents.JOURNAL, resolved.save_every, behind=device.type != "cpu")
    figures: list[Figures] = [{}, {}]
    more: dict[str, Any] = {"command": shlex.join(command)}
    with ExitStack() as stack:

        def start() -> checkpoint.FreshProcess:
            return stack.enter_context(checkpoint.fresh_process(dense))

        # Reads its libraries meanwhile, where host memory is not what the run itself has to live in.
        fresh = start() if device.type == "cuda" and ranks.rank() == 0 else None
        with progress(None, "starting") as signs:
            pruned = pipeline.prune(dense, tokenizer, resolved, journal=journal, signs=signs)
        hand_back(device)
        compared, models = material.compared(pruned.calibration), (dense, pruned.model)
        sizes = [model_sizes.model_size(m, resolved.seq_len, resolved.experts) for m in models]

        def save() -> None:
            nonlocal fresh
            fresh = fresh or start()
            checkpoint.save(pruned.model, tokenizer, partial, tokenizer_of=resolved.model)
            fresh.load(partial, compared, place_for_another(device, sizes[1].bytes))
            checkpoint.check_kept(dense, partial)

        def compare() -> float:
            assert fresh is not None
            return checkpoint.compare(dense, pruned.model, partial, compared, fresh, pruned.gone)

        with clock.phase("saving"), watching(f"saving {human_bytes(sizes[1].bytes)}"):
            ranks.from_rank(0, save)
        if evaluation is not None:  # while the other process loads
            figures, more["evaluation"] = evaluation.measure(models, device, watching)
            with watching("examples of what both models say"):
                if shown := evaluation.shown(models, device):
                    more["samples"] = shown
        with clock.phase("saving"), watching("reloading in a fresh process, and comparing"):
            more["largest_logit_difference"] = ranks.from_rank(0, compare)
    pruned.seconds.update({phase: pruned.seconds[phase] + clock.seconds[phase] for phase in ("loading", "saving")})
    if ranks.rank():
        return {}

    def timed(place: torch.device) -> tuple[Speeds, torch.device]:
        return material.speed(models, pruned.calibration, place, watching), place

    speeds, place = where_it_fits("speed of both models", device, timed)
    disks = (sizes[0].bytes, checkpoint.folder_bytes(partial))
    before, after = (
        facts.Measured(size, disk, speed=speed, **found)
        for size, disk, speed, found in zip(sizes, disks, speeds.per_second, figures, strict=True)
    )
    more |= {"device": describe_device(place), "speed_up": asdict(speeds.ratio)}
    base_model = resolved.model if checkpoint.is_hub_id(resolved.model) else None
    return describe(partial, pruned, (before, after), more, base_model)


def finish(recipe: Recipe, folder: Path, summary: dict[str, Any], talk: Talk) -> None:
    """Does what is left once the model is safe: the page, the closing words, the upload."""
    write_page(folder)
    if talk.json:
        sites_without = [{k: v for k, v in site.items() if k not in ("kept", "curve")} for site in summary["sites"]]
        result = {"output": str(folder), **summary, "sites": sites_without}
        if recipe.push_to_hub is not None:
            result["url"] = hub.push(folder, recipe.push_to_hub, private=recipe.private)
        print_json(result)
        return
    achieved = summary["sparsity"]["achieved"]
    print(f"{recipe.model} -> {folder}: sparsity {achieved:.4f}, {asked(recipe.as_dict())} asked for")
    print_table(closing_table(summary))
    if "evaluation" in summary:
        print(f"{' and '.join(measured_by(summary))} on {summary['evaluation']}")
    print(f"calibrated on {summary['calibration']['text']}")
    for line in (*filter(None, [latency_line(summary)]), *sample_lines(summary)):
        print(line)
    difference = summary["largest_logit_difference"]
    print(f"reloaded in a fresh process: logits differ by {difference:.1e} of the largest")
    if (folder / contents.PAGE).exists():
        print(f"in pictures: {folder / contents.PAGE}")
    if recipe.push_to_hub is not None:
        run_push(PushRecipe(str(folder), recipe.push_to_hub, recipe.private), talk)


def rehearse(recipe: Recipe, folder: Path, scratch: Path, talk: Talk) -> None:
    """What `--dry-run` does: what the run would take and, as far as that fits, the widths that it would choose."""
    dense, tokenizer = load_on_disk(recipe, scratch)
    resolved = decide(dense, run.resolve(recipe, dense, tokenizer))
    takes = announce(dense, resolved, folder.absolute().parent, talk)
    with progress(None, "starting") as signs:
        plan = pipeline.plan(dense, tokenizer, resolved, signs=signs)
    if talk.json:
        print_json({"estimate": takes, **plan_facts(dense, plan, resolved)})
    else:
        print_plan(dense, plan, resolved)


def inputs_of(recipe: Recipe, config: str | None) -> dict[str, Path]:
    """What a run reads, by what it is; none of it is to be replaced by what the run writes."""
    named = {
        "the input model": str(BUNDLED / recipe.model) if recipe.model == checkpoint.TINY_OPT else recipe.model,
        "the calibration text": recipe.calibration,
        "the evaluation text": recipe.eval_dataset,
        "the latency table": recipe.latency_table,
        "the recipe": config,
    }
    return {what: Path(name) for what, name in named.items() if name is not None and os.path.exists(name)}


def load_on_disk(recipe: Recipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model, its weights in their files; `folder` takes those that are in no safetensors file."""
    own = folder / contents.DENSE / str(ranks.rank())
    return checkpoint.load(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code, on_disk=own)


def announce(dense: PreTrainedModel, recipe: ResolvedRecipe, place: Path, talk: Talk) -> dict[str, Any]:
    """Says what will be written, what loads it and what it takes, and refuses what cannot fit.

    Returns:
        What it takes; empty but on rank 0.
    """
    if ranks.rank():
        return {}
    device = compute_device(recipe.device)
    # Of a rehearsal it is the result.
    say: Callable[[str], Any] = partial(print, flush=True) if recipe.dry_run and not talk.json else log.info
    anatomy = find_anatomy(dense, recipe.head_unit, recipe.experts)
    written = layout_facts(anatomy, recipe.layout, recipe.round_to)
    if recipe.depth == "only":
        halves = recipe.layout == "compact" and recipe.depth_score == "loss"  # other scores are of blocks alone
        own = dense_type(dense.config) if recipe.layout == "uniform" else dense.config.model_type
        say(depth_line(own, written, halves=halves))
    else:
        say(layout_line(recipe.layout, written))
    needed = estimate(dense, recipe)
    takes = estimate_facts(needed, device)
    say(estimate_line(takes, device.type))
    if recipe.dry_run and not talk.json:
        print_estimate(takes, device.type)
    refuse_what_cannot_fit(needed, device, place)
    return takes


def print_plan(dense: PreTrainedModel, plan: list[tuple[Any, int]], recipe: ResolvedRecipe) -> None:
    """What `--dry-run` shows: the widths of every block and the sizes that follow from them."""
    size = model_sizes.model_size(dense, recipe.seq_len, recipe.experts)
    removed = removed_weights(dense, size.block_linear, plan)
    blocks: dict[int, dict[str, str]] = {}
    for site, width in plan:
        if site.heads is None and site.kind != "ffn":
            print(f"{site.name}: {width:,} of {site.units:,} {site.unit}")
            continue
        kept, units = (width, site.units) if site.heads is None else (site.heads_after(width).query, site.heads.query)
        blocks.setdefault(site.block, {})[site.kind] = f"{kept:,} of {units:,}"
    if blocks:
        print("block  heads         FFN channels")
    for block, kinds in blocks.items():
        print(f"{block:5d}  {kinds.get('attention', '-'):12s}  {kinds.get('ffn', '-')}")
    print(
        f"block-linear parameters: {size.block_linear:,} to {size.block_linear - removed:,}, sparsity "
        f"{removed / size.block_linear:.3f} ({asked(recipe.as_dict())} asked for); nothing was written"
    )


def plan_facts(dense: PreTrainedModel, plan: list[tuple[Any, int]], recipe: ResolvedRecipe) -> dict[str, Any]:
    """Widths and sizes of a plan, ready for JSON."""
    size = model_sizes.model_size(dense, recipe.seq_len, recipe.experts)
    removed = removed_weights(dense, size.block_linear, plan)
    sites = [{"site": s.name, "kind": s.kind, "units_before": s.units, "units_after": width} for s, width in plan]
    return {
        "block_linear_before": size.block_linear,
        "block_linear_after": size.block_linear - removed,
        "sparsity": removed / size.block_linear,
        "stays": what_stays(find_anatomy(dense, recipe.head_unit, recipe.experts)),
        "asked": asked(recipe.as_dict()),
        "sites": sites,
    }
