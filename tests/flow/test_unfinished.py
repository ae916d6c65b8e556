"""Runs that are interrupted: really killed, at any moment, and gone on with to the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from snp_llm.checkpoint.journal import Journal
from tests.conftest import small_model
from tests.flow.forked import Runner, runner

pytestmark = pytest.mark.slow
SETTINGS = ("--num-samples", 8, "--seq-len", 32, "--batch-size", 4, "--calibration", "bundled", "--no-eval")
SETTINGS = (*SETTINGS, "--sparsity", 0.4, "--round-to", 4, "--save-every", 0)


@pytest.fixture(scope="module")
def prune():
    with runner() as run:
        yield run


@pytest.fixture(scope="module")
def dense(tokenizer, tmp_path_factory) -> Path:
    """Six blocks with grouped heads, in several shards."""
    folder = tmp_path_factory.mktemp("dense") / "small-llama"
    model = small_model("llama", torch.float32, num_hidden_layers=6)
    model.save_pretrained(folder, max_shard_size="200KB")
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def finished(prune, dense, tmp_path_factory) -> Path:
    """What a run that nobody interrupts gives."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    assert prune(dense, *SETTINGS, "--output", folder)["codes"] == [0]
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix == ".safetensors"}


def kill_at_random(prune: Runner, out: Path, expected: Path, *command: object, kills: int, seed: int) -> set[str]:
    """Kills so many runs, each of which goes on with the one before it until one gets through; the phases it saw."""
    generator, found = random.Random(seed), set()
    whole = prune(*command, "--output", out.with_name("timed"))["seconds"]
    while kills:
        kills -= 1
        result = prune(*command, "--output", out, "--resume", kill_after=generator.uniform(0.1, 1.0) * whole)
        found |= {state.parent.name for state in out.parent.glob(f".{out.name}.partial/journal/*/state.json")}
        assert result["codes"] in ([-9], [0]), result["stderr"]
        if out.exists():
            assert weights(out) == weights(expected)
            shutil.rmtree(out)
    assert prune(*command, "--output", out, "--resume")["codes"] == [0]
    assert weights(out) == weights(expected)
    kept = [
        [site["kept"] for site in json.loads((f / "prune_report.json").read_text())["sites"]] for f in (out, expected)
    ]
    assert kept[0] == kept[1]
    assert not list(out.parent.glob(f".{out.name}*"))
    return found


def test_killed_at_twenty_moments_it_comes_to_the_same_bits(prune, dense, finished, tmp_path):
    found = kill_at_random(prune, tmp_path / "out", finished, dense, *SETTINGS, kills=20, seed=0)
    assert "cut" in found  # some of them had something to go on from


@pytest.mark.exhaustive
def test_a_padded_layout(prune, dense, tmp_path):
    command = (dense, *SETTINGS, "--layout", "padded", "--hidden-device", "disk")
    assert prune(*command, "--output", tmp_path / "whole")["codes"] == [0]
    kill_at_random(prune, tmp_path / "out", tmp_path / "whole", *command, kills=4, seed=1)


@pytest.mark.parametrize(("by", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_what_is_gone_on_with_is_not_done_again(by, code, prune, dense, finished, tmp_path):
    """Of a run that stopped after its third block, the first three are taken from its journal."""
    out = tmp_path / "out"
    partial = interrupted(prune, dense, out, after=3, by=by, code=code)
    assert json.loads((partial / "journal/cut/state.json").read_text())["done"] == 3
    result = prune(dense, *SETTINGS, "--output", out, "--resume")
    assert result["codes"] == [0] and weights(out) == weights(finished)
    assert "block 0 self_attn.o_proj: kept" not in result["stderr"]
    assert "block 3 self_attn.o_proj: kept" in result["stderr"]


def test_without_targets_there_is_one_stream_to_go_on_with(prune, dense, tmp_path):
    paper = ("--target", "self", "--ordering", "zca", "--allocation", "variance", "--metric", "error")
    assert prune(dense, *SETTINGS, *paper, "--output", tmp_path / "whole")["codes"] == [0]
    interrupted(prune, dense, tmp_path / "out", *paper, after=3)
    assert prune(dense, *SETTINGS, *paper, "--output", tmp_path / "out", "--resume")["codes"] == [0]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def interrupted(
    prune: Runner, dense: Path, out: Path, *more: object, after: int, by: int = signal.SIGKILL, code: int = -9
) -> Path:
    """The temporary folder of a run that was killed once so many blocks were cut."""
    partial = out.with_name(f".{out.name}.partial")
    result = prune(dense, *SETTINGS, *more, "--output", out, die_at=("cut", after), die_by=by)
    assert result["codes"] == [code]
    return partial


def test_an_unfinished_run_is_neither_lost_nor_mixed_with_another(prune, dense, tmp_path):
    out = tmp_path / "out"
    partial = interrupted(prune, dense, out, after=2)
    for changed, message in (
        ((), "an unfinished run is there"),
        (("--resume", "--sparsity", 0.3), "setting sparsity 0.4, this one has 0.3"),
        (("--resume", "--seed", 1), "setting seed 0, this one has 1"),
        (("--resume", "--calibration", "random"), "calibration text"),
    ):
        result = prune(dense, *SETTINGS, *changed, "--output", out)
        assert result["codes"] == [2] and message in result["stderr"] and "Traceback" not in result["stderr"]
        assert (partial / "journal/cut/state.json").exists() and not out.exists()
    other = dense.with_name("other")
    shutil.copytree(dense, other)
    file = sorted(other.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    file.write_bytes(content)
    result = prune(other, *SETTINGS, "--output", out, "--resume")
    assert result["codes"] == [2] and "weights" in result["stderr"]
    assert prune(dense, *SETTINGS, "--sparsity", 0.3, "--output", out, "--overwrite")["codes"] == [0]
    assert not partial.exists()


def test_a_state_of_other_windows_is_not_gone_on_from(tmp_path):
    """With more ranks than a visit took windows it takes more of them."""
    journal, state = Journal(tmp_path, 0), torch.randn(3, 5)
    journal.save_state(2, {"hidden": state}, range(3))
    done, found = Journal(tmp_path).last_state(range(1, 3), 3)
    assert done == 2 and torch.equal(found["hidden"], state[1:])
    assert Journal(tmp_path).last_state(range(3, 4), 4) == (0, {})
    journal.save_state(6, {"hidden": state}, range(3), last=True)
    assert Journal(tmp_path).last_state(range(3, 4), 4) == (6, {})


def test_two_runs_do_not_write_the_same_folder(prune, dense, tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / ".out.partial.lock"):
        result = prune(dense, *SETTINGS, "--output", tmp_path / "out")
    assert result["codes"] == [2] and "another run is writing" in result["stderr"]


def test_a_disk_that_fills_up(prune, dense, finished, tmp_path):
    """Every size of disk from nothing to enough: an error that says so, then on with a larger one, to the same bits."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        size, failures = 64, 0
        while (result := prune(dense, *SETTINGS, "--output", disk / "out", "--resume"))["codes"] != [0]:
            assert result["codes"] == [2] and "Traceback" not in result["stderr"], result["stderr"]
            assert "No space left" in result["stderr"] or "cannot be written" in result["stderr"]
            failures, size = failures + 1, size * 2
            subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
        assert failures >= 2 and weights(disk / "out") == weights(finished)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_finished_weights_load(finished):
    assert sum(len(load_file(file)) for file in finished.glob("*.safetensors")) > 40
