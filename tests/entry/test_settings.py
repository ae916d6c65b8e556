"""Every number and every name that any command takes: what is refused, in words and before anything is done."""

import json
import math
import tracemalloc
from dataclasses import MISSING, fields
from typing import get_args, get_type_hints

import pytest

from snp_llm import Recipe, SnpError, load_recipe
from snp_llm.cli import bench, evaluate, inspect, parse, prune, push, recover, report
from snp_llm.recipe.checks import RANGES, flag
from snp_llm.recipe.commands import BenchRecipe, EvaluationRecipe, InspectRecipe, PushRecipe, ReportRecipe
from snp_llm.recipe.file import read_settings
from snp_llm.recipe.recovery import RecoverRecipe

KINDS = {
    Recipe: (parse.prune_main, ["m"]),
    EvaluationRecipe: (parse.evaluate_main, ["m"]),
    BenchRecipe: (parse.bench_main, ["m", "p"]),
    InspectRecipe: (parse.inspect_main, ["m"]),
    ReportRecipe: (parse.report_main, ["m"]),
    RecoverRecipe: (parse.recover_main, ["f"]),
    PushRecipe: (parse.push_main, ["m", "user/name"]),
}
TOGETHER = {"limit": {"tasks": "t"}, "num_fewshot": {"tasks": "t"}}  # settings that stand with another one only


def leaves(hint) -> set:
    """The types in a hint: of a union, of a tuple, of a literal's values."""
    inner = [leaf for part in get_args(hint) if part is not ... for leaf in leaves(part)]
    return set(inner) if get_args(hint) else {hint if isinstance(hint, type) else type(hint)}


def settings(*types):
    """(recipe, field) of all settings that may be one of some types."""
    return [
        (kind, field)
        for kind in KINDS
        for field in fields(kind)
        if leaves(get_type_hints(kind)[field.name]) & set(types)
    ]


NUMBERS = settings(int, float)
TEXTS = [(k, f) for k, f in settings(str) if not get_args(get_type_hints(k)[f.name]) or None in (f.default,)]
TEXTS += [(k, f) for k, f in settings(str) if f.default is MISSING and (k, f) not in TEXTS]


def name_of(case) -> str:
    return f"{case[0].__name__}-{case[1].name}"


def cases(field):
    """Numbers that may be had, and what may not."""
    span = RANGES[field.name]
    if span.kind is int:
        return [span.least, span.most], [span.least - 1, span.most + 1, 10**400, math.inf, -math.inf, math.nan, 1.5]
    most = math.nextafter(span.most, -math.inf) if span.below else span.most
    over = span.most if span.below else math.nextafter(span.most, math.inf)
    return [span.least, most], [math.nextafter(span.least, -math.inf), over, math.inf, -math.inf, math.nan]


def test_every_number_has_a_range_and_every_range_a_number():
    assert {field.name for _, field in NUMBERS} == set(RANGES)
    for kind, field in NUMBERS:
        assert RANGES[field.name].kind in leaves(get_type_hints(kind)[field.name]), field.name


def build(kind, **values):
    positional = dict(zip((f.name for f in fields(kind) if f.default is MISSING), KINDS[kind][1], strict=True))
    for name, value in positional.items():
        if tuple in (getattr(get_type_hints(kind)[name], "__origin__", None),):
            positional[name] = (value,)
    return kind(**{**positional, **values})


def wrapped(kind, field, value):
    """A value as that field takes it."""
    return (value,) if getattr(get_type_hints(kind)[field.name], "__origin__", None) is tuple else value


@pytest.mark.parametrize("case", NUMBERS, ids=name_of)
def test_numbers_in_python(case):
    kind, field = case
    good, bad = cases(field)
    for value in good:
        build(kind, **{field.name: wrapped(kind, field, value), **TOGETHER.get(field.name, {})})
    for value in [*bad, True, "1", [1]]:
        with pytest.raises(SnpError, match=rf"^{flag(field.name)}: expected an? \w+ from .*, got .{{1,40}}\.$"):
            build(kind, **{field.name: wrapped(kind, field, value), **TOGETHER.get(field.name, {})})


@pytest.fixture
def runs(monkeypatch):
    """Recipes that commands would have run."""
    found = []
    for room in (bench, evaluate, inspect, prune, push, recover, report):
        for name in [name for name in dir(room) if name.startswith("run_")]:
            monkeypatch.setattr(room, name, lambda recipe, *_: found.append(recipe))
    return found


