"""The folder of a finished model: what is replaced, and that one of the two is whole in its place at every moment."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from snp_llm.checkpoint import contents, exchange, output
from snp_llm.cli.parse import prune_main
from snp_llm.runtime.errors import DiskError, SnpError

FILES = ("model.safetensors", "config.json", "README.md", "recipe.yaml", "prune_report.json")


def finished(folder: Path, **report: object) -> Path:
    """What the exchange of a finished folder sees of one."""
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text("old")
    (folder / contents.REPORT).write_text(json.dumps({"snp_llm": "0.1", "files": list(FILES), **report}))
    return folder


def test_nothing_is_left_of_a_folder_that_was_not_finished(tmp_path):
    with (
        pytest.raises(SnpError, match="went wrong"),
        output.finished_folder(tmp_path / "out", overwrite=False) as folder,
    ):
        (folder / "half").write_text("")
        raise SnpError("went wrong")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_until_its_successor_is_finished(tmp_path):
    out = finished(tmp_path / "out")
    with pytest.raises(SnpError, match=r"out: exists.*--overwrite"):
        output.check_output(out, overwrite=False)
    with pytest.raises(SnpError), output.finished_folder(out, overwrite=True):
        raise SnpError("went wrong")
    assert (out / "model.safetensors").read_text() == "old"
    with output.finished_folder(out, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and [p.name for p in out.iterdir()] == ["new"]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(SnpError, match="exists"), output.finished_folder(tmp_path / "out", overwrite=False):
        (tmp_path / "out").mkdir()
        (tmp_path / "out/theirs").write_text("")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnpError, match="is a file"):
        output.check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(SnpError, match="cannot be written"):
        output.check_output(tmp_path / "file" / "out", overwrite=False)
    with pytest.raises(SnpError, match="cannot be written"):
        output.check_output(Path("/proc/out"), overwrite=False)


def test_files_are_as_readable_as_the_user_wants(tmp_path):
    with output.finished_folder(tmp_path / "out", overwrite=False) as folder:
        save_file({"a": torch.ones(1)}, folder / "model.safetensors")
        (folder / "other").write_text("")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_missing_parents_are_made(tmp_path):
    output.check_output(tmp_path / "a/b/out", overwrite=False)
    with output.finished_folder(tmp_path / "a/b/out", overwrite=False):
        pass
    assert (tmp_path / "a/b/out").is_dir()


# --- what is replaced ------------------------------------------------------------------------------------------------


def test_an_empty_folder_and_one_that_this_program_made_are_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    finished(tmp_path / "made")
    later = finished(tmp_path / "later")
    for name in contents.LATER:
        (later / name).write_text((later / name).read_text() if name == contents.REPORT else "")
    finished(tmp_path / "before lists", files=None)
    for folder in tmp_path.iterdir():
        output.check_output(folder, overwrite=True)
        with output.finished_folder(folder, overwrite=True) as new:
            (new / "new").write_text("")
        assert contents.files_in(folder) == ["new"]


FOREIGN = {
    "thesis.tex": "holds thesis.tex",
    "notes.txt": "holds notes.txt",
    "sub/model.safetensors": "holds sub/model.safetensors",
    ".git/config": "holds .git/config",
    "sub/": "holds the folder sub",
}


@pytest.mark.parametrize("files", [list(FILES), None])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_else_lies_in_a_finished_folder_is_not_removed(name, files, tmp_path):
    out = finished(tmp_path / "out", files=files)
    if name == "notes.txt" and files is None:
        pytest.skip("an output of before there were lists may hold a text file")
    if name.endswith("/"):
        (out / name).mkdir()
    else:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
    with pytest.raises(SnpError, match=FOREIGN[name]):
        output.check_output(out, overwrite=True)


@pytest.mark.parametrize("report", [None, "", "[]", "{}", '{"snp_llm": 1}', "{" * 100_000, "\x00"])
def test_a_folder_without_a_report_of_this_program_is_not_replaced(report, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("")
    if report is not None:
        (out / contents.REPORT).write_text(report)
    with pytest.raises(SnpError, match="prune_report.json"):
        output.check_output(out, overwrite=True)
    assert (out / "model.safetensors").exists()


def test_nothing_that_the_run_reads_is_replaced(tmp_path, monkeypatch):
    """Even where all of it was made by this program: a pruned model is an input like any other."""
    outer = finished(tmp_path / "outer", files=[*FILES, "inner/model.safetensors"])
    (outer / "inner").mkdir()
    (outer / "inner/model.safetensors").write_text("")
    link = tmp_path / "link"
    link.symlink_to(outer)
    text = outer / "README.md"
    for relation, out, what, path in (
        ("is", outer, "the input model", outer),
        ("is", link, "the input model", outer),
        ("is", outer, "the input model", link),
        ("holds", outer, "the input model", outer / "inner"),
        ("lies in", outer, "the input model", tmp_path),
        ("holds", outer, "the calibration text", text),
        ("holds", outer, "the recipe", link / "README.md"),
    ):
        with pytest.raises(SnpError, match=f"output .*: {relation} {what}"):
            output.check_output(out, overwrite=True, inputs={what: path})
    for directory, relation in ((outer, "is"), (outer / "inner", "holds")):
        monkeypatch.chdir(directory)
        with pytest.raises(SnpError, match=f"{relation} the working directory"):
            output.check_output(outer, overwrite=True)
    monkeypatch.chdir(tmp_path)
    output.check_output(outer, overwrite=True, inputs={"the input model": tmp_path / "elsewhere"})


# --- links and names -------------------------------------------------------------------------------------------------


def test_a_link_stands_for_what_it_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    new, old = tmp_path / "new", tmp_path / "old"
    new.symlink_to(tmp_path / "disk/new")
    old.symlink_to(finished(tmp_path / "disk/old"))
    for link in (new, old):
        with output.finished_folder(link, overwrite=True) as partial:
            assert partial.parent == tmp_path / "disk"
            (partial / "file").write_text("")
        assert link.is_symlink() and contents.files_in(link) == ["file"]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []


def test_links_and_files_in_the_way_are_refused_before_the_work(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(SnpError, match="cannot be written"):
        output.check_output(loop, overwrite=True)
    (tmp_path / "theirs").mkdir()
    for ending in (".partial", ".partial.old", ".partial.lock"):
        way = tmp_path / f".out{ending}"
        for make in (lambda way: way.symlink_to(tmp_path / "theirs"), lambda way: way.symlink_to("nowhere")):
            make(way)
            with pytest.raises(SnpError, match=f".out{ending} beside it is in the way"):
                output.check_output(tmp_path / "out", overwrite=True)
            way.unlink()
    for ending in (".partial", ".partial.old"):
        (tmp_path / f".out{ending}").write_text("theirs")
        with pytest.raises(SnpError, match="in the way"):
            output.check_output(tmp_path / "out", overwrite=True)
        (tmp_path / f".out{ending}").unlink()


@pytest.mark.parametrize("name", ["a" * 300, "a" * 250, "a\x00b", "/", "//", "/proc/nothing/out"])
def test_names_that_no_folder_can_have(name):
    with pytest.raises(SnpError, match="output"):
        output.check_output(Path(name), overwrite=True)


# --- the exchange ----------------------------------------------------------------------------------------------------


def exchange_killed(folder: Path, kill_at: int, atomic: bool) -> int:
    """Exit code of a process that exchanges two folders, and is killed when it has changed the file system so often."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [kill_at]

    def counted(call):
        def change(*args, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **options)

        return change

    try:
        partial = folder.with_name(f".{folder.name}.partial")
        (partial / "journal/cut").mkdir(parents=True)
        (partial / "journal/cut/state.json").write_text("")
        (partial / "model.safetensors").write_text("new")
        if not atomic:
            exchange._exchanged = lambda one, other: False
        for name in ("rename", "rmdir", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        Path.rename = counted(Path.rename)
        exchange._exchanged = counted(exchange._exchanged)
        exchange.put_in_place(partial, folder)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("atomic", [True, False])
def test_killed_anywhere_in_the_exchange_one_of_both_is_whole_in_the_end(atomic, tmp_path):
    """In its place at once where the system can exchange folders, and else when the next run begins."""
    outcomes = set()
    for kill_at in range(40):
        out = finished(tmp_path / f"{atomic}-{kill_at}/out")
        code = exchange_killed(out, kill_at, atomic)
        partial = out.with_name(".out.partial")
        if atomic:
            assert (out / "model.safetensors").read_text() in ("old", "new")
        exchange.mend(partial, out)
        left = (out / "model.safetensors").read_text()
        outcomes.add(left)
        if left == "old":  # what the run has done is still there to go on from
            assert (partial / "journal/cut/state.json").exists() and output.can_resume(partial)
            assert (partial / "model.safetensors").read_text() == "new"
        else:
            assert not partial.exists()
        assert not out.with_name(".out.partial.old").exists()
        if code == 0:
            break
    assert code == 0 and outcomes == {"old", "new"}


@pytest.mark.parametrize("atomic", [True, False])
def test_an_interrupt_in_the_exchange_waits_for_its_end_and_says_what_is_the_case(atomic, tmp_path, monkeypatch):
    out = finished(tmp_path / "out")
    rename = Path.rename

    def interrupted(self, target):
        os.kill(os.getpid(), signal.SIGTERM)
        return rename(self, target)

    if not atomic:
        monkeypatch.setattr(exchange, "_exchanged", lambda one, other: False)
    with pytest.raises(KeyboardInterrupt) as interrupt, output.finished_folder(out, overwrite=True) as partial:
        (partial / "journal").mkdir()
        (partial / "new").write_text("")
        monkeypatch.setattr(Path, "rename", interrupted)
    assert interrupt.value.args == (143, f"{out} is complete") and contents.files_in(out) == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_exchange_is_undone(tmp_path, monkeypatch):
    out = finished(tmp_path / "out")
    rename = Path.rename

    def failing(self, target):
        if Path(target) == out and self.name == ".out.partial":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(exchange, "_exchanged", lambda one, other: False)
    with pytest.raises(SnpError, match="No space left"), output.finished_folder(out, overwrite=True) as partial:
        monkeypatch.setattr(Path, "rename", failing)
        (partial / "journal/cut").mkdir(parents=True)
        (partial / "journal/cut/state.json").write_text("")
    monkeypatch.undo()
    assert (out / "model.safetensors").read_text() == "old"
    assert output.can_resume(tmp_path / ".out.partial")


@pytest.mark.parametrize(("error", "kept"), [(DiskError, True), (KeyboardInterrupt, True), (SnpError, False)])
def test_what_the_visit_has_done_is_kept_unless_the_run_was_a_mistake(error, kept, tmp_path):
    state = tmp_path / ".out.partial/journal/visit/gradients/state.json"
    with pytest.raises(error), output.finished_folder(tmp_path / "out", overwrite=False):
        state.parent.mkdir(parents=True)
        state.write_text("{}")
        raise error
    assert state.exists() == kept


def test_the_command_replaces_its_own_output_and_no_more(tmp_path, monkeypatch, capsys, quick_prunes):
    """As it is typed: twice into one folder, then with a file of the user's in it."""
    monkeypatch.chdir(tmp_path)
    settings = ["--num-samples", "4", "--seq-len", "64", "--no-eval", "--layout", "uniform", "--sparsity", "0"]
    settings += ["--refine", "none"]
    command = ["tiny-opt", "--output", "out", "--overwrite", *settings]
    assert prune_main(command) == 0 and prune_main(command) == 0
    report = json.loads((tmp_path / "out" / contents.REPORT).read_text())
    assert report["files"] == [name for name in contents.files_in(tmp_path / "out") if name != contents.PAGE]
    (tmp_path / "out/notes.txt").write_text("mine")
    assert prune_main(command) == 2
    assert "holds notes.txt" in capsys.readouterr().err and (tmp_path / "out/notes.txt").read_text() == "mine"
    (tmp_path / "out/notes.txt").unlink()
    for inside in ("out", "out/sub"):
        assert prune_main(["out", "--output", "out", "--overwrite", "--calibration", "bundled", *settings]) == 2
        assert "is the input model" in capsys.readouterr().err, inside
