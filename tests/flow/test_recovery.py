"""Recovery: the divergence is what it says, no choice of memory changes the result, nothing ever gets worse."""

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import ResNetConfig, ResNetForImageClassification

from snp_llm import SnpError
from snp_llm.checkpoint.journal import Journal
from snp_llm.cli.parse import prune_main, recover_main
from snp_llm.cli.recover import material_recipe
from snp_llm.models.task import TEXT
from snp_llm.recipe.file import load_recipe
from snp_llm.recipe.recovery import RecoverRecipe
from snp_llm.recovery.divergence import all_of, divergence, largest_of
from snp_llm.recovery.recover import Tools, check_dense, recover
from snp_llm.recovery.schedule import Budget, Order, rate
from snp_llm.recovery.teacher import Stored, live
from snp_llm.recovery.train import CHECKS, Material, Training, train
from snp_llm.recovery.trained import train_blocks, train_lora, with_checkpoints
from snp_llm.report.page import make_page
from snp_llm.report.read import read_run
from snp_llm.report.recovery import of_another, with_recovery
from tests.conftest import small_opt
from tests.images import image_folder, small_classifier, small_processor
from tests.quick import without_page, without_reloading

CPU = torch.device("cpu")


def windows(count=12, length=16):
    return torch.randint(2048, (count, length), generator=torch.Generator().manual_seed(0))


def changed(model, much=0.1):
    """A model whose blocks are not what they were."""
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if "layers" in name:
            parameter.data += much * torch.randn(parameter.shape, generator=generator) * parameter.abs().mean()
    return found


def training(model, dense, journal=None, make=train_blocks, **settings):
    recipe = RecoverRecipe(folder="-", **{"batch_size": 4, "learning_rate": 1e-3, "warmup": 0.1, **settings})
    material = Material(windows(), 4, TEXT.losses, "token")
    return Training(
        make(model), live(dense, hidden=recipe.hidden_weight > 0), material, recipe, CPU, journal or Journal()
    )


