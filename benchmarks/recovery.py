"""What a short training gives back: a model pruned at several sparsities, recovered with several budgets.

    python benchmarks/recovery.py MODEL --text DATA/train.txt --evaluation wikitext=DATA/wiki.test.raw prose=heldout.txt

runs the commands that a user would, `prune`, `recover` and `eval`, and prints and writes a table: perplexity on every
text, the excess over the dense model as a share of one shot's, seconds. Runs that were interrupted go on.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SPARSITIES, TOKENS = (0.2, 0.3), ("1M", "4M")


def snp_llm(*words: object) -> dict[str, Any]:
    """What a command prints with --json."""
    program = "import sys; from snp_llm.cli.main import main; sys.argv[0] = 'snp-llm'; sys.exit(main())"
    command = [sys.executable, "-c", program, *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Prunes, recovers, evaluates, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="to calibrate and to train on")
    parser.add_argument("--evaluation", nargs="+", required=True, metavar="NAME=TEXT")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--tokens", nargs="+", default=TOKENS)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--options", default="", help="further ones of recover, in one word")
    parser.add_argument("--folder", type=Path, default=Path("recovery-runs"))
    parser.add_argument("--csv", type=Path, default=Path("recovery.csv"))
    arguments = parser.parse_args()
    texts = dict(text.split("=", 1) for text in arguments.evaluation)
    models: dict[str, tuple[str, float | None]] = {"dense": (arguments.model, None)}
    shared = ("--calibration", arguments.text, "--seq-len", arguments.seq_len, "--no-eval", "--resume")
    for sparsity in arguments.sparsities:
        pruned = arguments.folder / f"{100 * sparsity:g}"
        if not pruned.exists():
            snp_llm("prune", arguments.model, "--sparsity", sparsity, "--output", pruned, *shared)
        models[f"{100 * sparsity:g} %, one shot"] = (str(pruned), None)
        for tokens in arguments.tokens:
            out = arguments.folder / f"{100 * sparsity:g}-{tokens}"
            if not out.exists():
                more = arguments.options.split()
                snp_llm("recover", pruned, "--tokens", tokens, "--output", out, *shared, *more)
            seconds = json.loads((out / "prune_report.json").read_text())["recovery"][-1]["seconds"]
            models[f"{100 * sparsity:g} %, {tokens} tokens"] = (str(out), seconds)
    rows = table(models, texts, arguments.seq_len)
    with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not number:
            print(f"|---|{'---:|' * (len(row) - 1)}")


def table(models: dict[str, tuple[str, float | None]], texts: dict[str, str], seq_len: int) -> list[list[str]]:
    """Rows of perplexities, and of what is left of one shot's excess."""
    names = [folder for folder, _ in models.values()]
    columns = []
    for text in texts.values():
        found = snp_llm("eval", *names, "--dataset", text, "--seq-len", seq_len)["models"]
        columns.append([model["perplexity"] for model in found])
    rows = [["", *(f"{head}{name}" for name in texts for head in ("", "excess, share of one shot's, ")), "seconds"]]
    once = 0
    for number, (label, (_, seconds)) in enumerate(models.items()):
        once = number if label.endswith("one shot") else once
        cells = []
        for values in columns:
            share = (values[number] - values[0]) / (values[once] - values[0]) if once else None
            cells += [f"{values[number]:.3f}", "" if share is None else f"{share:.2f}"]
        rows.append([label, *cells, "" if seconds is None else f"{seconds:.0f}"])
    return rows


if __name__ == "__main__":
    main()
