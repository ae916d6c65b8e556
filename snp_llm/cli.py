"""The command line: parse, run, print. Every expected failure becomes one line on stderr and exit code 2."""

import argparse
import contextlib
import io
import logging
import re
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import huggingface_hub
import torch
import transformers
import tyro
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm import checkpoint, hub, measure, page, pipeline, ranks, report
from snp_llm.data import Windows, evaluation_windows
from snp_llm.device import Clock, compute_device, describe_device
from snp_llm.errors import SnpError
from snp_llm.journal import Journal
from snp_llm.models.families import find_blocks, find_family, find_sites
from snp_llm.models.layouts import describe_layout
from snp_llm.recipe import GOALS, EvaluationRecipe, PushRecipe, Recipe, ReportRecipe
from snp_llm.recipe_file import RECIPE, build_recipe, read_settings, save_recipe
from snp_llm.version import __version__
from snp_llm.visit import OnStep, needs_visit

log = logging.getLogger("snp_llm")
LONGEST_COMPARISON = 128  # tokens on which the reloaded model is compared
T = TypeVar("T")


@dataclass(frozen=True)
class PruneArguments:
    """Prune a model by a recipe: settings given here, in a file, or both."""

    recipe: tyro.conf.OmitArgPrefixes[Recipe]
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Recipe file, YAML, to start from; options given here override what it says."""


USAGE = f"""snp-llm {__version__}: one-shot structured pruning of language models

  snp-llm prune MODEL --sparsity 0.3    a smaller model, verified, with its perplexity
  snp-llm eval MODEL                    perplexity of any supported model
  snp-llm report FOLDER [FOLDER ...]    report.html of such smaller models, side by side
  snp-llm push FOLDER user/name         upload such a smaller model to the Hugging Face Hub

