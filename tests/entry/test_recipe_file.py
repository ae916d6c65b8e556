"""Recipe files: what is in them is what runs, mistakes are named, and what a run leaves behind repeats it."""

import json
import re
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from snp_llm import Recipe, SnpError, load_recipe, save_recipe
from snp_llm.checkpoint import hub
from snp_llm.checkpoint.contents import RECIPE
from snp_llm.cli import parse
from snp_llm.cli import prune as prune_command
from snp_llm.recipe.groups import ONCE
from snp_llm.runtime.version import __version__
from tests.quick import without_page, without_reloading

pytestmark = pytest.mark.usefixtures("quick_prunes")
RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.yaml"))
QUICK = ["--num-samples", "4", "--seq-len", "32", "--no-eval"]


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "mine.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return writer


@pytest.fixture
def parsed(monkeypatch):
    """Recipes that the command line would have run."""
    found = []
    monkeypatch.setattr(prune_command, "run_prune", lambda recipe, *_: found.append(recipe))
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_launch_command_on_top_of_a_recipe_runs_it(path, parsed, monkeypatch):
    monkeypatch.chdir(path.parent.parent)
    launcher, config = path.read_text().splitlines()[0].removeprefix("# ").split(" --config ")
    processes = "accelerate launch --num_processes 4 -m snp_llm.prune"
    assert launcher == (processes if path.stem.endswith("multi-gpu") else "snp-llm prune")
    assert parse.prune_main(["--config", config]) == 0
    assert parsed == [load_recipe(path)]


def test_there_is_a_recipe_for_every_published_setting():
    wanted = {"opt-125m-30", "opt-1.3b-30", "opt-6.7b-50-multi-gpu", "llama-3-8b-20-uniform", "qwen3-0.6b-20"}
    wanted |= {"smollm2-135m-20-uniform", "tiny-opt-demo", "paper-snp-zca-variance"}
    vision = {"deit-small-40", "resnet-50-30", "vgg16-bn-40"}
    assert {path.stem for path in RECIPES} == wanted | vision
    for path in RECIPES:  # whole ones: nothing that decides about the result is left to a default
        named = {
            "model",
            "output",
            "sparsity",
            "ordering",
            "metric",
            "allocation",
            "reference",
            "layout",
            "calibration",
        }
        named |= {"num_samples", "seq_len", "batch_size", "seed"}
        if path.stem in vision:  # images have no length, and their networks the choices that are usual
            named -= {"ordering", "metric", "allocation", "reference", "seq_len"}
        assert named <= set(yaml.safe_load(path.read_text()))


def test_the_papers_recipe_holds_the_papers_choices():
    (path,) = [path for path in RECIPES if path.stem.startswith("paper")]
    recipe = load_recipe(path)
    assert (recipe.ordering, recipe.allocation, recipe.reference, recipe.dampening) == ("zca", "variance", "self", 0.01)
    assert not recipe.needs_gradients and not recipe.holds_out


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_demo_recipe_end_to_end(tmp_path, monkeypatch):
    (path,) = [path for path in RECIPES if path.stem == "tiny-opt-demo"]
    monkeypatch.chdir(tmp_path)
    # As it is, but for fewer tokens: `make demo` and its test take them all.
    assert parse.prune_main(["--config", str(path), "--num-samples", "16", "--seq-len", "128"]) == 0
    report = json.loads((tmp_path / "tiny-opt-snp-30/prune_report.json").read_text())
    assert report["sparsity"]["achieved"] == pytest.approx(0.3, abs=0.01)
    assert report["pruned"]["perplexity"] < 1.1 * report["dense"]["perplexity"]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        pytest.param("tiny-opt", [], marks=pytest.mark.exhaustive),
        ("./small-opt", ["--target-params", "0.9x", "--seed", "3", "--ordering", "random"]),
    ],
)
def test_a_saved_recipe_makes_the_same_model_to_the_bit(model, options, opt_folder, tmp_path, monkeypatch):
    without_reloading(monkeypatch.setattr)  # tested elsewhere, and a process each
    without_page(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)  # where opt_folder is
    first, again = tmp_path / "first", tmp_path / "again"
    bundled = ["--calibration", "bundled"]
    assert parse.prune_main([model, *options, *bundled, "--output", "first", *QUICK]) == 0
    assert parse.prune_main(["--config", str(first / RECIPE), "--output", str(again)]) == 0
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert load_recipe(first / RECIPE) == load_recipe(again / RECIPE)


