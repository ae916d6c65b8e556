"""Several processes that prune one model together, over gloo: the same model as one process, and no hangs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snp_llm import checkpoint
from snp_llm.runtime import ranks
from tests.flow.test_unfinished import dense, finished, prune  # noqa: F401 - fixtures
from tests.images import saved_classifier

pytestmark = pytest.mark.slow
# The first 32 windows have references: of four ranks the last has none of them.
SETTINGS = ("--num-samples", 44, "--seq-len", 32, "--batch-size", 4, "--calibration", "bundled", "--no-eval")
SETTINGS = (*SETTINGS, "--sparsity", 0.4, "--round-to", 4, "--device", "cpu")


def kept(folder: Path) -> list[list[int]]:
    return [site["kept"] for site in json.loads((folder / "prune_report.json").read_text())["sites"]]


def assert_same_model(one: Path, other: Path) -> None:
    """To float32's rounding; a trained model's weights would differ by more, as docs/many_gpus.md says."""
    assert kept(one) == kept(other)
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert float((a[name] - b[name]).abs().max()) <= 1e-5 * float(a[name].abs().max()), name


PAPER = (
    "--refine",
    "none",
    "--allocation",
    "variance",
    "--metric",
    "error",
    "--reference",
    "self",
    "--dtype",
    "float64",
)


# Steps of Adam take the sign of a gradient that rounding may have made: they are compared where that is small.
REFINED = ("--refine", 3, "--dtype", "float64")


@pytest.fixture(scope="module")
def whole(prune, dense, tmp_path_factory):  # noqa: F811
    """What one process makes."""
    folder = tmp_path_factory.mktemp("whole") / "whole"
    assert prune(dense, *SETTINGS, "--refine", "none", "--output", folder)["codes"] == [0]
    return folder


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_two_and_four_ranks_prune_as_one_does(count, prune, dense, whole, tmp_path):  # noqa: F811
    result = prune(dense, *SETTINGS, "--refine", "none", "--output", tmp_path / "out", ranks=count)
    assert result["codes"] == [0] * count, result["stderr"]
    assert_same_model(whole, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("choices", [PAPER, REFINED])
def test_whatever_the_method(choices, prune, dense, tmp_path):  # noqa: F811
    for count in (1, 2, 4):
        result = prune(dense, *SETTINGS, *choices, "--output", tmp_path / f"{count}", ranks=count)
        assert result["codes"] == [0] * count, result["stderr"]
    assert_same_model(tmp_path / "1", tmp_path / "2")
    assert_same_model(tmp_path / "1", tmp_path / "4")


@pytest.mark.exhaustive
def test_of_a_trained_model_as_much_is_the_same_as_the_docs_promise(prune, shared, tmp_path):  # noqa: F811
    model = shared / "models/opt-7m"
    if not model.is_dir():
        pytest.skip("the trained OPT is not there")
    settings = (
        "--refine",
        "none",
        "--calibration",
        "bundled",
        "--num-samples",
        9,
        "--seq-len",
        128,
        "--no-eval",
        "--device",
        "cpu",
    )
    for count in (1, 2):  # of nine windows one rank has four, the other five: no batch is the same
        result = prune(model, *settings, "--output", tmp_path / f"{count}", ranks=count)
        assert result["codes"] == [0] * count, result["stderr"]
    one, two = (json.loads((tmp_path / f"{count}/prune_report.json").read_text())["sites"] for count in (1, 2))
    for name in ("site", "kept", "dampening"):
        assert [site[name] for site in one] == [site[name] for site in two]
    tokens = torch.arange(256).reshape(2, 128) * 31
    with torch.no_grad():
        logits = [checkpoint.load(str(tmp_path / f"{count}"), "auto")[0](tokens).logits for count in (1, 2)]
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-4 * float(logits[0].abs().max())


@pytest.mark.parametrize("deaths", [[(1, 2)], pytest.param([(1, 2), (0, 4)], marks=pytest.mark.exhaustive)])
def test_a_rank_that_dies_ends_the_run_on_all_and_others_can_go_on(
    deaths,
    prune,  # noqa: F811
    dense,  # noqa: F811
    whole,
    tmp_path,
):
    out = tmp_path / "out"
    state = tmp_path / ".out.partial/journal/cut/state.json"
    command = (dense, *SETTINGS, "--refine", "none", "--save-every", 0, "--output", out)
    for doomed, blocks in deaths:
        result = prune(*command, "--resume", ranks=3, doomed=doomed, die_at=("cut", blocks))
        assert result["codes"][doomed] == -9 and all(code == 2 for code in result["codes"][:doomed])
        assert all(code == 2 for code in result["codes"][doomed + 1 :]), result["stderr"]
        assert "lost another rank" in result["stderr"] and "--resume" in result["stderr"]
        assert not out.exists() and json.loads(json.loads(state.read_text())["content"])["done"] == blocks
    result = prune(*command, "--resume", ranks=2)
    assert result["codes"] == [0, 0], result["stderr"]
    assert "block 0 self_attn.o_proj: kept" not in result["stderr"]
    assert_same_model(whole, out)


def test_ranks_have_the_same_statistics_of_batch_norms(prune, tmp_path):  # noqa: F811
    model = saved_classifier("vgg_bn", tmp_path / "dense")
    settings = ("--calibration", "noise", "--num-samples", 16, "--no-eval", "--sparsity", 0.4, "--round-to", 4)
    for count in (1, 2):
        out = tmp_path / f"{count}"
        result = prune(model, *settings, "--device", "cpu", "--dtype", "float64", "--output", out, ranks=count)
        assert result["codes"] == [0] * count, result["stderr"]
    assert_same_model(tmp_path / "1", tmp_path / "2")


def test_an_error_on_one_rank_is_everybodys(prune, dense, tmp_path):  # noqa: F811
    result = prune(dense, *SETTINGS, "--output", tmp_path / "out", "--num-samples", 1, ranks=2)
    assert result["codes"] == [2, 2] and "a window or more for each of 2 ranks" in result["stderr"]
    (tmp_path / "out").mkdir()
    result = prune(dense, *SETTINGS, "--output", tmp_path / "out", ranks=2)
    assert result["codes"] == [2, 2] and "out: exists" in result["stderr"]


@pytest.mark.exhaustive
def test_with_the_launcher_that_users_have(dense, tmp_path):  # noqa: F811
    """The command for CPUs, reloading in a fresh process and perplexity included; each rank writes to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--redirects", "3", "--log-dir", str(tmp_path / "logs"), "-m", "snp_llm.prune", str(dense)]
    command += [*map(str, SETTINGS), "--eval", "--eval-dataset", "bundled", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = {file.parent.name: file.read_text() for file in tmp_path.glob("logs/*/*/*/stdout.log")}
    assert said.keys() == {"0", "1"} and not said["1"]
    assert said["0"].count("reloaded in a fresh process: logits differ by 0.0e+00") == 1
    assert (tmp_path / "out/config.json").exists()


def test_shares_are_whole_and_without_ranks_nothing_is_sent():
    assert ranks.share(10) == range(10)
    total = torch.ones(3)
    ranks.add_up([total])
    assert torch.equal(total, torch.ones(3)) and ranks.from_rank(0, lambda: 5) == 5 and ranks.from_all(5) == [5]
