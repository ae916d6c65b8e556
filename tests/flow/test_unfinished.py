"""Runs that are interrupted: really killed, at any moment, and gone on with to the same bits."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from snp_llm.checkpoint.journal import Journal
from tests.conftest import small_model, write_table
from tests.differing import differing_model
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


@pytest.mark.exhaustive
@pytest.mark.parametrize("kills", [3, 25])
def test_killed_at_many_moments_it_comes_to_the_same_bits(kills, prune, dense, finished, tmp_path):
    found = kill_at_random(prune, tmp_path / "out", finished, dense, *SETTINGS, kills=kills, seed=kills)
    assert kills < 25 or "cut" in found  # some of them had something to go on from


@pytest.mark.exhaustive
def test_a_padded_layout(prune, dense, tmp_path):
    command = (dense, *SETTINGS, "--layout", "padded", "--hidden-device", "disk")
    assert prune(*command, "--output", tmp_path / "whole")["codes"] == [0]
    kill_at_random(prune, tmp_path / "out", tmp_path / "whole", *command, kills=4, seed=1)


@pytest.mark.parametrize(
    ("by", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.exhaustive)]
)
def test_what_is_gone_on_with_is_not_done_again(by, code, prune, dense, finished, tmp_path):
    """Of a run that stopped after its third block, the first three are taken from its journal."""
    out = tmp_path / "out"
    interrupted(prune, dense, out, after=3, by=by, code=code)
    assert done_in(out, "cut") == 3
    state = out.with_name(f".{out.name}.partial") / "journal/cut/state.json"
    spent = json.loads(json.loads(state.read_text())["content"])["seconds"]
    result = prune(dense, *SETTINGS, "--output", out, "--resume")
    assert result["codes"] == [0] and weights(out) == weights(finished)
    seconds = json.loads((out / "prune_report.json").read_text())["seconds"]
    assert spent["forward passes"] > 0 and all(seconds[phase] > before - 1e-3 for phase, before in spent.items())
    for said in ("visit/gradients: all done before", "visit/curves: all done before", "cut: goes on, 3 done before"):
        assert f"--resume: {said}\n" in result["stderr"]
    assert "block 0 self_attn.o_proj: kept" not in result["stderr"]
    assert "block 3 self_attn.o_proj: kept" in result["stderr"]


@pytest.mark.exhaustive
def test_blocks_that_are_gone_stay_gone(prune, dense, tmp_path):
    depth = ("--depth", "only", "--sparsity", 0.4)
    assert prune(dense, *SETTINGS, *depth, "--output", tmp_path / "whole")["codes"] == [0]
    interrupted(prune, dense, tmp_path / "out", *depth, after=5)
    assert prune(dense, *SETTINGS, *depth, "--output", tmp_path / "out", "--resume")["codes"] == [0]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] < 6


@pytest.mark.exhaustive
@pytest.mark.parametrize("experts", ["channels", "whole", "both"])
def test_blocks_of_experts(experts, prune, tokenizer, tmp_path):
    differing_model("qwen3_moe", num_experts=6, num_hidden_layers=6, mlp_only_layers=[]).save_pretrained(
        tmp_path / "in"
    )
    tokenizer.save_pretrained(tmp_path / "in")
    command = (tmp_path / "in", *SETTINGS, "--depth", "auto", "--experts", experts, "--sparsity", 0.6)
    assert prune(*command, "--output", tmp_path / "whole")["codes"] == [0]
    kill_at_random(prune, tmp_path / "out", tmp_path / "whole", *command, kills=4, seed=2)


@pytest.mark.exhaustive
def test_without_references_there_is_one_stream_to_go_on_with(prune, dense, tmp_path):
    paper = ("--reference", "self", "--ordering", "zca", "--allocation", "variance", "--metric", "error")
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
    assert prune(dense, *SETTINGS, "--allocation", "uniform", "--refine", "none", "--output", out, "--overwrite")[
        "codes"
    ] == [0]
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


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A folder on a disk of its own, of so many kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]).returncode:
        pytest.skip("a small disk needs the right to mount one")

    def size(kilobytes: int) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", folder], check=True)
        return folder

    yield size
    subprocess.run(["umount", folder], check=True)


def check_full(result: dict[str, Any]) -> None:
    """One line that says so."""
    assert result["codes"] == [2] and "Traceback" not in result["stderr"], result["stderr"]
    assert "No space left" in result["stderr"] or "cannot be written" in result["stderr"]


@pytest.mark.parametrize("growth", [2, pytest.param(1.25, marks=pytest.mark.exhaustive)])
def test_a_disk_that_fills_up(growth, prune, dense, finished, disk):
    """Every size of disk from nothing to enough: an error that says so, then on with a larger one, to the same bits."""
    size, failed, done = 64, [], 0
    out = disk(size) / "out"
    while (result := prune(dense, *SETTINGS, "--output", out, "--resume"))["codes"] != [0]:
        check_full(result)
        states = [json.loads(file.read_text()) for file in out.parent.glob(".out.partial/journal/**/state.json")]
        blocks = sum(json.loads(state["content"])["done"] for state in states)
        assert blocks >= done  # nothing that was done is lost
        failed.append("cut" if done >= 12 else "visit" if blocks else "beginning")
        done, size = blocks, int(size * growth)
        disk(size)
    assert len(failed) >= (8 if growth < 2 else 2) and "visit" in failed and ("cut" in failed or growth == 2), failed
    assert weights(out) == weights(finished)


@pytest.mark.exhaustive
def test_a_disk_that_fills_up_while_the_model_is_saved(prune, dense, finished, disk):
    out = disk(20_000) / "out"
    assert prune(dense, *SETTINGS, "--output", out, die_at=("saving", 0))["codes"] == [-9]
    for room in (0, 4, 16, 64, 128, 256, 512, 768):  # kB
        used = sum(file.stat().st_blocks // 2 for file in out.parent.rglob("*"))
        disk(used + room + 8)
        check_full(prune(dense, *SETTINGS, "--output", out, "--resume"))
        assert not out.exists() and done_in(out, "cut") == 6
    disk(20_000)
    result = prune(dense, *SETTINGS, "--output", out, "--resume")
    assert result["codes"] == [0] and "self_attn.o_proj: kept" not in result["stderr"]
    assert weights(out) == weights(finished)


# --- signals in every phase ------------------------------------------------------------------------------------------


def done_in(out: Path, phase: str) -> int:
    """Blocks that an unfinished run has done in a phase."""
    file = out.with_name(f".{out.name}.partial") / "journal" / phase / "state.json"
    return int(json.loads(json.loads(file.read_text())["content"])["done"]) if file.exists() else 0


@pytest.mark.parametrize("phase", ["gradients", pytest.param("curves", marks=pytest.mark.exhaustive)])
def test_an_interrupt_in_the_visit_keeps_what_was_done(phase, prune, dense, finished, tmp_path):
    out = tmp_path / "out"
    result = prune(dense, *SETTINGS, "--output", out, die_at=(phase, 2), die_by=signal.SIGINT)
    assert result["codes"] == [130] and "interrupted; no output was written" in result["stderr"]
    assert done_in(out, f"visit/{phase}") == 2
    result = prune(dense, *SETTINGS, "--output", out, "--resume")
    assert result["codes"] == [0] and weights(out) == weights(finished)
    first, later = (5, 3) if phase == "gradients" else (0, 2)  # gradients come from behind
    assert f"block {first}: {phase}" not in result["stderr"] and f"block {later}: {phase}" in result["stderr"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("phase", ["gradients", "curves", "cut", "saving"])
def test_terminated_ten_times_in_every_phase(phase, prune, dense, finished, tmp_path):
    """At a random moment after a random block, however long the handling of the signal takes from there."""
    generator, out, stopped = random.Random(phase), tmp_path / "out", 0
    for _ in range(40):
        block = 0 if phase == "saving" else generator.randrange(1, 6)
        how = {"die_at": (phase, block), "die_by": signal.SIGTERM, "die_later": generator.uniform(0.001, 0.1)}
        result = prune(dense, *SETTINGS, "--output", out, **how)
        assert result["codes"] in ([143], [0]) and "Traceback" not in result["stderr"], result["stderr"]
        stopped += result["codes"] == [143]
        if not out.exists():
            assert result["stderr"].splitlines()[-1].startswith("snp-llm: error: interrupted")
            assert prune(dense, *SETTINGS, "--output", out, "--resume")["codes"] == [0]
        assert weights(out) == weights(finished) and not list(tmp_path.glob(".out*"))
        shutil.rmtree(out)
        if stopped == 10:
            break
    assert stopped == 10


# --- damaged journals ------------------------------------------------------------------------------------------------


def damages(file: Path, others: Sequence[Path], foreign: Path, generator: random.Random) -> Iterator[str]:
    """Every way of damaging a file, each done when it is its turn; what it is.

    Args:
        file: whole when this starts and before every turn.
        others: files of its kind.
        foreign: of its name, of another run.
    """
    content = file.read_bytes()
    for at in sorted({0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(4))}):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :])
        yield f"a flipped bit at {at} of {len(content)}"
    for length in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        yield f"{length} of {len(content)} bytes"
    file.write_bytes(content + b"\0")
    yield "a byte more"
    file.unlink()
    yield "gone"
    for other in others:
        theirs = other.read_bytes()
        file.write_bytes(theirs)
        other.write_bytes(content)
        yield f"exchanged with {other.name}"
        other.write_bytes(theirs)
        if generator.random() < 0.5:
            break
    if foreign.exists():
        shutil.copyfile(foreign, file)
        yield "another run's"


@pytest.fixture(scope="module")
def killed(prune, dense, tmp_path_factory) -> tuple[Path, Path]:
    """Temporary folders of two runs that were killed after three blocks; they differ in their seed."""
    folder = tmp_path_factory.mktemp("killed")
    return (
        interrupted(prune, dense, folder / "one", after=3),
        interrupted(prune, dense, folder / "two", "--seed", 1, after=3),
    )


def files_of(partial: Path) -> list[Path]:
    return sorted(file.relative_to(partial) for file in partial.glob("journal/**/*") if file.is_file())


def goes_on(prune: Runner, dense: Path, out: Path, finished: Path, what: str) -> bool:
    """Whether a run whose journal was damaged goes on: then it comes to the same bits, else it says what changed."""
    result = prune(dense, *SETTINGS, "--output", out, "--resume")
    assert "Traceback" not in result["stderr"], what
    if result["codes"] == [0]:
        assert weights(out) == weights(finished), what
        shutil.rmtree(out)
        return True
    assert result["codes"] == [2], what
    assert "setting seed 1, this one has 0; expected the same" in result["stderr"], (what, result["stderr"])
    return False


def damaged_one_by_one(killed: tuple[Path, Path], out: Path, generator: random.Random) -> Iterator[str]:
    """Puts an unfinished run's temporary folder in its place, with one file damaged, for every file and every way."""
    (one, two), partial = killed, out.with_name(f".{out.name}.partial")
    for name in files_of(one):
        kind = re.sub(r"\d+", "*", name.name)
        others = [f for f in sorted((one / name).parent.glob(kind)) if f.name != name.name]
        if name.name == "state.json":
            others = [one / "journal" / phase / name.name for phase in ("visit/gradients", "visit/curves", "cut")]
            others.remove(one / name)
        shutil.copytree(one, partial)
        ways = damages(partial / name, [partial / o.relative_to(one) for o in others], two / name, generator)
        for way in ways:
            yield f"{name}: {way}"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(one, partial)
        shutil.rmtree(partial)


