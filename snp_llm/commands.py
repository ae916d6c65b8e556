"""What each command does, from its recipe to what is printed. Parses no arguments."""

import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import bench, checkpoint, evaluation, hub, inspection, measure, output, page, pipeline, ranks, report
from snp_llm.data import Windows, check_dataset, evaluation_windows
from snp_llm.device import Clock, compute_device, describe_device
from snp_llm.errors import SnpError
from snp_llm.estimate import estimate, refuse_what_cannot_fit
from snp_llm.journal import Journal
from snp_llm.latency import check_table
from snp_llm.models.families import find_blocks, find_family, find_sites
from snp_llm.models.layouts import describe_layout, possible_types
from snp_llm.options import BenchRecipe, InspectRecipe, Talk
from snp_llm.recipe import GOALS, EvaluationRecipe, PushRecipe, Recipe, ReportRecipe, check_output_name
from snp_llm.recipe_file import RECIPE, save_recipe
from snp_llm.skeleton import check_tokenizer, load_skeleton
from snp_llm.terminal import print_json, print_table, progress
from snp_llm.tokenizer_files import check_carried, find_tokenizer_files
from snp_llm.visit import visit_passes
from snp_llm.widths import check_budget

log = logging.getLogger("snp_llm")
LONGEST_COMPARISON = 128  # tokens on which the reloaded model is compared


