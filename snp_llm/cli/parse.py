"""From a command's arguments to its run. Every expected failure becomes one line on stderr and exit code 2."""

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import huggingface_hub
import transformers
import tyro

from snp_llm.cli import bench as bench_command
from snp_llm.cli import evaluate as evaluate_command
from snp_llm.cli import export as export_command
from snp_llm.cli import families as families_command
from snp_llm.cli import inspect as inspect_command
from snp_llm.cli import prune as prune_command
from snp_llm.cli import push as push_command
from snp_llm.cli import recover as recover_command
from snp_llm.cli import report as report_command
from snp_llm.cli.failure import fail
from snp_llm.cli.options import command_of, filled, in_words, taken_apart
from snp_llm.recipe.commands import (
    BenchRecipe,
    EvaluationRecipe,
    ExportRecipe,
    FamiliesRecipe,
    InspectRecipe,
    PushRecipe,
    ReportRecipe,
    Talk,
)
from snp_llm.recipe.file import build_recipe, read_settings
from snp_llm.recipe.recipe import Recipe
from snp_llm.recipe.recovery import RecoverRecipe
from snp_llm.runtime.device import ran_out
from snp_llm.runtime.errors import SnpError, reason, shown

log = logging.getLogger("snp_llm")


T = TypeVar("T")

SHELLS = ("bash", "zsh", "tcsh")


def inspect_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm inspect`."""
    return _guarded(InspectRecipe, "snp-llm inspect", arguments, inspect_command.run_inspect)


def prune_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm prune`."""
    typed = ["snp-llm", "prune", *arguments]

    def run(recipe: Recipe, talk: Talk) -> None:
        prune_command.run_prune(recipe, typed, talk, _config_file(arguments))

    return _guarded(Recipe, "snp-llm prune", arguments, run)


def recover_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm recover`."""
    typed = ["snp-llm", "recover", *arguments]

    def run(recipe: RecoverRecipe, talk: Talk) -> None:
        recover_command.run_recover(recipe, typed, talk)

    return _guarded(RecoverRecipe, "snp-llm recover", arguments, run)


def evaluate_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm eval`."""
    return _guarded(EvaluationRecipe, "snp-llm eval", arguments, evaluate_command.run_evaluate)


def bench_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm bench`."""
    typed = ["snp-llm", "bench", *arguments]
    return _guarded(
        BenchRecipe, "snp-llm bench", arguments, lambda recipe, talk: bench_command.run_bench(recipe, typed, talk)
    )


def report_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm report`."""
    return _guarded(ReportRecipe, "snp-llm report", arguments, report_command.run_report)


def push_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm push`."""
    return _guarded(PushRecipe, "snp-llm push", arguments, push_command.run_push)


def export_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm export`."""
    return _guarded(ExportRecipe, "snp-llm export", arguments, export_command.run_export)


def families_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm families`."""
    return _guarded(FamiliesRecipe, "snp-llm families", arguments, families_command.run_families)


RECIPES: dict[str, type] = {
    "inspect": InspectRecipe,
    "prune": Recipe,
    "recover": RecoverRecipe,
    "eval": EvaluationRecipe,
    "bench": BenchRecipe,
    "report": ReportRecipe,
    "push": PushRecipe,
    "export": ExportRecipe,
    "families": FamiliesRecipe,
}


def completion_main(arguments: Sequence[str]) -> int:
    """Entry point of `snp-llm completion`: a script for the shell that is named."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        return fail(f"snp-llm completion: expected one of {', '.join(SHELLS)}, got {' '.join(arguments) or 'none'}.")
    commands: dict[str, Callable[..., Any]] = {name: command_of(kind) for name, kind in RECIPES.items()}
    asked = ["--tyro-print-completion", arguments[0]]
    with contextlib.suppress(SystemExit):
        tyro.extras.subcommand_cli_from_dict(commands, prog="snp-llm", args=asked)
    return 0


def _guarded(kind: type[T], program: str, arguments: Sequence[str], run: Callable[[T, Talk], None]) -> int:
    """Parses a command's recipe and its `Talk`, runs it, and turns what may fail into one line and an exit code."""
    log.handlers = [logging.StreamHandler()]  # to what is stderr now
    log.setLevel(logging.INFO)
    transformers.logging.set_verbosity_error()
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # that weights are on disk is no news
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries end in an error that says the same in one line
    transformers.logging.disable_progress_bar()
    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):  # so that temporary folders are removed
            before[number] = signal.signal(number, _interrupt)
    try:
        recipe, talk = _parse(kind, program, arguments)
        log.setLevel(talk.level)
        run(recipe, talk)
    except SnpError as error:
        return fail(str(error))
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    # What nothing before has put into words of its own: a file that went away, a disk that is full, names and texts in
    # odd encodings. Said in one line all the same, with what raised it.
    except (OSError, RecursionError, UnicodeError, MemoryError) as error:
        name = f" {shown(error.filename)}" if isinstance(error, OSError) and error.filename else ""
        return fail(f"{type(error).__name__}{name}: {reason(error)}.")
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return fail(f"out of memory ({reason(error)[:200]}). Use a smaller --batch-size or --seq-len, or --device cpu.")
    except KeyboardInterrupt as interrupt:
        said = dict(enumerate(interrupt.args))  # the exit code, and what is the case by now
        return fail(f"interrupted; {said.get(1, 'no output was written')}.", code=said.get(0, 130))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _parse(kind: type[T], program: str, arguments: Sequence[str]) -> tuple[T, Talk]:
    """A command's recipe and its `Talk`.

    Where the recipe is that of a prune, `--config` names a file with settings that options override.
    """
    default: Any = None
    if kind is Recipe and (file := _config_file(arguments)) is not None:
        settings = {"model": tyro.MISSING, **read_settings(file)}
        default = filled(kind, build_recipe(file, settings), file)
    return taken_apart(kind, _tyro(kind, program, arguments, default))


def _config_file(arguments: Sequence[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", action="append", default=[])
    try:
        files = finder.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:  # no file after it, which tyro says as for any other option
        return None
    if len(files) > 1:
        raise SnpError(f"--config: expected one recipe file, got {len(files)}: {', '.join(files)}.")
    return files[0] if files else None


def _tyro(kind: type, program: str, arguments: Sequence[str], default: Any) -> Any:
    """What tyro parses; its boxed errors become one line."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            options = {} if default is None else {"default": default}
            return tyro.cli(command_of(kind), prog=program, args=list(arguments), **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        body = [
            line for line in captured.getvalue().splitlines() if not line.startswith("╭")
        ]  # that is the box's title
        text = re.sub(r"[─╰╯│]+|-{3,}", " ", " ".join(body))
        raise SnpError(f"{in_words(' '.join(text.split()), kind, arguments)} See {program} --help.") from None


def _interrupt(number: int, _frame: object) -> None:
    """Lets the command clean up after itself; who asks a second time does not wait for that, and sees no traceback."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, lambda number, _frame: os._exit(128 + number))
    raise KeyboardInterrupt(128 + number)