@pytest.mark.exhaustive
def test_a_journal_with_any_damage_gives_the_same_bits(prune, dense, finished, killed, tmp_path):
    """Every file of it, damaged in every way: what depends on it is done anew, or refused as another run's."""
    assert len(files_of(killed[0])) > 20
    tried, refused = 0, []
    for what in damaged_one_by_one(killed, tmp_path / "out", random.Random(0)):
        tried += 1
        if not goes_on(prune, dense, tmp_path / "out", finished, what):
            refused.append(what)
    assert tried > 250 and refused == ["journal/identity.json: another run's"]


def test_some_damage_to_a_journal(prune, dense, finished, killed, tmp_path):
    """One way for some files; the rest is left to a longer test."""
    names = ("visit/curves/state.json", "cut/00001.safetensors")
    for number, name in enumerate(names):
        partial = shutil.copytree(killed[0], tmp_path / ".out.partial")
        ways = damages(partial / "journal" / name, [], killed[1] / "journal" / name, random.Random(number))
        what = next(islice(ways, 4 * number, None))
        assert goes_on(prune, dense, tmp_path / "out", finished, f"{name} {what}")


@pytest.mark.exhaustive
def test_parts_of_a_journal_that_are_another_runs(prune, dense, finished, killed, tmp_path):
    """Whole phases, which fit together in themselves."""
    (one, two), partial = killed, tmp_path / ".out.partial"
    for phase in ("visit", "visit/gradients", "visit/curves", "cut"):
        for way in ("another run's", "gone", "files of both"):
            shutil.copytree(one, partial)
            if way != "files of both":
                shutil.rmtree(partial / "journal" / phase)
            if way != "gone":
                shutil.copytree(two / "journal" / phase, partial / "journal" / phase, dirs_exist_ok=True)
            assert goes_on(prune, dense, tmp_path / "out", finished, f"{phase} {way}")


