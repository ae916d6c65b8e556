"""The benchmark scripts run and write what they promise, on the bundled model at a small size."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), "tiny-opt", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_perplexity_writes_csv_table_and_plot(tmp_path):
    settings = [
        s
        for value in ("num_samples=4", "seq_len=64", "calibration=bundled", "eval_dataset=bundled")
        for s in ("--set", value)
    ]
    options = ["--sparsities", "0.2,0.5", "--orderings", "zca,random", "--allocations", "uniform", "--seeds", "0,1"]
    out = run("perplexity.py", *options, *settings, "--max-windows", "4", "--output", str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "perplexity.csv").open()))
    assert len(rows) == 8 and {r["ordering"] for r in rows} == {"zca", "random"}
    assert all(abs(float(r["achieved"]) - float(r["sparsity"])) < 0.02 for r in rows)
    table = (tmp_path / "perplexity.md").read_text()
    assert (
        "| ordering | allocation | 20 % | 50 % |" in table
        and "±" in table
        and table.strip().endswith(out.strip()[-40:])
    )
    assert (tmp_path / "perplexity.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_cost_prints_the_ratio(tmp_path):
    out = run("cost.py", "--num-samples", "4", "--seq-len", "64", "--repeats", "1", "--calibration", "bundled")
    header, _, row = [line for line in out.splitlines() if line.startswith("|")]
    figures = dict(zip(header.split("|")[1:-1], row.split("|")[1:-1], strict=True))
    figures = {k.strip(): v.strip() for k, v in figures.items()}
    assert float(figures["ratio"]) > 0 and float(figures["peak prune, MB"]) > 100
