"""The console script: which command is meant. Imports nothing that takes time: --help is there at once."""

import sys
from collections.abc import Callable, Sequence

from snp_llm.cli.failure import fail
from snp_llm.runtime.version import __version__

USAGE = f"""snp-llm {__version__}: one-shot structured pruning of language models

  snp-llm inspect MODEL                 its parts, what pruning could give, what it would take
  snp-llm prune MODEL --sparsity 0.3    a smaller model, verified, with its perplexity
  snp-llm recover FOLDER                a short training of a smaller model towards the dense one
  snp-llm eval MODEL [MODEL ...]        perplexity and zero-shot tasks, models side by side
  snp-llm bench DENSE PRUNED            speed, memory and size of both, measured in turns
  snp-llm report FOLDER [FOLDER ...]    report.html of smaller models, side by side
  snp-llm export FOLDER --to gguf       a file for llama.cpp or ONNX Runtime, compared there
  snp-llm push FOLDER user/name         upload a smaller model to the Hugging Face Hub
  snp-llm families                      types of models that are tested, and what can go in each
  snp-llm help COMMAND                  its options
  snp-llm completion bash               completes commands and options there, or in zsh, tcsh

Each has --help, --version, --json, --quiet and --log-level. MODEL is a hub id, a local folder, or
the bundled tiny-opt. Results go to stdout, progress to stderr. Exit codes: 0 done; 2 refused or
failed, said in one line; 130 interrupted, 143 terminated."""

COMMANDS = {
    "inspect": "inspect_main",
    "prune": "prune_main",
    "recover": "recover_main",
    "eval": "evaluate_main",
    "bench": "bench_main",
    "report": "report_main",
    "export": "export_main",
    "push": "push_main",
    "families": "families_main",
    "completion": "completion_main",
}


def main() -> int:
    """The console script `snp-llm`."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command == "help":
        command, rest = (rest[0], ["--help"]) if rest else ("--help", [])
    if command in ("--help", "-h"):
        print(USAGE)
        return 0
    if command == "--version" or (command in COMMANDS and rest == ["--version"]):
        print(f"snp-llm {__version__}")
        return 0
    if command not in COMMANDS:
        return fail(f"unknown command {command!r}; expected one of {', '.join(COMMANDS)}.")
    from snp_llm.cli import parse

    run: Callable[[Sequence[str]], int] = getattr(parse, COMMANDS[command])
    return run(rest)
