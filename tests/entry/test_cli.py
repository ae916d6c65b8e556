"""The command line as a user meets it: what it prints, what it writes, how it refuses."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, OPTForCausalLM

from snp_llm.cli.main import main
from snp_llm.cli.parse import evaluate_main, prune_main
from tests.conftest import save_model, small_model, small_opt

pytestmark = pytest.mark.usefixtures("quick_prunes")
QUICK = ["--calibration", "bundled", "--eval-dataset", "bundled", "--num-samples", "4", "--seq-len", "32"]


def refuse(capsys, arguments, message, command=prune_main):
    """Runs a command that must fail: exit code 2, one or two lines, no traceback."""
    assert command(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith("snp-llm: error: "))  # after signs of life
    error = "\n".join(lines[first:])
    assert len(lines) - first <= 2 and "Traceback" not in "\n".join(lines)
    assert re.search(message, error), error


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_demo_end_to_end(tmp_path):
    """The bundled model through a real process, then loaded where the package cannot be imported."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "snp_llm.prune", "tiny-opt", "--sparsity", "0.3", "--output", str(out)]
    command += ["--num-samples", "32"]  # a quarter of what the README shows
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for words in (
        "parameters",
        "size on disk",
        "perplexity",
        "tokens a second",
        "seconds spent pruning",
        "fresh process",
    ):
        assert words in run.stdout
    assert "block 4 fc2: kept" in run.stderr
    assert f"in pictures: {out / 'report.html'}" in run.stdout and (out / "report.html").stat().st_size > 100_000
    report = json.loads((out / "prune_report.json").read_text())
    dense, pruned = report["dense"], report["pruned"]
    assert report["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.01)
    assert pruned["disk"] == (out / "model.safetensors").stat().st_size < dense["disk"]
    assert dense["perplexity"] < pruned["perplexity"] < 1.5 * dense["perplexity"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    code = (
        "import sys; sys.modules['snp_llm'] = None\n"  # any import of it would fail
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r}, trust_remote_code=True)\n"
        "text = model.generate(**tokenizer('The value of the', return_tensors='pt'), max_new_tokens=8)\n"
        "print(type(model).__name__, text.shape[1])\n"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.startswith("SnpOPTForCausalLM")


def test_a_budget_from_the_command_line(opt_folder, tmp_path, capsys):
    out, plain = tmp_path / "out", ["--output", str(tmp_path / "out"), "--round-to", "4", *QUICK]
    assert prune_main([str(opt_folder), "--target-params", "0.9x", *plain]) == 0
    assert "--target-params 0.9x asked for" in capsys.readouterr().out
    report = json.loads((out / "prune_report.json").read_text())
    ratio = report["pruned"]["size"]["parameters"] / report["dense"]["size"]["parameters"]
    assert 0.89 < ratio <= 0.9 and report["sparsity"]["target"] is None and report["trials"] == []
    assert report["predicted_perplexity_ratio"] > 1
    assert {"predicted_loss", "reference_weight", "dampening"} <= set(report["sites"][0])


def test_a_permitted_rise_of_perplexity_from_the_command_line(opt_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--max-perplexity-increase", "10%", "--output", str(out), "--round-to", "4", "--no-eval", *QUICK]
    assert prune_main([str(opt_folder), *arguments]) == 0
    printed = capsys.readouterr()
    assert "--max-perplexity-increase 10% asked for" in printed.out and "held-out perplexity" in printed.err
    report = json.loads((out / "prune_report.json").read_text())
    kept = [trial for trial in report["trials"] if trial["sparsity"] == report["sparsity"]["target"]]
    assert len(kept) == 1 and kept[0]["perplexity_rise"] <= 0.1


def test_budgets_that_cannot_be_are_refused(opt_folder, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out"), *QUICK]
    refuse(capsys, [str(opt_folder), "--target-size", "1TB", *out], "--target-size: expected a number with one of")
    refuse(
        capsys, [str(opt_folder), "--target-params", "1B", *out], "--target-params: expected less than the model has"
    )
    refuse(capsys, [str(opt_folder), "--target-params", "2K", *out], "--target-params: expected at least .*. Ask for")
    refuse(
        capsys,
        [str(opt_folder), "--max-perplexity-increase", "5%", "--dry-run", *out],
        "--dry-run: expected a budget whose widths",
    )
    assert not (tmp_path / "out").exists()


def test_prune_then_eval_agree(opt_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert prune_main([str(opt_folder), "--output", str(out), *QUICK]) == 0
    capsys.readouterr()
    report = json.loads((out / "prune_report.json").read_text())
    assert evaluate_main([str(out), "--dataset", "bundled", "--seq-len", "32"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"bundled \(test\), \d+ windows of 32 tokens, [\d,]+ tokens: perplexity [\d.]+\n", printed)
    value = float(printed.split()[-1])
    assert value == pytest.approx(report["pruned"]["perplexity"], rel=1e-4)


def test_only_ffn_and_uniform_is_a_plain_opt(opt_folder, tmp_path):
    out = tmp_path / "out"
    options = ["--head-sparsity", "0", "--ffn-sparsity", "0.5", "--allocation", "uniform", "--no-eval"]
    assert prune_main([str(opt_folder), "--output", str(out), *QUICK, *options]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "opt" and config["ffn_dim"] == 32 and "auto_map" not in config
    assert not list(out.glob("*.py"))
    assert type(AutoModelForCausalLM.from_pretrained(out)) is OPTForCausalLM
    assert json.loads((out / "prune_report.json").read_text())["pruned"]["perplexity"] is None


def test_sparsity_zero_saves_the_same_model(opt_folder, tmp_path):
    out = tmp_path / "out"
    assert prune_main([str(opt_folder), "--output", str(out), "--sparsity", "0", "--no-eval", *QUICK]) == 0
    tokens = torch.randint(2048, (1, 20))
    dense, same = (AutoModelForCausalLM.from_pretrained(f).eval()(tokens).logits for f in (opt_folder, out))
    assert torch.equal(dense, same)


def test_dry_run_prints_widths_and_writes_nothing(opt_folder, tmp_path, capsys):
    for allocation in ("uniform", "variance"):
        options = ["--dry-run", "--allocation", allocation, "--output", str(tmp_path / "out")]
        assert prune_main([str(opt_folder), *options, *QUICK]) == 0
        printed = capsys.readouterr().out
        assert len(re.findall(r"^ +\d  \d of 4 +\d+ of 64$", printed, re.M)) == 3
        assert "nothing was written" in printed and "(0.3 asked for)" in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_names_the_columns_above_them(opt_folder, tmp_path, capsys):
    options = ["--dry-run", "--depth", "only", "--measured-cuts", "0", "--output", str(tmp_path / "out")]
    assert prune_main([str(opt_folder), *options, *QUICK]) == 0
    assert re.search(r"^block  heads +FFN channels\n +0  \d of 4", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("layout", ["uniform", "padded"])
def test_the_layout_is_announced_before_and_holds_afterwards(layout, tokenizer, tmp_path, capsys):
    save_model(small_model("llama", torch.float32, num_key_value_heads=6), tokenizer, tmp_path / "llama")
    options = ["--layout", layout, "--head-sparsity", "0.16", "--ffn-sparsity", "0.25", "--no-eval"]
    assert prune_main([str(tmp_path / "llama"), "--output", str(tmp_path / "out"), *options, *QUICK]) == 0
    printed = capsys.readouterr()
    assert f"layout {layout}: " in printed.err and ("llama or mistral" in printed.err) == (layout == "uniform")
    assert printed.out.startswith(f"{tmp_path / 'llama'} -> ")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == {"uniform": "mistral", "padded": "llama"}[layout]
    report = json.loads((tmp_path / "out/prune_report.json").read_text())
    assert report["recipe"]["layout"] == layout and report["recipe"]["round_to"] == 8
    assert report["sparsity"]["achieved"] == pytest.approx(0.22, abs=0.03)
    words = ["--layout", layout, "--no-eval", *QUICK, "--overwrite", "--quiet"]
    assert prune_main([str(tmp_path / "llama"), "--output", str(tmp_path / "out"), *words]) == 0
    printed = capsys.readouterr()
    assert not any(said in printed.err for said in ("layout", "block 0", "saving", "speed"))
    assert printed.out.startswith(f"{tmp_path / 'llama'} -> ")
    smaller = report["pruned"]["size"]["parameters"] < report["dense"]["size"]["parameters"]
    assert smaller == (layout != "padded")


def test_dry_run_counts_query_heads(tokenizer, tmp_path, capsys):
    save_model(small_model("llama", torch.float32), tokenizer, tmp_path / "llama")
    options = ["--dry-run", "--head-sparsity", "0.33", "--allocation", "uniform", *QUICK]
    assert prune_main([str(tmp_path / "llama"), *options]) == 0
    assert "4 of 6" in capsys.readouterr().out


def test_overwrite(opt_folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(opt_folder), "--output", str(out), "--no-eval", *QUICK]
    assert prune_main(arguments) == 0
    capsys.readouterr()
    refuse(capsys, arguments, "exists. Choose another --output, or replace it with --overwrite")
    (out / "model.safetensors").write_text("stale")
    assert prune_main([*arguments, "--overwrite"]) == 0
    assert (out / "model.safetensors").stat().st_size > 1000
    (out / "mine").write_text("")
    refuse(capsys, [*arguments, "--overwrite"], "holds mine, which `snp-llm prune` did not write there")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1"], "--sparsity: expected a number from 0 to below 1, got 1"),
        (["--sparsity", "-0.2"], r"--sparsity"),
        (["--sparsity", "much"], "sparsity"),
        (["--sparsity", "0.97"], "--sparsity: expected at most 0.8.*; got 0.97. Ask for 0.8"),
        (["--sparsity", "0.97", "--allocation", "uniform"], "Ask for"),
        (["--seq-len", "65"], "--seq-len: expected at most the model's 64 positions, got 65"),
        (["--ordring", "zca"], "unknown option --ordring.*--ordering"),
        (["--ordering", "zac"], "zca.*zac"),
        (["--calibration", "wikitxt2"], "Did you mean 'wikitext2'"),
        (["--calibration", "nobody/nothing"], "nobody/nothing cannot be read"),
        (["--calibration", "missing.jsonl"], "no such file"),
        (["--eval-dataset", "missing.txt"], "no such file"),
        (["--device", "cuda"], "--device cuda: not available here"),
        (["--output", "/proc/out"], "cannot be written"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(options, message, opt_folder, tmp_path, capsys, monkeypatch):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    refuse(capsys, [str(opt_folder), "--output", "out", *QUICK, *options], message)
    assert sorted(tmp_path.iterdir()) == before


def test_too_little_calibration_text(opt_folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Only a few words.")
    refuse(
        capsys,
        [str(opt_folder), *QUICK, "--calibration", str(tmp_path / "short.txt")],
        "at least one window of 32 tokens",
    )


def test_bad_models(tmp_path, tokenizer, capsys):
    refuse(capsys, ["nobody/nothing"], "model nobody/nothing: its config cannot be loaded")
    refuse(capsys, ["nobody/nothing"], "There is no folder nobody/nothing here.")
    refuse(capsys, ["./nowhere"], "no such folder")
    bert = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    bert.save_pretrained(tmp_path / "bert")
    refuse(capsys, [str(tmp_path / "bert")], "'bert' is not supported: its 1 blocks have no attention and no FFN")
    model = small_opt()
    model.model.decoder.layers[2].self_attn.v_proj.weight[0, 0] = float("inf")
    save_model(model, tokenizer, tmp_path / "inf")
    refuse(capsys, [str(tmp_path / "inf"), *QUICK], r"layers.2.self_attn.v_proj.weight: weights hold NaN or Inf")


def test_eval_refuses_too(opt_folder, capsys):
    refuse(capsys, [str(opt_folder), "--dataset", "ptbb"], "Did you mean 'ptb'", evaluate_main)
    refuse(
        capsys, [str(opt_folder), "--max-windows", "0"], "--max-windows: expected an integer from 1 to", evaluate_main
    )
    refuse(capsys, ["./nowhere"], "no such folder", evaluate_main)


def test_console_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["snp-llm"])
    assert main() == 0
    assert "snp-llm prune MODEL" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["snp-llm", "prnue"])
    assert main() == 2
    assert "unknown command 'prnue'" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("module", ["prune", "evaluate"])
def test_modules_have_help(module):
    run = subprocess.run([sys.executable, "-m", f"snp_llm.{module}", "--help"], capture_output=True, text=True)
    assert run.returncode == 0 and "--seq-len" in run.stdout and run.stderr == ""


def test_importing_the_package_reaches_for_nothing():
    """No network, no files of datasets, neither their library nor that for pictures, in an import; after one of
    transformers pruned configs are known all the same."""
    code = (
        "import socket, sys\n"
        "def refuse(*_args, **_kwargs): raise AssertionError('the network was reached for')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from transformers import PreTrainedModel\n"
        "import snp_llm.prune, snp_llm.cli\n"
        "from snp_llm.api import prune\n"
        "assert snp_llm.prune is prune\n"  # and not the module of that name, which is run
        "assert not {'datasets', 'matplotlib'} & set(sys.modules)\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model('snp_opt'))]\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_trained_model_stays_close(shared, tmp_path):
    """The 7M OPT beside the checkout: 30 % off costs little, and less than dropping units at random."""
    perplexities = {}
    for ordering, allocation in (("zca", "variance"), ("random", "uniform")):
        out = tmp_path / ordering
        arguments = [str(shared / "models/opt-7m"), "--output", str(out), "--ordering", ordering]
        arguments += ["--allocation", allocation, "--num-samples", "32", "--seq-len", "128", "--no-eval"]
        arguments += ["--calibration", str(shared / "data/wikitext-2/wiki.valid.tokens")]
        assert prune_main(arguments) == 0
        from snp_llm import perplexity
        from snp_llm.data.sources import Dataset
        from snp_llm.data.windows import evaluation_windows

        tokenizer = AutoTokenizer.from_pretrained(out)
        text = Dataset(str(shared / "data/wikitext-2/wiki.test.raw"))
        windows = evaluation_windows(tokenizer, text, seq_len=128, max_windows=64)
        perplexities[ordering] = perplexity(AutoModelForCausalLM.from_pretrained(out), windows.tokens)
        perplexities["dense"] = perplexity(
            AutoModelForCausalLM.from_pretrained(shared / "models/opt-7m"), windows.tokens
        )
    assert perplexities["dense"] < perplexities["zca"] < 1.1 * perplexities["dense"]
    assert perplexities["zca"] < perplexities["random"]
