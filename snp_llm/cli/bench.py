"""`snp-llm bench`: two models timed in turns, as a table. Parses no arguments."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from snp_llm.checkpoint.contents import check_own_folder
from snp_llm.cli.report import write_page
from snp_llm.evaluate import speed
from snp_llm.recipe.commands import BenchRecipe, Talk
from snp_llm.report import bench as bench_report
from snp_llm.runtime.terminal import print_json, print_table, progress


def run_bench(recipe: BenchRecipe, command: Sequence[str], talk: Talk) -> None:
    """Measure two models and print them side by side."""
    if recipe.save:
        check_own_folder(recipe.pruned)
        bench_report.check_folder(Path(recipe.pruned))
    typed = shlex.join(command)
    with progress(len(speed.cells(recipe)) + 2 * recipe.memory, "looking at both models") as signs:
        result = speed.bench(recipe, typed, signs)
    if talk.json:
        print_json(result)
    else:
        print(bench_report.headline(result))
        print_table(bench_report.bench_table(result))
        for line in bench_report.width_warning(result):
            print(line)
    if recipe.save:  # last: what was measured is not lost on a disk that is full by now
        bench_report.save(result, Path(recipe.pruned))
        write_page(Path(recipe.pruned))
