"""Models, outputs, texts and tables under names that nobody would choose."""

import os
import random
import shutil
from pathlib import Path

import pytest

from snp_llm.cli.parse import evaluate_main, inspect_main, prune_main, push_main, report_main
from tests.adversarial.trials import BUNDLED, CHEAP, KEEP_ALL, QUICKER

pytestmark = pytest.mark.exhaustive
THERE, NOWHERE = 80, 140
COUNT = THERE + NOWHERE
NAMES = (
    *("a b", " a", "a ", "[bold]x[b]", "[-]", "{x}", "%s", "$HOME", "`true`", "a;b", "a&b", "a'b", 'a"b', "*", "?"),
    *("a\nb", "a\tb", "a\rb", "\x1b[31mred", "\x7f", "\u2028", "\u202egnp", "naïve", "nai\u0308ve", "東京", "🙂"),
    *("a.b", "a.txt", "-a", "--sparsity", "~", "~root", "...", ".hidden", "model.safetensors", "con", "x" * 200),
    *("é" * 90, "a:b", "a,b", "a#b", "a=b", "a\\b", "wikitext2", "tiny-opt", "x.partial", ".x.partial", "0"),
    *("null", "None", "\udcff"),
)
IMPOSSIBLE = ("", "\x00", "a\x00b", "x" * 256, "é" * 200, "x/" * 3000, "\ud800", "/dev/null", "/proc/x/y")
ODD = (".", "..", "/", "//", "./", "../", "~/x", "a/b/c/d", "a//b", "[/]", "[bold]x[/bold]", "user/name", "user/name/x")


def place(generator, folder, name):
    """A way of saying a name in a folder."""
    ways = (
        str(folder / name),
        f"{folder}/./{name}",
        f"{folder}//{name}/",
        f"{folder}/../{folder.name}/{name}",
        f"./{name}",
        name,
    )
    return generator.choice(ways)


def test_names_of_what_is_there(model_of, trials):
    """A model, a text and an output, one of them under an odd name, or behind links."""
    for seed in range(THERE):
        generator = random.Random(seed)
        home, name = trials.clean(), NAMES[seed % len(NAMES)]
        odd = generator.choice(("model", "text", "output", "output", "home"))
        if odd == "home":
            home = home / name
            home.mkdir()
        folder = shutil.copytree(model_of("opt"), home / (name if odd == "model" else "model"))
        text = home / (f"{name}.txt" if odd == "text" else "text.txt")
        try:
            text.write_text("a text of some words, for calibration " * 60)
        except OSError:  # a name that is too long with its ending
            text = home / "text.txt"
            text.write_text("a text of some words, for calibration " * 60)
        link = generator.random() < 0.3
        if link:
            (home / "link").symlink_to(generator.choice((folder, folder.name)))
        out = home / (name if odd == "output" else "out")
        said = {
            "model": str(home / "link")
            if link
            else place(generator, home, folder.name)
            if odd == "model"
            else str(folder),
            "text": str(text),
            "out": place(generator, home, name) if odd == "output" and home == trials.place else str(out),
        }
        if not Path(said["model"]).exists():  # relative to another folder
            said["model"] = str(folder)
        arguments = [said["model"], "--output", said["out"], *KEEP_ALL, "--calibration", said["text"], *QUICKER]
        makes = os.path.relpath(os.path.realpath(said["out"]), trials.place)
        trials.run(f"{seed} {odd} {said!r}", prune_main, arguments, makes=(makes,))
    trials.check(THERE)


def test_names_of_what_is_not(model_of, trials):
    """Every argument that names something, with something that cannot be there, is not, or is not what it should be."""
    model = model_of("opt")
    text = model.parent / "text.txt"
    text.write_text("a text of some words, for calibration " * 60)
    quick, latency = [*KEEP_ALL, *QUICKER], ("--target-latency", "0.9x", "--round-to", 4)
    for seed in range(NOWHERE):
        generator = random.Random(seed)
        home = trials.clean()
        (home / "file").write_text("a file")
        (home / "empty").mkdir()
        (home / "circle").symlink_to("circle")
        (home / "dangling").symlink_to("nowhere")
        here = [
            str(home / name) for name in ("file", "empty", "circle", "dangling", "file/x", "missing", "empty/../file")
        ]
        name = generator.choice((*NAMES, *IMPOSSIBLE, *ODD, *here, *here))
        if name.startswith("-"):
            name = f"./{name}"
        where = generator.randrange(9)
        out, calibration = str(home / "out"), ("--calibration", text)
        main, arguments = (
            (prune_main, [name, "--output", out, *quick, *calibration]),
            (inspect_main, [name]),
            (report_main, [name]),
            (push_main, [name, "user/name"]),
            (prune_main, [model, "--output", name, *quick, *calibration, "--overwrite"]),
            (prune_main, [model, "--output", out, *quick, "--calibration", name]),
            (prune_main, [model, "--output", out, *CHEAP, *calibration, *latency, "--latency-table", name]),
            (prune_main, [model, "--output", out, "--config", name, *quick, *calibration]),
            (evaluate_main, [model, "--dataset", name, "--seq-len", 16, "--max-windows", 1]),
        )[where]
        if where in (4, 6) and not _writable(name, home):
            continue
        if name == "tiny-opt" and where == 0:
            arguments = [*arguments, *BUNDLED]
        makes = (os.path.relpath(os.path.join(home, name), home).split("/")[0] if where in (4, 6) else "out", "out")
        measured = [makes[0]] if where == 6 else []  # a table is kept even if it shows that there is no such model
        trials.run(f"{seed} {where} {name[:300]!r}", main, arguments, makes=makes, keeps=measured)
    trials.check(trials.accepted + trials.refused)
    assert trials.accepted + trials.refused > NOWHERE - 20


def _writable(name: str, home: Path) -> bool:
    """Whether a run may write there, which is tried inside of a test's own folder alone."""
    if not name or "\0" in name:
        return True
    try:
        return Path(name).resolve().is_relative_to(home)
    except (OSError, RuntimeError, ValueError):
        return True