Each has --help. MODEL is a hub id, a local folder, or the bundled tiny-opt."""


def main() -> int:
    """The console script `snp-llm`."""
    commands = {"prune": prune_main, "eval": evaluate_main, "report": report_main, "push": push_main}
    command, *rest = sys.argv[1:] or ["--help"]
    if command in commands:
        return commands[command](rest)
    if command in ("--help", "-h", "--version"):
        print(USAGE)
        return 0
    return _fail(f"unknown command {command!r}; expected one of {', '.join(commands)}.")


def prune_main(arguments: Sequence[str]) -> int:
    """`snp-llm prune`."""
    return _guarded(lambda: run_prune(_parse_prune(arguments), ["snp-llm", "prune", *arguments]))


def evaluate_main(arguments: Sequence[str]) -> int:
    """`snp-llm eval`."""
    return _guarded(lambda: run_evaluate(_parse(EvaluationRecipe, "snp-llm eval", arguments)))


def report_main(arguments: Sequence[str]) -> int:
    """`snp-llm report`."""
    return _guarded(lambda: run_report(_parse(ReportRecipe, "snp-llm report", arguments)))


def push_main(arguments: Sequence[str]) -> int:
    """`snp-llm push`."""
    return _guarded(lambda: run_push(_parse(PushRecipe, "snp-llm push", arguments)))


def run_prune(recipe: Recipe, command: Sequence[str]) -> None:
    """Load, prune, save, verify, measure, print the closing table; on several ranks, rank 0 writes and prints."""
    folder = Path(recipe.output_folder)
    if not recipe.dry_run:
        checkpoint.check_output(folder, overwrite=recipe.overwrite)
        if recipe.push_to_hub is not None:
            hub.check_access(recipe.push_to_hub)
    bundled = recipe.model == checkpoint.TINY_OPT
    recipe = replace(recipe, calibration=recipe.calibration or ("bundled" if bundled else "wikitext2"))
    recipe = replace(recipe, eval_dataset=recipe.eval_dataset or ("bundled" if bundled else "wikitext2"))
    if recipe.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            show_plan(recipe, Path(scratch))
        return
    with ranks.joined(recipe.device):
        if ranks.rank():
            log.setLevel(logging.ERROR)  # rank 0 says it for all
        with checkpoint.finished_folder(folder, overwrite=recipe.overwrite, resume=recipe.resume) as partial:
            closing = prune_into(partial, recipe, command)
        if ranks.rank() == 0:
            for line in closing:
                print(line) if isinstance(line, str) else Console().print(line)
            write_page(folder)  # of the folder's own files, when nothing can happen to the model any more
            if (folder / report.PAGE).exists():
                print(f"in pictures: {folder / report.PAGE}")
            if recipe.push_to_hub is not None:
                run_push(PushRecipe(str(folder), recipe.push_to_hub, recipe.private))


def prune_into(partial: Path, recipe: Recipe, command: Sequence[str]) -> list[Any]:
    """Everything between a parsed recipe and a folder that only has to get its name.

    Returns:
        What to print at the end.
    """
    device = compute_device(recipe.device)
    clock = Clock(device)
    with clock.phase("loading"):
        dense, tokenizer = load_on_disk(recipe, partial)
    recipe = pipeline.resolve(recipe, dense)
    assert recipe.seq_len is not None and recipe.eval_dataset is not None
    announce_layout(dense, recipe)
    windows: Windows | None = None
    if recipe.eval:  # read before pruning, so that a mistake in it costs seconds
        windows = evaluation_windows(
            tokenizer, recipe.eval_dataset, split=recipe.eval_split, column=recipe.text_column, seq_len=recipe.seq_len
        )
    journal = Journal(partial / checkpoint.JOURNAL, recipe.save_every)
    steps = recipe.steps * (2 + needs_visit(recipe)) * dense.config.num_hidden_layers
    with progress(steps if recipe.perplexity_increase is None else None) as on_step:  # a search's end is not known
        pruned = pipeline.prune(dense, tokenizer, recipe, journal=journal, on_step=on_step)
    compared = pruned.calibration.tokens[:1, :LONGEST_COMPARISON]

    def save_and_verify() -> float:
        checkpoint.save(pruned.model, tokenizer, partial)
        return checkpoint.verify(pruned.model, partial, compared)

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
        return []
    speeds = measure.prefill_speed(models, pruned.calibration.tokens[:1], device=device)
    sizes = [measure.model_size(m, recipe.seq_len) for m in models]
    disks = (sizes[0].bytes, checkpoint.folder_bytes(partial))
    before, after = (report.Measured(*figures) for figures in zip(sizes, disks, perplexities, speeds, strict=True))
    facts: dict[str, Any] = {"command": shlex.join(command), "largest_logit_difference": difference}
    facts["device"] = describe_device(device)
    if windows is not None:
        facts["evaluation"] = windows.description
    summary = report.build_report(pruned, before, after, facts)
    report.write_report(summary, partial)
    base_model = recipe.model if checkpoint.is_hub_id(recipe.model) else None
    report.write_card(summary, pruned, base_model, partial)
    save_recipe(pruned.recipe, partial / RECIPE, shlex.join(command))
    achieved = summary["sparsity"]["achieved"]
    return [
        f"{recipe.model} -> {recipe.output_folder}: sparsity {achieved:.4f}, {asked(recipe)} asked for",
        report.closing_table(before, after, pruned),
        *([] if windows is None else [f"perplexity on {windows.description}"]),
        f"calibrated on {pruned.calibration.description}",
        f"reloaded in a fresh process: logits differ by {difference:.1e} of the largest",
    ]


def show_plan(recipe: Recipe, scratch: Path) -> None:
    """What `--dry-run` does."""
    dense, tokenizer = load_on_disk(recipe, scratch)
    recipe = pipeline.resolve(recipe, dense)
    announce_layout(dense, recipe)
    with progress(dense.config.num_hidden_layers) as on_step:
        plan = pipeline.plan(dense, tokenizer, recipe, on_step=on_step)
    print_plan(dense, plan, recipe)


def load_on_disk(recipe: Recipe, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dense model, its weights in their files; `folder` takes those that are in no safetensors file."""
    own = folder / checkpoint.DENSE / str(ranks.rank())
    return checkpoint.load(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code, on_disk=own)


def announce_layout(dense: PreTrainedModel, recipe: Recipe) -> None:
    """Says what will be written and what loads it."""
    assert recipe.round_to is not None
    family = find_family(dense.config)
    sites = find_sites(find_blocks(dense, family), family, recipe.head_unit)
    if ranks.rank() == 0:
        print(describe_layout(dense, sites, recipe.layout, recipe.round_to), flush=True)


def run_report(recipe: ReportRecipe) -> None:
    """The page of every folder, each beside the others."""
    folders = list(dict.fromkeys(Path(folder) for folder in recipe.folders))
    for folder in folders:
        print(page.write_page(folder, [other for other in folders if other != folder]))


def write_page(folder: Path) -> None:
    """The page of a model that is saved already: it is worth having, and not worth losing that model for."""
    try:
        page.write_page(folder)
    except KeyboardInterrupt:
        raise SnpError(f"interrupted; {folder} is complete but for {report.PAGE}: snp-llm report {folder}") from None
    except Exception as error:  # matplotlib, jinja2, fonts, a full disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning(f"{folder} is complete but for {report.PAGE} ({reason}); later: snp-llm report {folder}")


