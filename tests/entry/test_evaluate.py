"""`snp-llm eval`: several models, sliding windows, tasks of lm-evaluation-harness where that is installed."""

import json
import math
import shutil
from importlib.util import find_spec

import pytest
import torch
from huggingface_hub import ModelCard

from snp_llm import SnpError
from snp_llm.cli.parse import evaluate_main
from snp_llm.evaluate import tasks
from snp_llm.evaluate.perplexity import Sliding, perplexity, strided_perplexity
from tests.conftest import save_model, small_model, small_opt
from tests.entry.test_cli import refuse

DATASET = ["--dataset", "bundled", "--seq-len", "32", "--max-windows", "6"]


@pytest.mark.parametrize(
    ("length", "seq_len", "stride"), [(50, 16, 4), (50, 16, 16), (47, 16, 5), (16, 16, 3), (9, 16, 2)]
)
def test_sliding_windows_are_what_each_token_gets_by_itself(length, seq_len, stride):
    """The oracle runs one forward pass for every token, on what its window holds before it."""
    model = small_opt(torch.float64)
    tokens = torch.randint(2048, (length,), generator=torch.Generator().manual_seed(2))
    total, count = 0.0, 0
    for at in range(1, length):
        window = next(w for w in range(length) if w * stride + seq_len > at)
        before = tokens[window * stride : at]
        if len(before):
            total -= model(before[None]).logits[0, -1].float().log_softmax(0)[tokens[at]].item()
            count += 1
    for batch_size in (1, 3):
        value, counted = strided_perplexity(model, tokens, Sliding(seq_len, stride), batch_size=batch_size)
        assert counted == count and value == pytest.approx(math.exp(total / count), rel=1e-6)
    if stride < seq_len:
        assert count == length - 1


def test_sliding_by_whole_windows_is_the_usual_protocol():
    model = small_opt(torch.float64)
    windows = torch.randint(2048, (4, 16), generator=torch.Generator().manual_seed(3))
    value, counted = strided_perplexity(model, windows.flatten(), Sliding(16, 16))
    assert counted == 4 * 15 and value == pytest.approx(perplexity(model, windows), rel=1e-9)
    value, counted = strided_perplexity(model, windows.flatten(), Sliding(16, 16, max_windows=2))
    assert counted == 2 * 15 and value == pytest.approx(perplexity(model, windows[:2]), rel=1e-9)