# --- what the run reads, changed between kill and --resume -----------------------------------------------------------


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def rename_token(file: Path) -> None:
    rules = json.loads(file.read_text())
    last = max(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    rules["model"]["vocab"] = {"zzzz" if t == last else t: id for t, id in rules["model"]["vocab"].items()}
    rules["model"]["merges"] = [pair for pair in rules["model"]["merges"] if "".join(pair) != last]
    file.write_text(json.dumps(rules))


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_what_changed_since_is_named(prune, dense, finished, tmp_path):
    model, out = shutil.copytree(dense, tmp_path / "model"), tmp_path / "out"
    unfinished = interrupted(prune, model, out, after=3)
    before = contents(unfinished)
    changes = [
        ("config.json", "config rms_norm_eps", partial(edit_json, rms_norm_eps=1e-3)),
        ("config.json", "config rope_parameters", partial(edit_json, rope_parameters={"rope_theta": 5e5})),
        ("generation_config.json", "generation config max_length", partial(edit_json, max_length=40)),
        ("tokenizer.json", "tokenizer", rename_token),
        *((file.name, "weights", partial(flip, at=-1)) for file in sorted(model.glob("*.safetensors"))[-1:]),
    ]
    for name, named, change in changes:
        content = (model / name).read_bytes()
        change(model / name)
        result = prune(model, *SETTINGS, "--output", out, "--resume")
        assert result["codes"] == [2] and f"had {named} " in result["stderr"], (name, result["stderr"])
        assert contents(unfinished) == before and not out.exists()
        (model / name).write_bytes(content)
    assert prune(model, *SETTINGS, "--output", out, "--resume")["codes"] == [0]
    assert weights(out) == weights(finished)


@pytest.mark.exhaustive
def test_a_latency_table_counts_once_widths_were_chosen_from_it(prune, dense, tmp_path):
    table = tmp_path / "table.json"
    settings = (*SETTINGS[: SETTINGS.index("--sparsity")], "--round-to", 4, "--save-every", 0)
    settings = (*settings, "--target-latency", "0.7x", "--latency-table", table)
    for share in (0.8, 0.3):
        write_table(table, dense, share)
        assert prune(dense, *settings, "--output", tmp_path / f"{share}")["codes"] == [0]
    assert weights(tmp_path / "0.8") != weights(tmp_path / "0.3")
    for phase, decided in (("curves", False), ("cut", True)):
        out = tmp_path / phase
        write_table(table, dense, 0.8)
        assert prune(dense, *settings, "--output", out, die_at=(phase, 2))["codes"] == [-9]
        write_table(table, dense, 0.3)
        result = prune(dense, *settings, "--output", out, "--resume")
        if decided:
            assert result["codes"] == [2] and f"latency table {table} is not the one" in result["stderr"]
            write_table(table, dense, 0.8)
            result = prune(dense, *settings, "--output", out, "--resume")
        assert result["codes"] == [0], result["stderr"]
        assert weights(out) == weights(tmp_path / ("0.8" if decided else "0.3"))


def test_finished_weights_load(finished):
    assert sum(len(load_file(file)) for file in finished.glob("*.safetensors")) > 40