def run_push(recipe: PushRecipe) -> None:
    """Upload a finished folder."""
    if sys.stderr.isatty():
        huggingface_hub.utils.enable_progress_bars()  # an upload takes long
    print(f"{recipe.folder} -> {hub.push(Path(recipe.folder), recipe.repo_id, private=recipe.private)}")


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


def asked(recipe: Recipe) -> str:
    """What the user wanted."""
    for goal in GOALS:
        if (value := getattr(recipe, goal)) is not None:
            return f"--{goal.replace('_', '-')} {value}"
    if recipe.ffn_sparsity is None and recipe.head_sparsity is None:
        return f"{recipe.sparsity:g}"
    return f"{recipe.sparsity_of('attention'):g} of attention and {recipe.sparsity_of('ffn'):g} of FFN"


def run_evaluate(recipe: EvaluationRecipe) -> None:
    """Perplexity of one model, with everything needed to repeat the number."""
    device = compute_device(recipe.device)
    model, tokenizer = checkpoint.load(recipe.model, recipe.dtype, trust_remote_code=recipe.trust_remote_code)
    windows = evaluation_windows(
        tokenizer,
        recipe.dataset or ("bundled" if recipe.model == checkpoint.TINY_OPT else "wikitext2"),
        split=recipe.split,
        column=recipe.text_column,
        seq_len=pipeline.window_length(recipe.seq_len, int(model.config.max_position_embeddings)),
        max_windows=recipe.max_windows,
    )
    value = measure.perplexity(model, windows.tokens, batch_size=recipe.batch_size, device=device)
    print(f"{windows.description}, {windows.tokens.numel():,} tokens: perplexity {value:.4f}")


@contextlib.contextmanager
def progress(steps: int | None) -> Iterator[OnStep]:
    """A bar with the time left, above the last step's line, on a terminal; a line a step elsewhere.

    Args:
        steps: how many there will be; None where that is not known.
    """
    console = Console(stderr=True)
    if ranks.rank():
        yield lambda _line: None
        return
    if not console.is_terminal:
        yield log.info
        return
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("gone,"), TimeRemainingColumn(), "left"
    )
    task = bar.add_task("", total=steps)
    last = Text("calibrating", no_wrap=True, overflow="ellipsis")  # a line of its own: it leaves a bar no room

    def step(line: str) -> None:
        last.plain = line
        bar.advance(task)

    handlers = log.handlers
    with Live(Group(bar, last), console=console, transient=True):
        log.handlers = [logging.StreamHandler()]  # to what is stderr inside, so that warnings stand above the bar
        try:
            yield step
        finally:
            log.handlers = handlers


def _parse_prune(arguments: Sequence[str]) -> Recipe:
    """The recipe of `--config FILE`, where there is one, with what else is said on the command line."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    try:
        files = finder.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:  # no file after it, which is said below as for any other option
        files = []
    if len(files) > 1:
        raise SnpError(f"--config: expected one recipe file, got {len(files)}: {', '.join(files)}.")
    default = None
    if files:
        settings = {"model": tyro.MISSING, **read_settings(files[0])}
        default = PruneArguments(build_recipe(files[0], settings), files[0])
    return _parse(PruneArguments, "snp-llm prune", arguments, default).recipe


def _parse(kind: type[T], program: str, arguments: Sequence[str], default: T | None = None) -> T:
    """A recipe from command-line arguments; tyro's boxed errors become one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            if default is not None:
                return tyro.cli(kind, prog=program, args=list(arguments), default=default)
            return tyro.cli(kind, prog=program, args=list(arguments))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        body = [
            line for line in captured.getvalue().splitlines() if not line.startswith("╭")
        ]  # that is the box's title
        text = re.sub(r"[─╰╯│]+", " ", " ".join(body))
        raise SnpError(" ".join(text.split())) from None


def _guarded(run: Callable[[], None]) -> int:
    log.handlers = [logging.StreamHandler()]  # to what is stderr now
    log.setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # that weights are on disk is no news
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries end in an error that says the same in one line
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _interrupt)  # so that temporary folders are removed
    try:
        run()
    except SnpError as error:
        return _fail(str(error))
    except torch.OutOfMemoryError as error:
        return _fail(
            f"out of memory on the device ({str(error).splitlines()[0]}). Use a smaller --batch-size or --seq-len."
        )
    except KeyboardInterrupt as interrupt:
        return _fail("interrupted; no output was written.", code=interrupt.args[0] if interrupt.args else 130)
    return 0


def _interrupt(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


def _fail(message: str, code: int = 2) -> int:
    print(f"snp-llm: error: {message}", file=sys.stderr)
    return code
