"""Files of earlier runs that are broken: noticed before anything is measured, and never uploaded."""

import json
import shutil
from unittest import mock

import pytest

from snp_llm.checkpoint import hub
from snp_llm.checkpoint.contents import REPORT
from snp_llm.cli import parse
from tests.conftest import refused


@pytest.fixture(scope="module")
def pruned(pruned_opt, tmp_path_factory):
    """A finished output folder, with a benchmark."""
    out = shutil.copytree(pruned_opt / "pruned", tmp_path_factory.mktemp("pruned") / "out")
    few = ["--batch-sizes", "1", "--prompt-lengths", "8", "--new-tokens", "1", "--repeats", "1", "--no-memory"]
    assert parse.bench_main([str(pruned_opt / "dense"), str(out), *few, "--save"]) == 0
    return out


@pytest.fixture
def copy(pruned, tmp_path):
    return shutil.copytree(pruned, tmp_path / "out")


DEEP = "[" * 200_000
DEEP_ENOUGH = '{"a":' * 600 + "1" + "}" * 600
BROKEN = (
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"5",
    b'"x"',
    b"NaN",
    DEEP.encode(),
    DEEP_ENOUGH.encode(),
    b'{"a": 1e999}',
)


def odd_reports(report):
    """Reports with a value of another kind at every key of the first level, and of all that is needed within."""
    for key in report:
        for value in (None, 5, "x", [], [1], {}, {"x": [1]}):
            yield key, {**report, key: value}
    for key in ("dense", "pruned", "recipe", "sparsity"):
        for inner in report[key]:
            for value in (None, "x", [1], {}, -1, 0, 1e308):
                yield f"{key}.{inner}", {**report, key: {**report[key], inner: value}}
    for inner in report["sites"][0]:
        for value in (None, "x", [1], {}, -1, 0, 1e308):
            yield f"sites.{inner}", {**report, "sites": [{**report["sites"][0], inner: value}, *report["sites"][1:]]}


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:12].decode("latin-1"))
def test_broken_reports_are_noticed_before_anything_is_measured(content, copy, capsys):
    (copy / REPORT).write_bytes(content)
    before = {file.name: file.read_bytes() for file in copy.iterdir()}
    with mock.patch("snp_llm.evaluate.side_by_side.evaluate", None), mock.patch("snp_llm.evaluate.speed.bench", None):
        for main, arguments in (
            (parse.report_main, [copy]),
            (parse.push_main, [copy, "user/name"]),
            (parse.evaluate_main, [copy, "--dataset", "bundled", "--save"]),
            (parse.bench_main, [copy, copy, "--save"]),
        ):
            assert f"{REPORT}: expected a report of `snp-llm prune`" in refused(capsys, main, *arguments)
    assert before == {file.name: file.read_bytes() for file in copy.iterdir()}


@pytest.mark.parametrize("every", [397, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_report_with_a_value_of_another_kind_is_a_page_or_one_line(every, copy, capsys):
    for key, odd in [*odd_reports(json.loads((copy / REPORT).read_text()))][::every]:
        (copy / REPORT).write_text(json.dumps(odd))
        if parse.report_main([str(copy)]):
            error = capsys.readouterr().err
            assert error.startswith("snp-llm: error: ") and error.count("\n") == 1 and len(error) < 700, key


@pytest.mark.parametrize(
    "changes", [{"perplexities": 5}, {"perplexities": [1]}, {"perplexities": [{}]}, {"tasks": [1]}, {"versions": None}]
)
def test_a_report_that_takes_no_results_is_noticed_first(changes, copy, capsys):
    report = json.loads((copy / REPORT).read_text())
    (copy / REPORT).write_text(json.dumps({**report, **changes}))
    with mock.patch("snp_llm.evaluate.side_by_side.evaluate", None):
        assert "Prune again" in refused(capsys, parse.evaluate_main, copy, "--dataset", "bundled", "--save")


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_card_that_takes_no_section_is_noticed_first(content, copy, capsys):
    (copy / "README.md").unlink()
    if content is not None:
        (copy / "README.md").write_bytes(content)
    with mock.patch("snp_llm.evaluate.speed.bench", None):
        assert "README.md" in refused(capsys, parse.bench_main, copy, copy, "--save")


@pytest.mark.parametrize("content", BROKEN, ids=lambda content: content[:12].decode("latin-1"))
def test_a_broken_benchmark_is_one_line(content, copy, capsys):
    (copy / "bench.json").write_bytes(content)
    if parse.report_main([str(copy)]):
        assert capsys.readouterr().err.count("\n") == 1
    else:  # JSON of another kind is shown as it is
        assert content in (b"null", b"[]", b"5", b'"x"')
    if content not in (b"null", b"[]", b"5", b'"x"'):
        assert "bench.json" in refused(capsys, parse.push_main, copy, "user/name")


INDEXES = ('{"weight_map": null}', "{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": [5]}}')


@pytest.mark.parametrize(
    "content", [*BROKEN, *(text.encode() for text in INDEXES)], ids=lambda c: c[:24].decode("latin-1")
)
def test_a_broken_index_is_not_uploaded(content, copy, capsys):
    (copy / hub.INDEX).write_bytes(content)
    assert hub.INDEX in refused(capsys, parse.push_main, copy, "user/name")


WHOLE = {"device": "cpu", "dtype": "float32", "batch_size": 1, "seq_len": 32, "whole": 1.0}
TABLES = (
    *(
        {**WHOLE, "sites": sites}
        for sites in (None, [], 5, {}, {"x": 5}, {"x": {}}, {"x": {"1": 1}}, {"x": {"a": 1, "b": 2}})
    ),
    *({**WHOLE, "sites": {"x": {"1": 1.0, "2": value}}} for value in (-1, 0, "x", None, [1], 10**400)),
    *({**WHOLE, "sites": {"x": {"1": 1.0, "2": 2.0}}, "whole": value} for value in (0, -1, "x", None, [])),
    {**WHOLE, "sites": {"x": {"0": 1.0, "-2": 2.0}}},
    {**WHOLE, "more": 1, "sites": {}},
)


def each_tenth(values):
    """The others are tried where all is."""
    return [
        value if not i % 10 else pytest.param(value, marks=pytest.mark.exhaustive) for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    "content",
    each_tenth([*BROKEN, *(json.dumps(table).encode() for table in TABLES)]),
    ids=range(len(BROKEN) + len(TABLES)),
)
def test_a_broken_table_of_latencies_is_noticed_before_weights_are_read(content, no_weights, tmp_path, capsys):
    file = tmp_path / "table.json"
    file.write_bytes(content)
    options = ["--target-latency", "0.5x", "--latency-table", file, "--calibration", "bundled", "--no-eval"]
    error = refused(capsys, parse.prune_main, no_weights, "--output", tmp_path / "out", *options)
    assert f"{file}: expected a table" in error or "latency table: has " in error
    file.unlink()
    nowhere = ["--latency-table", tmp_path / "nowhere/table.json"]
    error = refused(capsys, parse.prune_main, no_weights, "--output", tmp_path / "out", *options, *nowhere)
    assert "expected a folder there that can be written to" in error