@pytest.fixture(scope="module")
def folders(pruned_opt, tokenizer, tmp_path_factory):
    """An OPT and a Llama with one tokenizer, and what was made of the OPT."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(pruned_opt / "dense", root / "one")
    shutil.copytree(pruned_opt / "pruned", root / "out")
    save_model(small_model("llama", torch.float32), tokenizer, root / "two")
    return root


@pytest.fixture
def models(folders):
    return str(folders / "one"), str(folders / "two")


@pytest.fixture
def out(folders, tmp_path):
    """A copy of the pruned folder, to write into."""
    return str(shutil.copytree(folders / "out", tmp_path / "out"))


def test_several_models_in_one_table(models, capsys):
    assert evaluate_main([*models, *DATASET, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["models"]
    assert first["ratio"] == 1 and second["ratio"] == pytest.approx(second["perplexity"] / first["perplexity"])
    assert first["parameters"] == small_opt().num_parameters() and first["sha256"] == second["sha256"]
    assert evaluate_main([*models, *DATASET]) == 0
    printed = capsys.readouterr()
    rows = printed.out.splitlines()
    assert rows[0].split() == ["perplexity", "ratio", "parameters", "size,", "MB"]
    assert rows[1].startswith(models[0]) and f"{second['perplexity']:,.4f}" in rows[2]
    assert rows[3] == "perplexity on bundled (test), 6 windows of 32 tokens, 192 tokens"
    assert f"{models[1]}: perplexity" in printed.err


def test_the_protocol_of_sliding_windows_is_printed(models, capsys):
    assert evaluate_main([models[0], *DATASET, "--stride", "8"]) == 0
    text = capsys.readouterr().out
    # 31 tokens of the first window, 8 of each of the five others.
    assert "windows of 32 that begin every 8, 71 tokens counted once each, given 24 to 31 before them" in text


def test_perplexities_of_different_tokens_are_not_compared(models, tokenizer, tmp_path, capsys):
    shutil.copytree(models[1], tmp_path / "two")
    other = tokenizer.__class__.from_pretrained(models[1])
    other.add_tokens(["the", "and"])
    other.save_pretrained(tmp_path / "two")
    assert evaluate_main([models[0], str(tmp_path / "two"), *DATASET]) == 0
    printed = capsys.readouterr()
    assert "other tokens" in printed.out and "do not compare" in printed.err


def test_results_are_recorded_in_the_report(models, out, tmp_path, capsys):
    for options in ([], ["--stride", "8"], ["--stride", "8"]):
        assert evaluate_main([models[0], out, *DATASET, *options, "--save"]) == 0
    report = json.loads((tmp_path / "out/prune_report.json").read_text())
    assert len(report["perplexities"]) == 2 and "begin every 8" in report["perplexities"][1]["text"]
    assert report["pruned"]["perplexity"] is None and len(report["sites"]) == 6
    card = ModelCard.load(tmp_path / "out/README.md")
    assert [r.metric_value for r in card.data.eval_results] == [e["perplexity"] for e in report["perplexities"]]
    assert card.text.count("begin every 8") == 1
    capsys.readouterr()
    refuse(capsys, [models[0], *DATASET, "--save"], "--save: expected an output folder", evaluate_main)


def test_eval_refuses(models, capsys):
    refuse(capsys, [models[0], "--stride", "0"], "--stride: expected an integer from 1 to", evaluate_main)
    refuse(capsys, [models[0], *DATASET, "--stride", "33"], "--stride: expected at most the window's 32", evaluate_main)
    refuse(capsys, [models[0], "--limit", "3"], "--limit: expected together with --tasks", evaluate_main)
    refuse(capsys, [models[0], "--no-perplexity"], "nothing to measure", evaluate_main)
    refuse(capsys, [models[0], "--tasks", " , "], "--tasks: expected names", evaluate_main)
    refuse(capsys, [models[0], "./nowhere"], "no such folder", evaluate_main)


def test_a_harness_that_is_missing_is_named(models, capsys, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda _name: None)
    refuse(capsys, [models[0], "--tasks", "arc_easy"], r"pip install 'snp-llm\[eval\]'", evaluate_main)


def test_metrics_are_read_off_what_the_harness_returns():
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": "N/A",
        "sample_len": 4,
    }
    found = {"n-samples": {"x": {"original": 9, "effective": 4}}, "n-shot": {"x": 2}}
    expected = {"acc": 0.5, "acc_stderr": 0.1, "exact_match (strict-match)": 0.25, "samples": 4, "num_fewshot": 2}
    assert tasks._metrics("x", values, found) == expected


TASK = """task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture
def harness(tmp_path):
    """A folder with a task and its data, all local."""
    if find_spec("lm_eval") is None:
        pytest.skip("lm-evaluation-harness is not installed: pip install 'snp-llm[eval]'")
    documents = [
        {"question": f"The value of {name} is", "choices": [" one", " another", " a list"], "label": at % 3}
        for at, name in enumerate(("x", "the result", "this", "that", "a class", "a name"))
    ]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "capitals.jsonl").write_text("\n".join(json.dumps(d) for d in documents))
    (folder / "capitals.yaml").write_text(TASK.format(file=folder / "capitals.jsonl"))
    return folder, documents


def test_a_local_task(harness, models, out, tokenizer, tmp_path, capsys):
    """Accuracy is that of a choice by log-likelihood, computed here by hand."""
    folder, documents = harness
    options = ["--tasks", "capitals", "--include-path", str(folder), "--save", "--json", *DATASET]
    assert evaluate_main([models[0], out, *options]) == 0
    dense, pruned = json.loads(capsys.readouterr().out)["models"]
    model, right = small_opt(), 0
    for document in documents:
        scores = []
        for choice in document["choices"]:
            start = len(tokenizer(document["question"])["input_ids"])
            ids = torch.tensor(tokenizer(document["question"] + choice)["input_ids"])
            logs = model(ids[None]).logits[0].log_softmax(1)
            scores.append(sum(logs[t - 1, ids[t]].item() for t in range(start, len(ids))))
        right += scores.index(max(scores)) == document["label"]
    assert dense["tasks"]["capitals"]["acc"] == pytest.approx(right / len(documents))
    assert dense["tasks"]["capitals"]["samples"] == 6 and dense["perplexity"] > 0
    report = json.loads((tmp_path / "out/prune_report.json").read_text())
    assert report["tasks"]["capitals"] == pruned["tasks"]["capitals"] and "lm_eval" in report["versions"]
    assert report["perplexities"][0]["perplexity"] == pruned["perplexity"]

    options = ["--tasks", "capitals", "--include-path", str(folder), "--limit", "2", "--no-perplexity"]
    assert evaluate_main([models[0], *options]) == 0
    printed = capsys.readouterr().out
    assert "capitals acc" in printed and "±" in printed and "perplexity" not in printed


def test_an_unknown_task_is_refused(harness, monkeypatch):
    class Manager:
        all_tasks = ("arc_easy", "capitals")

        def __init__(self, **_options):
            pass

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)  # reading all of the harness's takes half a minute
    with pytest.raises(SnpError, match="no task 'arc_esy' of 2. Did you mean 'arc_easy'?"):
        tasks.find_tasks(tasks.Tasks(["arc_esy"]))