@pytest.mark.parametrize("bad_ones", [1, pytest.param(None, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("case", NUMBERS, ids=name_of)
def test_numbers_on_the_command_line(case, bad_ones, runs, capsys):
    """What parses them is one and the same; which are refused is in the test before."""
    kind, field = case
    main, words = KINDS[kind]
    good, bad = cases(field)
    others = [word for name, value in TOGETHER.get(field.name, {}).items() for word in (flag(name), value)]
    for value in good:
        assert main([*words, *others, flag(field.name), repr(value)]) == 0
        assert getattr(runs.pop(), field.name) == wrapped(kind, field, value)
    for value in bad[:bad_ones]:
        assert main([*words, *others, f"{flag(field.name)}={value!r}"]) == 2 and not runs
        error = capsys.readouterr().err
        assert error.startswith("snp-llm: error: ") and error.count("\n") == 1 and field.name.split("_")[0] in error


@pytest.mark.parametrize("field", [field for kind, field in NUMBERS if kind is Recipe], ids=lambda field: field.name)
def test_numbers_in_a_recipe_file(field, tmp_path, runs, capsys):
    file = tmp_path / "r.yaml"
    good, bad = cases(field)
    spelled = {math.inf: ".inf", -math.inf: "-.inf"}
    for value in good:
        file.write_text(f"model: m\n{field.name}: {json.dumps(value).replace('e', '.0e') if value else 0}\n")
        assert getattr(load_recipe(file), field.name) == value
    for value in [*bad, 10**5000]:
        digits = "0x" + "f" * 5000 if value == 10**5000 else ".nan" if value != value else spelled.get(value, value)
        file.write_text(f"model: m\n{field.name}: {digits}\n")
        assert parse.prune_main(["--config", str(file)]) == 2 and not runs
        error = capsys.readouterr().err
        assert error.startswith(f"snp-llm: error: recipe {file}") and error.count("\n") == 1 and len(error) < 700


LONG = 300 * "a"
BAD_TEXTS = (
    "",
    " ",
    "a\0b",
    "a\nb",
    "a\r",
    "\x1b[31m",
    "a\u2028b",
    "\udcff",
    LONG,
    f"x/{LONG}",
    300 * "ü",
    5000 * "a/",
)


@pytest.mark.parametrize("case", TEXTS, ids=name_of)
def test_texts_that_can_be_no_name(case):
    kind, field = case
    for text in BAD_TEXTS:
        with pytest.raises(SnpError) as refused:
            build(kind, **{field.name: wrapped(kind, field, text)})
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
        assert field.name.rstrip("_") in str(refused.value).replace("-", "_")


def test_names_may_be_of_any_script_and_have_what_files_have():
    for name in ("模型 a", "名\u3000前", "naïve [v2]", "a b", "#1: x", "~/x", "-x", "a" * 255, "%s{}"):
        assert Recipe(model="m", calibration=name, eval_dataset=name).calibration == name


@pytest.mark.parametrize("output", ["/", "//", ".", "..", "a/..", "./", "a/../..", "x/" + 201 * "o", 201 * "o"])
def test_outputs_that_are_no_folder_of_their_own(output, capsys):
    assert parse.prune_main(["tiny-opt", "--output", output]) == 2
    error = capsys.readouterr().err
    assert error.startswith("snp-llm: error: --output") and error.count("\n") == 1


def test_a_model_whose_name_leaves_no_room_for_the_outputs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / (250 * "m")).mkdir()
    assert parse.prune_main([250 * "m"]) == 2
    assert "--output: expected a name of at most 200 bytes, got 257" in capsys.readouterr().err


@pytest.mark.parametrize("main", [main for main, _ in KINDS.values()], ids=lambda main: main.__name__)
@pytest.mark.parametrize(
    "name",
    [
        *(LONG, "", "a\nb", "\udcff", "/dev/null"),
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (f"./{LONG}", "/", "nowhere/at/all", "/proc")),
    ],
)
def test_every_command_takes_one_line_for_a_name(name, main, capsys, monkeypatch, tmp_path):
    """As model, folder, dataset, recipe and table."""
    monkeypatch.chdir(tmp_path)
    words = {parse.bench_main: [name, name], parse.push_main: [name, "user/name"]}.get(main, [name])
    options = {
        parse.prune_main: ["--calibration", "--eval-dataset", "--config", "--output"],
        parse.evaluate_main: ["--dataset", "--include-path"],
    }
    calls = [words, *(["tiny-opt", f"{option}={name}"] for option in options.get(main, []))]
    if main is parse.prune_main:
        calls = [call for call in calls if call != ["tiny-opt", "--output=nowhere/at/all"]]  # that can be made
        calls.append(["tiny-opt", "--target-latency", "0.5x", f"--latency-table={name}"])
    for call in calls:
        call = [*call, "--tasks", "t"] if any("include" in word for word in call) else call
        assert main(call) == 2, call
        *before, error = capsys.readouterr().err.splitlines()
        assert error.startswith("snp-llm: error: ") and "Error" not in error, error
        assert not any("error" in line.lower() for line in before), before  # signs of life
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("depth", [3, 9, 40])
def test_a_few_lines_cannot_take_much_memory(depth, tmp_path):
    """References to references, each nine of the one before: nine to the power of their number, if they were written
    out."""
    lines = ["model:", "  x0: &x0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"  x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]" for i in range(1, depth)]
    refused = (
        "\n".join(lines),
        "\n".join([*lines, f"<<: *x{depth - 1}"]).replace("model:", "seed:"),
        "\n".join(line.strip() for line in lines[1:]),
    )
    file = tmp_path / "r.yaml"
    for text in refused:
        file.write_text(text)
        tracemalloc.start()
        with pytest.raises(SnpError):
            load_recipe(file)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "model: m\nseed: " + "1:" * 4000 + "1\n",
        "model: " + "[" * 2000,
        "model: " + "{a: " * 2000,
        "? [a, b]\n: 1\n",
        "# " + "x" * 200_000,
        "model: !!bool maybe\n",
        "model: !!timestamp x\n",
        "seed: !!int ''\n",
        "seed: !!float ''\n",
        "model: !!binary '*'\n",
        "model: !!set x\n",
        "model: =\n",
        "model: m\nseed: " + "9" * 5000,
        "model: 0x" + "f" * 5000,
        'model: "a\\0b"\n',
    ],
    ids=lambda text: text[:20],
)
def test_odd_recipe_files_are_one_line(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(SnpError) as error:
        load_recipe(tmp_path / "r.yaml")
    assert len(str(error.value)) < 700 and "\n" not in str(error.value)


def test_a_reference_to_a_single_value_is_that_value(tmp_path):
    (tmp_path / "r.yaml").write_text("model: &a m\ncalibration: *a\n")
    assert read_settings(tmp_path / "r.yaml") == {"model": "m", "calibration": "m"}


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"sparsity": 0.3, "target_params": "0.7x"}, "--target-params and --sparsity"),
        ({"sparsity": 0.0, "max_perplexity_increase": "5%"}, "--max-perplexity-increase and --sparsity"),
        ({"sparsity": 0.3, "target_latency": "5ms"}, "--target-latency and --sparsity"),
        ({"sparsity": 0.3, "ffn_sparsity": 0.1, "head_sparsity": 0.1}, "--sparsity and --ffn-sparsity and --head-"),
    ],
)
def test_two_budgets_at_once_are_refused_wherever_they_are_said(settings, flags, tmp_path, capsys):
    with pytest.raises(SnpError, match=f"^{flags}.*: expected one budget, got {len(settings)}"):
        Recipe(model="m", **settings)
    (tmp_path / "r.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    words = [word for name, value in settings.items() for word in (flag(name), str(value))]
    (tmp_path / "half.yaml").write_text(f"sparsity: {settings['sparsity']}\n")
    for arguments in (words, ["--config", f"{tmp_path}/r.yaml"], ["--config", f"{tmp_path}/half.yaml", *words[2:]]):
        assert parse.prune_main(["m", *arguments]) == 2
        assert "expected one budget" in capsys.readouterr().err


def test_the_usual_sparsity_is_that_of_nothing_else_alone():
    assert Recipe("m").sparsities == Recipe("m", sparsity=0.3).sparsities == [(("attention", "ffn", "experts"), 0.3)]
    assert Recipe("m", head_sparsity=0.1).common_sparsity == 0.3
    assert Recipe("m", head_sparsity=0.1, sparsity=0.5).sparsities == [
        (("attention",), 0.1),
        (("ffn", "experts"), 0.5),
    ]
    for other in ({"target_size": "1MB"}, {"max_perplexity_increase": "5%"}, {"ffn_sparsity": 0, "head_sparsity": 0}):
        assert Recipe("m", **other).common_sparsity is None


@pytest.mark.parametrize(
    ("kind", "text"), [(k, t) for k in ("params", "size", "flops", "latency") for t in ("0.7", "70%", "1")]
)
def test_a_forgotten_x_is_asked_about(kind, text):
    meant = "1x" if text == "1" else "0.7x"
    with pytest.raises(SnpError, match=rf"^--target-{kind}: .* got '{text}'\. Did you mean {meant}\?$"):
        Recipe("m", **{f"target_{kind}": text})


@pytest.mark.parametrize("kind", ["params", "size", "flops", "latency"])
@pytest.mark.parametrize(
    "text",
    ["1e400", "1e999GB", "0", "0x", "0.0x", "1.5x", "nan", "inf", "-1x", "x", "1e400x", "²", "1e308T"],
)
def test_amounts_that_are_none(kind, text):
    with pytest.raises(SnpError, match=rf"^--target-{kind}: expected a number with one of") as refused:
        Recipe("m", **{f"target_{kind}": text})
    assert len(str(refused.value)) < 300