def test_what_is_saved_of_a_run(opt_folder, tmp_path, monkeypatch, capsys):
    without_reloading(monkeypatch.setattr)
    out = tmp_path / "out"
    arguments = [
        str(opt_folder),
        "--output",
        str(out),
        "--overwrite",
        "--trust-remote-code",
        "--calibration",
        "bundled",
    ]
    assert parse.prune_main([*arguments, *QUICK]) == 0
    comment, *rest = (out / RECIPE).read_text().splitlines()
    command = shlex.join(["snp-llm", "prune", *arguments, *QUICK])
    assert comment == f"# Written by snp-llm {__version__} for: {command}"
    saved = yaml.safe_load("\n".join(rest))
    assert set(saved) == {field.name for field in fields(Recipe)} - set(ONCE)
    assert saved["round_to"] == 8 and saved["eval_dataset"] == "wikitext2" and saved["calibration"] == "bundled"
    assert out / RECIPE in hub.model_files(out)  # it goes along to the Hub
    # Nothing that replaces, uploads or trusts comes back with the file.
    recipe = load_recipe(out / RECIPE)
    assert not (recipe.overwrite or recipe.trust_remote_code or recipe.push_to_hub or recipe.private or recipe.output)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    assert parse.prune_main(["--config", "out/recipe.yaml", "--output", "out"]) == 2
    assert "output out: exists" in capsys.readouterr().err


def test_what_is_loaded_is_what_was_saved(tmp_path):
    for recipe in (
        Recipe(model="m"),
        Recipe(model="übung: #1", sparsity=1e-05, dampening=0.1, seq_len=32, calibration="- [x]", eval=False),
        Recipe(model="null", target_size="2GB", layout="uniform", text_column="1e3", eval_split="yes"),
    ):
        save_recipe(recipe, tmp_path / "r.yaml")
        assert load_recipe(tmp_path / "r.yaml") == recipe


def test_a_command_cannot_leave_its_comment(tmp_path):
    save_recipe(Recipe(model="m"), tmp_path / "r.yaml", "snp-llm prune m --output 'a\nseed: 7\r\x85\u2028\udc80\0ü'")
    assert load_recipe(tmp_path / "r.yaml") == Recipe(model="m")
    assert (tmp_path / "r.yaml").read_text().startswith("# Written by") and "ü" in (tmp_path / "r.yaml").read_text()


def test_the_command_line_overrides_single_settings(write, parsed):
    path = str(write("model: tiny-opt\nsparsity: 0.2\ndampening: 0.1\neval: false\nlayout: uniform\n"))
    expected = Recipe(model="tiny-opt", sparsity=0.2, dampening=0.1, eval=False, layout="uniform")
    for options, changes in (
        (["--config", path], {}),
        ([f"--config={path}", "--sparsity", "0.4"], {"sparsity": 0.4}),
        (["--sparsity", "0.4", "--config", path, "--eval"], {"sparsity": 0.4, "eval": True}),
        (["--config", path, "--dampening", "None"], {"dampening": None}),
        (["user/other", "--config", path], {"model": "user/other"}),
    ):
        assert parse.prune_main(options) == 0
        assert parsed.pop() == replace(expected, **changes)


