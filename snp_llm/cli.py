"""The command line: parse, run, print. Every expected failure becomes one line on stderr and exit code 2."""

import contextlib
import io
import json
import logging
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import make_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
import transformers
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from snp_llm import bench, checkpoint, evaluation, hub, inspection, measure, pipeline, report
from snp_llm.data import Windows, evaluation_windows
from snp_llm.device import compute_device
from snp_llm.errors import SnpError
from snp_llm.estimate import estimate, refuse_what_cannot_fit
from snp_llm.models.families import find_blocks, find_family, find_sites
from snp_llm.models.layouts import describe_layout
from snp_llm.options import BenchRecipe, InspectRecipe, Talk
from snp_llm.recipe import GOALS, EvaluationRecipe, PushRecipe, Recipe
from snp_llm.skeleton import load_skeleton
from snp_llm.terminal import print_table
from snp_llm.version import __version__
from snp_llm.visit import OnStep, needs_visit

log = logging.getLogger("snp_llm")
LONGEST_COMPARISON = 128  # tokens on which the reloaded model is compared
T = TypeVar("T")

USAGE = f"""snp-llm {__version__}: one-shot structured pruning of language models

  snp-llm inspect MODEL                 its parts, what pruning could give, what it would take
  snp-llm prune MODEL --sparsity 0.3    a smaller model, verified, with its perplexity
  snp-llm eval MODEL [MODEL ...]        perplexity and zero-shot tasks, models side by side
  snp-llm bench DENSE PRUNED            speed, memory and size of both, measured in turns
  snp-llm report FOLDER [FOLDER ...]    the report page of smaller models, made again
  snp-llm push FOLDER user/name         upload a smaller model to the Hugging Face Hub

Each has --help, --json, --quiet and --log-level. MODEL is a hub id, a local folder, or the bundled
tiny-opt. Results go to stdout, progress to stderr. Exit codes: 0 done; 2 refused or failed, said in
one line; 130 interrupted."""


def main() -> int:
    """The console script `snp-llm`."""
    commands = {
        "inspect": inspect_main,
        "prune": prune_main,
        "eval": evaluate_main,
        "bench": bench_main,
        "push": push_main,
    }
    command, *rest = sys.argv[1:] or ["--help"]
    if command in commands:
        return commands[command](rest)
    if command in ("--help", "-h", "--version"):
        print(USAGE)
        return 0
    return _fail(f"unknown command {command!r}; expected one of {', '.join(commands)}.")


def prune_main(arguments: Sequence[str]) -> int:
    """`snp-llm prune`."""
    command = ["snp-llm", "prune", *arguments]
    return _guarded(Recipe, "snp-llm prune", arguments, lambda recipe, talk: run_prune(recipe, command, talk))


def evaluate_main(arguments: Sequence[str]) -> int:
    """`snp-llm eval`."""
    return _guarded(EvaluationRecipe, "snp-llm eval", arguments, run_evaluate)


def inspect_main(arguments: Sequence[str]) -> int:
    """`snp-llm inspect`."""
    return _guarded(InspectRecipe, "snp-llm inspect", arguments, run_inspect)


def bench_main(arguments: Sequence[str]) -> int:
    """`snp-llm bench`."""
    command = ["snp-llm", "bench", *arguments]
    return _guarded(BenchRecipe, "snp-llm bench", arguments, lambda recipe, talk: run_bench(recipe, command, talk))


def push_main(arguments: Sequence[str]) -> int:
    """`snp-llm push`."""
    return _guarded(PushRecipe, "snp-llm push", arguments, run_push)