def test_the_divergence_is_that_of_the_softmaxes():
    logits, other = (3 * torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    expected = functional.kl_div(
        other.double().log_softmax(-1), logits.double().log_softmax(-1), log_target=True, reduction="sum"
    )
    assert torch.isclose(divergence(all_of(logits), other).double(), expected, rtol=1e-5)
    assert torch.isclose(divergence(largest_of(logits, 10), other).double(), expected, rtol=1e-5)
    fewer = [float(divergence(largest_of(logits, k), other)) for k in (1, 3, 6, 10)]
    assert fewer == sorted(fewer)  # finer partitions show more
    assert abs(float(divergence(largest_of(logits, 3), logits))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_in_pieces_has_the_gradient_of_the_whole(dtype, monkeypatch):
    monkeypatch.setattr("snp_llm.recovery.divergence.AT_A_TIME", 24)  # two positions, and one that is left over
    logits, other = (torch.randn(5, 7, 11, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    exact = other.double().requires_grad_()
    wanted = functional.kl_div(exact.log_softmax(-1), logits.double().log_softmax(-1), log_target=True, reduction="sum")
    (wanted / 35).backward()
    (divergence(all_of(logits), other.requires_grad_()) / 35).backward()
    assert torch.allclose(other.grad.double(), exact.grad, rtol=0, atol=1e-7 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("other", [{"micro_batch": 1}, {"gradient_checkpointing": True}])
def test_what_saves_memory_changes_nothing(other):
    dense = small_opt()
    found = []
    for settings in ({"micro_batch": 4}, other):
        pruned = changed(dense)
        if settings.get("gradient_checkpointing"):
            with_checkpoints(pruned)
        one = training(pruned, dense, optimizer="sgd", hidden_weight=0.5, **settings)
        one.step([0, 3, 5, 6], 1e-3)
        found.append(one.trained.state())
    before = dict(changed(dense).named_parameters())
    name = "model.decoder.layers.1.fc1.weight"
    moved = (found[0][name] - before[name]).norm()
    assert moved > 0
    for name, one in found[0].items():
        rounding = 1e-8 * before[name].norm()
        assert (one - found[1][name]).norm() <= 1e-4 * (one - before[name]).norm() + rounding


def test_only_blocks_are_trained_and_the_dense_model_is_approached():
    dense = small_opt()
    pruned = changed(dense)
    outside = {name: tensor.clone() for name, tensor in pruned.state_dict().items() if "layers" not in name}
    progress = train(training(pruned, dense), Budget(12 * 16 * 40, None), lambda _line: None)
    assert progress.best < 0.7 * progress.before
    assert all(torch.equal(pruned.state_dict()[name], tensor) for name, tensor in outside.items())
    assert len(progress.history) == CHECKS and progress.history[-1]["learning_rate"] < 1e-4


@pytest.mark.parametrize("learning_rate", [0.0, 1e2])
def test_it_is_never_worse(learning_rate, tmp_path):
    dense = small_opt()
    pruned = changed(dense, 0.01)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    recipe = RecoverRecipe(folder="-", tokens="2k", learning_rate=learning_rate, batch_size=4)
    tools = Tools(CPU, Journal(), lambda _line: None, tmp_path, {})
    result = recover(pruned, lambda: dense, (windows(), 4), recipe, torch.float32, tools)
    assert not result.state and result.after == result.progress.before
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


class Interruption(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, optimizer):
    dense, budget = small_opt(), Budget(12 * 16 * 8, None)
    whole = changed(dense)
    train(training(whole, dense, optimizer=optimizer), budget, lambda _line: None)
    first, second = changed(dense), changed(dense)
    lines = []

    def stop(line):
        lines.append(line)
        if len(lines) == 9:
            raise Interruption

    journal = Journal(tmp_path / "journal", every=0)
    with pytest.raises(Interruption):
        train(training(first, dense, journal, optimizer=optimizer), budget, stop)
    kept = sorted(file.name for file in (tmp_path / "journal").glob("0*.safetensors"))
    assert len(kept) == 1  # what came before is gone
    resumed = []
    train(training(second, dense, Journal(tmp_path / "journal", every=0), optimizer=optimizer), budget, resumed.append)
    assert 0 < len(resumed) < CHECKS
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_lora_is_merged_into_the_weights():
    pytest.importorskip("peft")
    dense = small_opt()
    pruned = changed(dense)
    names = list(pruned.state_dict())
    one = training(pruned, dense, make=lambda model: train_lora(model, 4, 0), train="lora", learning_rate=1e-2)
    progress = train(one, Budget(12 * 16 * 20, None), lambda _line: None)
    assert progress.best < progress.before
    with torch.no_grad():
        adapted = pruned(windows()).logits
        one.trained.merge()
        merged = pruned(windows()).logits
    assert torch.allclose(adapted, merged, atol=1e-4) and list(pruned.state_dict()) == names


def test_stored_logits_are_the_largest_of_the_dense_model(tmp_path):
    dense, tokens = small_opt(), windows(70)
    stored = Stored(tmp_path / "logits", 8, {"dense": "this"})
    with torch.no_grad():
        stored.write(tokens, lambda some: dense(some).logits, lambda _line: None)
        expected = largest_of(dense(tokens[[3, 66]]).logits, 8)
    found = stored.teacher(CPU)(tokens[[3, 66]], [3, 66])
    assert torch.equal(found.largest, expected.largest)
    assert torch.allclose(found.chances, expected.chances, atol=5e-3)
    stored.write(tokens, lambda _some: pytest.fail("they are there"), lambda _line: None)
    with pytest.raises(SnpError, match=r"--dense-logits .*another dense model"):
        replace(stored, identity={"dense": "other"}).has(0)
    with pytest.raises(SnpError, match="--dense-top-k: expected fewer than the 2,048"):
        replace(stored, count=2048, folder=tmp_path).write(tokens, lambda some: dense(some).logits, lambda _line: None)


def test_batch_norms_take_statistics_while_training_alone():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()
    trained = train_blocks(model)
    pixels, running = torch.randn(4, 3, 32, 32), [n for n in trained.statistics if n.endswith("running_mean")]
    assert running
    before = trained.state()
    with torch.no_grad():
        model(pixels)
        assert all(torch.equal(before[name], trained.statistics[name]) for name in running)
        with trained.with_batch_statistics():
            model(pixels)
    assert not any(torch.equal(before[name], trained.statistics[name]) for name in running)
    trained.put_back(before)
    assert all(torch.equal(before[name], trained.statistics[name]) for name in running)
    with pytest.raises(SnpError, match="--gradient-checkpointing: expected a model of transformer blocks"):
        with_checkpoints(model)


def test_the_schedule():
    assert [round(rate(used, 1.0, 0.1), 4) for used in (0.05, 0.1, 0.55, 1.0)] == [0.5, 1.0, 0.5, 0.0]
    assert Budget(100, 60.0).used(50, 45.0) == 0.75
    order = Order(10, 4, 0)
    steps = [order.at(step) for step in range(4)]
    assert len({*steps[0], *steps[1]}) == 8 and steps[:2] != steps[2:]  # of a round every window at most once


def test_the_command(pruned_opt, tmp_path, capsys, monkeypatch):
    without_reloading(monkeypatch.setattr)
    source, out = tmp_path / "pruned", tmp_path / "out"
    shutil.copytree(pruned_opt / "pruned", source)
    command = [
        str(source),
        "--tokens",
        "4K",
        "--held-out",
        "4",
        "--learning-rate",
        "1e-3",
        "--output",
        str(out),
        "--quiet",
    ]
    assert recover_main([*command, "--eval-dataset", "bundled"]) == 0
    report = json.loads((out / "prune_report.json").read_text())
    made = report["recovery"][0]
    assert made["divergence"]["after"] < made["divergence"]["before"]
    assert [set(f) for f in made["figures"]] == [{"perplexity"}] * 3
    assert report["pruned"]["perplexity"] == made["figures"][2]["perplexity"]
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    assert "## Recovery" in card and "without training" not in card + page and "held-out" in page
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n for n in after if not torch.equal(before[n], after[n])} and before.keys() == after.keys()
    assert all("layers" in n for n in after if not torch.equal(before[n], after[n]))
    assert recover_main(command) == 2 and "exists" in capsys.readouterr().err
    assert recover_main([*command[:-3], "--no-eval", "--output", str(tmp_path / "again"), "--quiet", "--json"]) == 0


def test_figures_of_another_dense_model_are_not_those_of_the_one_that_was_pruned(pruned_opt, tmp_path, monkeypatch):
    without_reloading(monkeypatch.setattr)
    source, out = pruned_opt / "pruned", tmp_path / "out"
    command = [str(source), "--tokens", "1K", "--held-out", "4", "--dense", "tiny-opt", "--quiet", "--output", str(out)]
    assert recover_main([*command, "--eval-dataset", "bundled"]) == 0
    before, after = (json.loads((folder / "prune_report.json").read_text()) for folder in (source, out))
    assert after["dense"]["size"] == before["dense"]["size"] and after["recovery"][0]["another"]
    assert after["dense"]["perplexity"] is None and after["recovery"][0]["figures"][0]["perplexity"]
    assert "samples" not in after and after["pruned"]["perplexity"] == after["recovery"][0]["figures"][2]["perplexity"]
    card = (out / "README.md").read_text()
    assert "|  | tiny-opt | before | recovered |" in card and "towards tiny-opt on" in card
    assert (out / "report.html").exists() and make_page(read_run(out), [read_run(out)])


@pytest.mark.parametrize(
    ("parameters", "perplexity", "measured", "another"),
    [
        (100, 20.0, "text", False),
        (100, 20.1, "text", False),
        (100, 30.0, "text", True),
        (100, 30.0, "other text", False),
        (200, 20.0, "text", True),
        (200, None, None, True),
        (100, None, None, False),
    ],
)
def test_which_dense_model_is_another(parameters, perplexity, measured, another):
    report = {"dense": {"size": {"parameters": 100}, "perplexity": 20.0}, "pruned": {}, "evaluation": "text"}
    figures = None if perplexity is None else [{"perplexity": value} for value in (perplexity, 25.0, 24.0)]
    assert of_another(report, parameters, figures, measured) == another
    found = with_recovery(report, {}, figures, measured, another=another)["dense"]["perplexity"]
    assert found == (perplexity if figures and not another else 20.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images", "5"], "--images: this model reads tokens; expected --tokens"),
        (["--tokens", "many"], "--tokens: expected a number such as"),
        (["--tokens", "1K", "--images", "1K"], "expected one of them"),
        (["--dense", "/nowhere"], "/nowhere: no such folder"),
        (["--dense-logits", "x"], "expected together with --dense-top-k"),
        (["--dense-top-k", "5000", "--tokens", "1K"], "expected fewer than the 2,048 logits"),
        (["--hidden-weight", "1", "--dense-top-k", "5"], "needs the dense model in memory"),
        (["--hidden-weight", "1", "--dense", "tiny-opt"], "--hidden-weight: expected the dense model's 5 blocks"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number"),
        (["--calibration", "gone.txt"], "gone.txt: no such file"),
        (["--minutes", "0"], "--minutes: expected a number"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(pruned_opt, tmp_path, capsys, arguments, said):
    out = tmp_path / "out"
    assert recover_main([str(pruned_opt / "pruned"), "--no-eval", "--output", str(out), *arguments]) == 2
    assert said in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("place", "what"), [("pruned", "the pruned model"), ("out/logits", "the output")])
def test_logits_are_kept_apart(pruned_opt, tmp_path, capsys, place, what):
    source, out = pruned_opt / "pruned", tmp_path / "out"
    kept = source if place == "pruned" else tmp_path / place
    before = sorted(source.iterdir())
    options = ["--dense-top-k", "5", "--dense-logits", str(kept), "--output", str(out)]
    assert recover_main([str(source), *options]) == 2
    assert f"is {what}, or in it" in capsys.readouterr().err
    assert sorted(source.iterdir()) == before and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("column", [None, "text", "body"])
def test_texts_are_those_of_the_pruning_but_for_what_is_named(column):
    """Even where that is what is usual, which other texts than the pruning's may need."""
    report = {"recipe": {"model": "tiny-opt", "calibration": "own.jsonl", "text_column": "content", "bos": "never"}}
    found = material_recipe(RecoverRecipe(folder="-", calibration="other.jsonl", text_column=column), report)
    assert (found.calibration, found.bos, found.text_column) == ("other.jsonl", "never", column or "content")
    assert material_recipe(RecoverRecipe(folder="-"), {"recipe": {"model": "tiny-opt"}}).text_column == "text"


def test_zeros_of_a_padded_model_stay(pruned_opt, tmp_path, capsys):
    dense = small_opt()
    padded = changed(dense)
    first, second = (padded.get_submodule(f"model.decoder.layers.1.{name}") for name in ("fc1", "fc2"))
    first.weight[5:9], first.bias[5:9], second.weight[:, 5:9] = 0, 0, 0
    train(training(padded, dense, tokens="4k"), Budget(4 * 16 * 20, None), lambda _line: None)
    assert first.weight.count_nonzero(1)[5:9].sum() == first.bias[5:9].count_nonzero() == 0
    assert second.weight[:, 5:9].count_nonzero() == 0 < second.weight[:, :5].count_nonzero()

    folder = tmp_path / "padded"
    shutil.copytree(pruned_opt / "pruned", folder)
    report = json.loads((folder / "prune_report.json").read_text())
    report["recipe"]["layout"] = "padded"
    (folder / "prune_report.json").write_text(json.dumps(report))
    assert recover_main([str(folder), "--train", "lora", "--output", str(tmp_path / "out")]) == 2
    assert "is padded, and low-rank changes fill its zeros" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dense", "settings", "said"),
    [
        ({"vocab_size": 2050}, {"dense_top_k": 5}, "--dense: puts out 2,050 logits, the pruned model 2,048"),
        ({"num_hidden_layers": 4}, {"hidden_weight": 0.5}, "--hidden-weight: expected the dense model's 4 blocks"),
        ({"num_hidden_layers": 4}, {"dense_top_k": 5}, None),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_training(dense, settings, said):
    with nullcontext() if said is None else pytest.raises(SnpError, match=said):
        check_dense(small_opt(**dense), small_opt(), RecoverRecipe(folder="-", **settings))


def test_a_folder_that_is_none(opt_folder, tmp_path, capsys):
    assert recover_main([str(opt_folder), "--output", str(tmp_path / "out")]) == 2
    assert "expected a report of `snp-llm prune`" in capsys.readouterr().err


def test_images_in_half_precision(tmp_path, monkeypatch):
    """Computed in float32 on a CPU, rounded at the end; what the page shows of images is of the recovered model."""
    without_reloading(monkeypatch.setattr)
    without_page(monkeypatch.setattr)
    images = str(image_folder(tmp_path / "images"))
    small_classifier("basic", torch.bfloat16).save_pretrained(tmp_path / "dense")
    small_processor().save_pretrained(tmp_path / "dense")
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    texts = ["--calibration", images, "--eval-dataset", images, "--num-samples", "20", "--quiet"]
    assert prune_main([str(tmp_path / "dense"), "--output", str(pruned), *texts]) == 0
    short = ["--images", "120", "--batch-size", "10", "--held-out", "1", "--quiet"]
    assert recover_main([str(pruned), "--output", str(out), *short]) == 0
    before, after = (json.loads((folder / "prune_report.json").read_text()) for folder in (pruned, out))
    divergence = after["recovery"][0]["divergence"]
    assert divergence["after"] < divergence["before"]
    said = [{one["picture"]: one["dense"] for one in report["samples"]} for report in (before, after)]
    assert all(said[0][picture] == said[1][picture] for picture in said[0].keys() & said[1].keys())
    assert before["samples"] != after["samples"]
    assert "# Of the pruning. Afterwards: snp-llm recover" in (out / "recipe.yaml").read_text()
    load_recipe(out / "recipe.yaml")
    assert {t.dtype for t in load_file(out / "model.safetensors").values() if t.is_floating_point()} == {torch.bfloat16}


@pytest.mark.exhaustive
def test_a_killed_process_goes_on_to_the_same_bits(pruned_opt, tmp_path):
    """SIGKILL, as soon as a few steps are written down; what `--resume` then makes is what a whole run makes."""

    def start(out, *more):
        words = ["recover", str(pruned_opt / "pruned"), "--tokens", "8K", "--held-out", "4", "--learning-rate", "1e-3"]
        words += ["--output", str(out), "--no-eval", "--quiet", "--save-every", "0", *more]
        code = f"import sys; sys.argv = ['snp-llm', *{words!r}]; from snp_llm.cli.main import main; sys.exit(main())"
        return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    process = start(killed)
    states = tmp_path / ".killed.partial"
    while len({*states.glob("journal/**/*.safetensors")}) < 1 and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not killed.exists()
    assert start(killed, "--resume").wait() == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