def test_the_model_may_come_from_the_command_line_alone(write, parsed, capsys):
    path = write("sparsity: 0.2\n")
    assert parse.prune_main(["tiny-opt", "--config", str(path)]) == 0
    assert parsed == [Recipe(model="tiny-opt", sparsity=0.2)]
    assert parse.prune_main(["--config", str(path)]) == 2
    assert "MODEL" in capsys.readouterr().err
    with pytest.raises(SnpError, match="expected a model, got none"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected settings"),
        ("# nothing\n---\n", "is empty"),
        ("- a\n- b\n", "expected settings, one `name: value` a line, got a list"),
        ("sparsity 0.3", "expected settings, one `name: value` a line, got 'sparsity 0.3'"),
        ("sparsity: 0.3\nlayout: [", "is not YAML: .*line 2"),
        ("model: m\n---\nmodel: n\n", "is not YAML: expected a single document"),
        ("model: !!python/object/apply:os.system [id]\n", "line 1: model: expected text, got a list"),
        ("model: !!python/name:os.system x\n", "line 1: model: expected text, got .*could not determine a constructor"),
        ("seed: 2024-99-99\n", "line 1: seed: expected an integer, got .*month must be in"),
        (b"model: \xff\n", "is not YAML"),
        ("[" * 1100, "is not YAML"),
        ("model: m\nordring: zca\n", r"line 2: 'ordring': expected a setting's name.* Did you mean 'ordering'\?"),
        ("num-samples: 4\n", r"line 1: 'num-samples': .*Did you mean 'num_samples'\?"),
        ("qwxz: 1\n", "'qwxz': expected a setting's name, .*--help"),
        ("1: 2\n", "'1': expected a setting's name"),
        ("seed: 1\nmodel: m\nseed: 2\n", "line 3: seed: expected once, stands in line 1 already"),
        ("sparsity: a third\n", "line 1: sparsity: expected a number or null, got 'a third'"),
        ("sparsity: '0.3'\n", "expected a number or null, got '0.3'. Write 0.3, without quotes"),
        ("dampening: 1e-2\n", "dampening: expected a number or null, got '1e-2'. Write 0.01"),
        ("sparsity: true\n", "expected a number or null, got True"),
        ("save_every:\n", "expected a number, got None"),
        ("num_samples: 12.5\n", "num_samples: expected an integer, got 12.5"),
        ("num_samples: true\n", "num_samples: expected an integer, got True"),
        ("eval: 1\n", "eval: expected true or false, got 1"),
        ("target_params: 900000000\n", "target_params: expected text or null, got 900000000. Put it in quotes"),
        ("model: [a, b]\n", r"model: expected text, got a list\."),
        ("ordering: zac\n", r"ordering: expected one of zca, zca-exact, saw, .*, got 'zac'. Did you mean 'zca'\?"),
        ("trust_remote_code: true\n", "expected false, got true. .* command line: --trust-remote-code"),
        ("model: m\nsparsity: 1.5\n", "--sparsity: expected a number from 0 to below 1, got 1.5"),
        ("model: m\ntarget_params: 0.7x\ntarget_size: 1GB\n", "expected one budget, got 2"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b, *b]\n", "'a': expected a setting's name"),
    ],
)
def test_mistakes_are_named(text, message, write, capsys):
    path = write(text)
    assert parse.prune_main(["tiny-opt", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"snp-llm: error: recipe {path}") and error.count("\n") == 1 and len(error) < 700
    with pytest.raises(SnpError, match=message):
        load_recipe(path)


def test_files_that_are_none(tmp_path, capsys):
    for arguments, message in (
        (["--config", str(tmp_path / "no.yaml")], "no.yaml: cannot be read .No such file"),
        (["--config", str(tmp_path)], "cannot be read .Is a directory"),
        (["--config"], "Missing value for argument .*--config"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config: expected one recipe file, got 2: a.yaml, b.yaml"),
    ):
        assert parse.prune_main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("snp-llm: error: ") and error.count("\n") == 1
        assert re.search(message, error), error


def test_help_knows_of_recipe_files(capsys):
    with pytest.raises(SystemExit):
        parse.prune_main(["--help"])
    assert "--config FILE" in capsys.readouterr().out