def run_inspect(recipe: InspectRecipe, talk: Talk) -> None:
    """Print what a config says."""
    model = load_skeleton(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    # By name, since `prune` may know fewer places for hidden states than can be reckoned with.
    same = ("sparsity", "head_unit", "num_samples", "seq_len", "batch_size", "hidden_device", "device", "dtype")
    facts = inspection.inspect(model, Recipe(recipe.model, **{name: getattr(recipe, name) for name in same}))
    if talk.json:
        print_json(facts)
    else:
        inspection.print_inspection(facts)


def run_prune(recipe: Recipe, command: Sequence[str], talk: Talk) -> None:
    """Load, prune, save, verify, measure, print the closing table."""
    folder = Path(recipe.output_folder)
    if not recipe.dry_run:
        checkpoint.check_output(folder, overwrite=recipe.overwrite)
        if recipe.push_to_hub is not None:
            hub.check_access(recipe.push_to_hub)
    bundled = recipe.model == checkpoint.TINY_OPT
    recipe = replace(recipe, calibration=recipe.calibration or ("bundled" if bundled else "wikitext2"))
    recipe = replace(recipe, eval_dataset=recipe.eval_dataset or ("bundled" if bundled else "wikitext2"))
    device = compute_device(recipe.device)
    dense, tokenizer = checkpoint.load(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    recipe = pipeline.resolve(recipe, dense)
    assert recipe.seq_len is not None and recipe.eval_dataset is not None and recipe.round_to is not None
    family = find_family(dense.config)
    sites = find_sites(find_blocks(dense, family), family, recipe.head_unit)
    say = log.info if talk.json else print
    say(describe_layout(dense, sites, recipe.layout, recipe.round_to))
    needed = estimate(dense, recipe)
    if recipe.dry_run:
        takes = inspection.estimate_facts(needed, device)
        if not talk.json:
            print("This would take, evaluation not counted:")
            inspection.print_estimate(takes, device.type)
        refuse_what_cannot_fit(needed, device, recipe.hidden_device, folder)
        with progress(dense.config.num_hidden_layers) as on_step:
            plan = pipeline.plan(dense, tokenizer, recipe, on_step=on_step)
        if talk.json:
            print_json({"estimate": takes, **plan_facts(dense, plan, recipe)})
        else:
            print_plan(dense, plan, recipe)
        return
    try:
        refuse_what_cannot_fit(needed, device, recipe.hidden_device, folder)
    except SnpError as doubt:  # an estimate; only a rehearsal is refused for it
        log.warning("this may not fit: %s", doubt)

    windows: Windows | None = None
    if recipe.eval:  # read before pruning, so that a mistake in it costs seconds
        windows = evaluation_windows(
            tokenizer, recipe.eval_dataset, split=recipe.eval_split, column=recipe.text_column, seq_len=recipe.seq_len
        )
    rounds = recipe.steps if recipe.perplexity_increase is None else 1
    with progress(rounds * (2 + needs_visit(recipe)) * dense.config.num_hidden_layers) as on_step:
        pruned = pipeline.prune(dense, tokenizer, recipe, on_step=on_step)
    with checkpoint.finished_folder(folder, overwrite=recipe.overwrite) as partial:
        checkpoint.save(pruned.model, tokenizer, partial)
        difference = checkpoint.verify(pruned.model, partial, pruned.calibration.tokens[:1, :LONGEST_COMPARISON])
        models = (dense, pruned.model)
        perplexities: list[float | None] = [None, None]
        speeds: list[float | None] = [None, None]
        try:
            if windows is not None:
                perplexities = [
                    measure.perplexity(m, windows.tokens, batch_size=recipe.batch_size, device=device) for m in models
                ]
            speeds = [*measure.prefill_speed(models, pruned.calibration.tokens[:1], device=device)]
        except torch.OutOfMemoryError:  # a whole model needs more than the one block that pruning had there
            log.warning("%s: not enough memory to measure a whole model; the pruned model is saved without", device)
        sizes = [measure.model_size(m, recipe.seq_len) for m in models]
        disks = (sizes[0].bytes, checkpoint.folder_bytes(partial))
        before, after = (report.Measured(*figures) for figures in zip(sizes, disks, perplexities, speeds, strict=True))
        facts: dict[str, Any] = {"command": shlex.join(command), "largest_logit_difference": difference}
        if windows is not None:
            facts["evaluation"] = windows.description
        summary = report.build_report(pruned, before, after, facts)
        report.write_report(summary, partial)
        base_model = recipe.model if checkpoint.is_hub_id(recipe.model) else None
        report.write_card(summary, pruned, base_model, partial)
    if not talk.json:
        print_closing(recipe, folder, summary, report.closing_table(before, after, pruned))
        if recipe.push_to_hub is not None:
            run_push(PushRecipe(str(folder), recipe.push_to_hub, recipe.private), talk)
        return
    sites_without = [{k: v for k, v in site.items() if k != "kept"} for site in summary["sites"]]
    result = {"output": str(folder), **summary, "sites": sites_without}
    if recipe.push_to_hub is not None:
        result["url"] = hub.push(folder, recipe.push_to_hub, private=recipe.private)
    print_json(result)


def print_closing(recipe: Recipe, folder: Path, summary: dict[str, Any], table: Table) -> None:
    """The end of a prune for people."""
    achieved = summary["sparsity"]["achieved"]
    print(f"{recipe.model} -> {folder}: sparsity {achieved:.4f}, {asked(recipe)} asked for")
    Console().print(table)
    if "evaluation" in summary:
        print(f"perplexity on {summary['evaluation']}")
    print(f"calibrated on {summary['calibration']['text']}")
    difference = summary["largest_logit_difference"]
    print(f"reloaded in a fresh process: logits differ by {difference:.1e} of the largest")


def run_push(recipe: PushRecipe, talk: Talk) -> None:
    """Upload a finished folder."""
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()  # an upload takes long
    url = hub.push(Path(recipe.folder), recipe.repo_id, private=recipe.private)
    if talk.json:
        print_json({"folder": recipe.folder, "url": url})
    else:
        print(f"{recipe.folder} -> {url}")


def print_plan(dense: transformers.PreTrainedModel, plan: list[tuple[Any, int]], recipe: Recipe) -> None:
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


def plan_facts(dense: transformers.PreTrainedModel, plan: list[tuple[Any, int]], recipe: Recipe) -> dict[str, Any]:
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


def print_json(value: dict[str, Any]) -> None:
    """A result for other programs."""
    print(json.dumps(value, indent=1, allow_nan=False))


def asked(recipe: Recipe) -> str:
    """What the user wanted."""
    for goal in GOALS:
        if (value := getattr(recipe, goal)) is not None:
            return f"--{goal.replace('_', '-')} {value}"
    if recipe.ffn_sparsity is None and recipe.head_sparsity is None:
        return f"{recipe.sparsity:g}"
    return f"{recipe.sparsity_of('attention'):g} of attention and {recipe.sparsity_of('ffn'):g} of FFN"


def run_bench(recipe: BenchRecipe, command: Sequence[str], talk: Talk) -> None:
    """Measure two models and print them side by side."""
    if recipe.save:
        check_own_folder("--save", recipe.pruned)
    typed = shlex.join(command)
    with progress(len(bench.cells(recipe)) + recipe.memory, "loading") as on_step:
        result = bench.bench(recipe, typed, on_step)
    if recipe.save:
        bench.save(result, Path(recipe.pruned))
    if talk.json:
        print_json(result)
        return
    print(bench.headline(result))
    print_table(bench.bench_table(result))
    for line in result["remarks"]:
        print(line)


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
    with progress(len(recipe.models) * (recipe.perplexity + (recipe.tasks is not None)), "evaluating") as on_step:
        results = evaluation.evaluate(recipe, on_step)
    if recipe.save:
        for result in results:
            if result.model in own:
                evaluation.save(result, recipe, Path(result.model))
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


@contextlib.contextmanager
def progress(steps: int, what: str = "calibrating") -> Iterator[OnStep]:
    """A bar with the last step's line on a terminal, a line a step elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal or not log.isEnabledFor(logging.INFO):  # --quiet has no bar either
        yield log.info
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=steps)
        yield lambda line: bar.update(task, advance=1, description=line)


def _parse(kind: type[T], program: str, arguments: Sequence[str]) -> T:
    """A recipe from command-line arguments; tyro's boxed errors become one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, prog=program, args=list(arguments))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        body = [
            line for line in captured.getvalue().splitlines() if not line.startswith("╭")
        ]  # that is the box's title
        text = re.sub(r"[─╰╯│]+|-{3,}", " ", " ".join(body))
        raise SnpError(" ".join(text.split())) from None


def _with_talk(kind: Any) -> Any:
    """A dataclass of a command's recipe and its `Talk`, whose fields are all options of one command."""
    flat = tyro.conf.OmitArgPrefixes
    return make_dataclass(
        kind.__name__, [("recipe", flat[kind]), ("talk", flat[Talk])], namespace={"__doc__": kind.__doc__}
    )


def _guarded(kind: type[T], program: str, arguments: Sequence[str], run: Callable[[T, Talk], None]) -> int:
    """Parses a command's recipe and its `Talk`, runs it, and turns what may fail into one line and an exit code."""
    log.handlers = [logging.StreamHandler()]  # to what is stderr now
    log.setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries end in an error that says the same in one line
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _interrupt)  # so that temporary folders are removed
    try:
        command = _parse(_with_talk(kind), program, arguments)
        log.setLevel(command.talk.level)
        run(command.recipe, command.talk)
    except SnpError as error:
        return _fail(str(error))
    except torch.OutOfMemoryError as error:
        return _fail(
            f"out of memory on the device ({str(error).splitlines()[0]}). Use a smaller --batch-size or --seq-len."
        )
    except KeyboardInterrupt as interrupt:
        return _fail("interrupted; nothing was written.", code=interrupt.args[0] if interrupt.args else 130)
    return 0


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


def _fail(message: str, code: int = 2) -> int:
    print(f"snp-llm: error: {message}", file=sys.stderr)
    return code