def run_inspect(recipe: InspectRecipe, talk: Talk) -> None:
    """Print what a config says."""
    model = load_skeleton(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    same = ("sparsity", "head_unit", "num_samples", "seq_len", "batch_size", "hidden_device", "device", "dtype")
    facts = inspection.inspect(model, Recipe(recipe.model, **{name: getattr(recipe, name) for name in same}))
    if talk.json:
        print_json(facts)
    else:
        inspection.print_inspection(facts)


def run_prune(recipe: Recipe, command: Sequence[str], talk: Talk, config: str | None = None) -> None:
    """Load, prune, save, verify, measure, print the closing table; on several ranks, rank 0 writes and prints.

    Args:
        recipe: of the run.
        command: as it was typed.
        talk: what to print.
        config: the recipe file that it started from.
    """
    folder, inputs = output_folder(recipe), inputs_of(recipe, config)
    bundled = "bundled" if recipe.model == checkpoint.TINY_OPT else "wikitext2"
    calibration, eval_dataset = recipe.calibration or bundled, recipe.eval_dataset or bundled
    recipe = replace(recipe, calibration=calibration, eval_dataset=eval_dataset)
    check_dataset(calibration, recipe.calibration_split, recipe.text_column, evaluation=False)
    if recipe.eval:
        check_dataset(eval_dataset, recipe.eval_split, recipe.text_column, evaluation=True)
    if not recipe.dry_run:
        output.check_output(folder, overwrite=recipe.overwrite, inputs=inputs)
        if recipe.push_to_hub is not None:
            hub.check_access(recipe.push_to_hub)
    check_model(recipe)
    if recipe.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            rehearse(recipe, folder, Path(scratch), talk)
        return
    with ranks.joined(recipe.device):
        if ranks.rank():
            log.setLevel(logging.ERROR)  # rank 0 says it for all
        with output.finished_folder(folder, overwrite=recipe.overwrite, resume=recipe.resume, inputs=inputs) as partial:
            summary, table = prune_into(partial, recipe, command, talk)
        if ranks.rank() == 0:
            finish(recipe, folder, summary, table, talk)


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
    check_tokenizer(recipe.model)
    check_table(recipe)
    check_budget(skeleton, pipeline.resolve(recipe, skeleton))


def prune_into(partial: Path, recipe: Recipe, command: Sequence[str], talk: Talk) -> tuple[dict[str, Any], Table]:
    """Everything between a parsed recipe and a folder that only has to get its name.

    Returns:
        The report and the closing table; both are empty but on rank 0.
    """
    device = compute_device(recipe.device)
    clock = Clock(device)
    with clock.phase("loading"):
        dense, tokenizer = load_on_disk(recipe, partial)
    recipe = pipeline.resolve(recipe, dense, tokenizer)
    assert recipe.seq_len is not None and recipe.eval_dataset is not None
    files = find_tokenizer_files(checkpoint.find_model(recipe.model), tokenizer)
    check_carried(recipe.model, files, tokenizer, possible_types(dense, recipe.layout))
    announce(dense, recipe, partial.parent, talk)
    windows: Windows | None = None
    if recipe.eval:  # read before pruning, so that a mistake in it costs seconds
        windows = evaluation_windows(
            tokenizer,
            recipe.eval_dataset,
            split=recipe.eval_split,
            column=recipe.text_column,
            seq_len=recipe.seq_len,
            bos=recipe.bos,
        )
        pipeline.check_tokens(windows, dense)
    journal = Journal(partial / output.JOURNAL, recipe.save_every)
    steps = recipe.steps * (2 + visit_passes(recipe)) * dense.config.num_hidden_layers
    with progress(steps if recipe.perplexity_increase is None else None) as on_step:  # a search's end is not known
        pruned = pipeline.prune(dense, tokenizer, recipe, journal=journal, on_step=on_step)
    compared = pruned.calibration.tokens[:1, :LONGEST_COMPARISON]

    def save_and_verify() -> float:
        checkpoint.save(pruned.model, tokenizer, partial, tokenizer_of=recipe.model)
        return checkpoint.verify(dense, pruned.model, partial, compared)

    with clock.phase("saving"):
        difference = ranks.from_rank(0, save_and_verify)
    pruned.seconds.update({phase: pruned.seconds[phase] + clock.seconds[phase] for phase in ("loading", "saving")})
    models = (dense, pruned.model)
    perplexities: list[float | None] = [None, None]
    if windows is not None:
        perplexities = [
            measure.perplexity(m, windows.tokens, batch_size=recipe.batch_size, device=device) for m in models
        ]
    if ranks.rank():
        return {}, Table()
    speeds = measure.prefill_speed(models, pruned.calibration.tokens[:1], device=device)
    sizes = [measure.model_size(m, recipe.seq_len) for m in models]
    disks = (sizes[0].bytes, checkpoint.folder_bytes(partial))
    before, after = (report.Measured(*figures) for figures in zip(sizes, disks, perplexities, speeds, strict=True))
    facts: dict[str, Any] = {"command": shlex.join(command), "largest_logit_difference": difference}
    facts["device"] = describe_device(device)
    if windows is not None:
        facts["evaluation"] = windows.description
    summary = report.build_report(pruned, before, after, facts)
    base_model = recipe.model if checkpoint.is_hub_id(recipe.model) else None
    report.write_card(summary, pruned, base_model, partial)
    save_recipe(pruned.recipe, partial / RECIPE, shlex.join(command))
    written = [name for name in output.files_in(partial) if name.split("/")[0] not in output.UNFINISHED]
    summary["files"] = sorted({*written, report.REPORT})  # of which --overwrite replaces no more
    report.write_report(summary, partial)
    return summary, report.closing_table(before, after, pruned)


def finish(recipe: Recipe, folder: Path, summary: dict[str, Any], table: Table, talk: Talk) -> None:
    """What is left once the model is safe: the page, the closing words, the upload."""
    write_page(folder)
    if talk.json:
        sites_without = [{k: v for k, v in site.items() if k not in ("kept", "curve")} for site in summary["sites"]]
        result = {"output": str(folder), **summary, "sites": sites_without}
        if recipe.push_to_hub is not None:
            result["url"] = hub.push(folder, recipe.push_to_hub, private=recipe.private)
        print_json(result)
        return
    print(f"{recipe.model} -> {folder}: sparsity {summary['sparsity']['achieved']:.4f}, {asked(recipe)} asked for")
    Console().print(table)
    if "evaluation" in summary:
        print(f"perplexity on {summary['evaluation']}")
    print(f"calibrated on {summary['calibration']['text']}")
    difference = summary["largest_logit_difference"]
    print(f"reloaded in a fresh process: logits differ by {difference:.1e} of the largest")
    if (folder / report.PAGE).exists():
        print(f"in pictures: {folder / report.PAGE}")
    if recipe.push_to_hub is not None:
        run_push(PushRecipe(str(folder), recipe.push_to_hub, recipe.private), talk)


def rehearse(recipe: Recipe, folder: Path, scratch: Path, talk: Talk) -> None:
    """What `--dry-run` does: what the run would take and, as far as that fits, the widths that it would choose."""
    dense, tokenizer = load_on_disk(recipe, scratch)
    recipe = pipeline.resolve(recipe, dense, tokenizer)
    takes = announce(dense, recipe, folder.absolute().parent, talk)
    with progress(dense.config.num_hidden_layers) as on_step:
        plan = pipeline.plan(dense, tokenizer, recipe, on_step=on_step)
    if talk.json:
        print_json({"estimate": takes, **plan_facts(dense, plan, recipe)})
    else:
        print_plan(dense, plan, recipe)


def inputs_of(recipe: Recipe, config: str | None) -> dict[str, Path]:
    """What a run reads, by what it is; none of it is to be replaced by what the run writes."""
    named = {
        "the input model": checkpoint.find_model(recipe.model),
        "the calibration text": recipe.calibration,
        "the evaluation text": recipe.eval_dataset,
        "the latency table": recipe.latency_table,
        "the recipe": config,
    }
    return {what: Path(name) for what, name in named.items() if name is not None and os.path.exists(name)}


def load_on_disk(recipe: Recipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model, its weights in their files; `folder` takes those that are in no safetensors file."""
    own = folder / output.DENSE / str(ranks.rank())
    return checkpoint.load(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code, on_disk=own)


def announce(dense: PreTrainedModel, recipe: Recipe, place: Path, talk: Talk) -> dict[str, Any]:
    """Says what will be written, what loads it and what it takes, and refuses what cannot fit.

    Returns:
        What it takes; empty but on rank 0.
    """
    if ranks.rank():
        return {}
    assert recipe.round_to is not None
    family, device = find_family(dense.config), compute_device(recipe.device)
    say = log.info if talk.json else partial(print, flush=True)
    sites = find_sites(find_blocks(dense, family), family, recipe.head_unit)
    say(describe_layout(dense, sites, recipe.layout, recipe.round_to))
    needed = estimate(dense, recipe)
    takes = inspection.estimate_facts(needed, device)
    say(inspection.estimate_line(takes, device.type))
    if recipe.dry_run and not talk.json:
        inspection.print_estimate(takes, device.type)
    refuse_what_cannot_fit(needed, device, recipe.hidden_device, place)
    return takes


def write_page(folder: Path) -> None:
    """The page of a model that is saved already: it is worth having, and not worth losing that model for."""
    try:
        page.write_page(folder)
    except KeyboardInterrupt:
        raise SnpError(f"interrupted; {folder} is complete but for {report.PAGE}: snp-llm report {folder}") from None
    except Exception as error:  # matplotlib, jinja2, fonts, a full disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning(f"{folder} is complete but for {report.PAGE} ({reason}); later: snp-llm report {folder}")


def run_push(recipe: PushRecipe, talk: Talk) -> None:
    """Upload a finished folder."""
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()  # an upload takes long
    url = hub.push(Path(recipe.folder), recipe.repo_id, private=recipe.private)
    if talk.json:
        print_json({"folder": recipe.folder, "url": url})
    else:
        print(f"{recipe.folder} -> {url}")


def print_plan(dense: PreTrainedModel, plan: list[tuple[Any, int]], recipe: Recipe) -> None:
    """What `--dry-run` shows: the widths of every block and the sizes that follow from them."""
    size = measure.model_size(dense, recipe.seq_len or 1)
    removed = sum((site.units - width) * site.cost for site, width in plan)
    attention, ffn = plan[::2], plan[1::2]
    print("block  heads         FFN channels")
    for (a, heads), (f, channels) in zip(attention, ffn, strict=True):
        print(f"{a.block:5d}  {f'{a.heads_after(heads).query} of {a.heads.query}':12s}  {channels:,} of {f.units:,}")
    print(
        f"block-linear parameters: {size.block_linear:,} to {size.block_linear - removed:,}, sparsity "
        f"{removed / size.block_linear:.3f} ({asked(recipe)} asked for); nothing was written"
    )


def plan_facts(dense: PreTrainedModel, plan: list[tuple[Any, int]], recipe: Recipe) -> dict[str, Any]:
    """The same ready for JSON."""
    size = measure.model_size(dense, recipe.seq_len or 1)
    removed = sum((site.units - width) * site.cost for site, width in plan)
    sites = [{"site": s.name, "kind": s.kind, "units_before": s.units, "units_after": width} for s, width in plan]
    return {
        "block_linear_before": size.block_linear,
        "block_linear_after": size.block_linear - removed,
        "sparsity": removed / size.block_linear,
        "asked": asked(recipe),
        "sites": sites,
    }


def asked(recipe: Recipe) -> str:
    """What the user wanted."""
    for goal in GOALS:
        if (value := getattr(recipe, goal)) is not None:
            return f"--{goal.replace('_', '-')} {value}"
    if not recipe.separate:
        return f"{recipe.sparsity_of('ffn'):g}"
    return f"{recipe.sparsity_of('attention'):g} of attention and {recipe.sparsity_of('ffn'):g} of FFN"


def run_bench(recipe: BenchRecipe, command: Sequence[str], talk: Talk) -> None:
    """Measure two models and print them side by side."""
    if recipe.save:
        check_own_folder("--save", recipe.pruned)
        bench.check_folder(Path(recipe.pruned))
    typed = shlex.join(command)
    with progress(len(bench.cells(recipe)) + recipe.memory, "loading") as on_step:
        result = bench.bench(recipe, typed, on_step)
    if talk.json:
        print_json(result)
    else:
        print(bench.headline(result))
        print_table(bench.bench_table(result))
        for line in result["remarks"]:
            print(line)
    if recipe.save:  # last: what was measured is not lost on a disk that is full by now
        bench.save(result, Path(recipe.pruned))
        write_page(Path(recipe.pruned))


def check_own_folder(flag: str, folder: str) -> None:
    """Raises SnpError if a result has no place in a folder, before it is computed."""
    missing = [name for name in (report.REPORT, "README.md") if not (Path(folder) / name).is_file()]
    if missing:
        raise SnpError(
            f"{flag}: expected an output folder of `snp-llm prune`; {folder} has no {' and no '.join(missing)}."
        )


def run_evaluate(recipe: EvaluationRecipe, talk: Talk) -> None:
    """Perplexity and tasks, with everything needed to repeat the numbers."""
    own = [name for name in recipe.models if (Path(name) / report.REPORT).is_file()]
    if recipe.save and not own:
        check_own_folder("--save", recipe.models[0])
    for name in own if recipe.save else []:
        evaluation.check_folder(Path(name))
    with progress(len(recipe.models) * (recipe.perplexity + (recipe.tasks is not None)), "evaluating") as on_step:
        results = evaluation.evaluate(recipe, on_step)
    if talk.json:
        print_json(evaluation.as_json(results))
    elif len(results) == 1 and recipe.tasks is None:
        print(f"{results[0].text}: perplexity {results[0].perplexity:.4f}")
    else:
        print_table(evaluation.evaluation_table(results))
        if recipe.perplexity:
            for text in dict.fromkeys(result.text for result in results):
                print(f"perplexity on {text}")
    if not evaluation.comparable(results):
        log.warning("the models' tokenizers differ: their perplexities are of different tokens and do not compare")
    if recipe.save:  # last, as in `run_bench`
        for result in results:
            if result.model in own:
                evaluation.save(result, recipe, Path(result.model))
                write_page(Path(result.model))


def run_report(recipe: ReportRecipe, talk: Talk) -> None:
    """The page of every folder, each beside the others."""
    folders = list(dict.fromkeys(Path(folder) for folder in recipe.folders))
    texts = [page.page_of(folder, [other for other in folders if other != folder]) for folder in folders]
    pages = [folder / report.PAGE for folder in folders]
    for file, text in zip(pages, texts, strict=True):  # all of them, or none
        report.write_text(file, text)
    if talk.json:
        print_json({"pages": [str(written) for written in pages]})
    else:
        print(*pages, sep="\n")
