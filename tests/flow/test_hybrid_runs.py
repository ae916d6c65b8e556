"""Whole runs on models whose blocks differ: interrupted, on two ranks, and to a latency."""

import json

import pytest

from tests.differing import differing_model
from tests.flow.test_ranks import SETTINGS as MANY
from tests.flow.test_ranks import assert_same_model
from tests.flow.test_unfinished import SETTINGS, done_in, prune, weights  # noqa: F401 - a fixture among them

pytestmark = pytest.mark.slow
TYPES = ("nemotron_h", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("qwen3_next", "deepseek_v3")))


@pytest.fixture(params=TYPES)
def hybrid(request, tokenizer, tmp_path):
    folder = tmp_path / "dense"
    differing_model(request.param).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.exhaustive
def test_it_goes_on_after_a_kill_to_the_same_bits(prune, hybrid, tmp_path):  # noqa: F811
    command = (hybrid, *SETTINGS, "--sparsity", 0.15)
    assert prune(*command, "--output", tmp_path / "whole")["codes"] == [0]
    for after in (1, 2):
        out = tmp_path / f"{after}"
        assert prune(*command, "--output", out, die_at=("cut", after))["codes"] == [-9]
        assert done_in(out, "cut") == after
        result = prune(*command, "--output", out, "--resume")
        assert result["codes"] == [0], result["stderr"]
        assert weights(out) == weights(tmp_path / "whole")


@pytest.mark.exhaustive
def test_two_ranks_prune_it_as_one_does(prune, hybrid, tmp_path):  # noqa: F811
    for count in (1, 2):
        result = prune(hybrid, *MANY, "--sparsity", 0.15, "--output", tmp_path / f"{count}", ranks=count)
        assert result["codes"] == [0] * count, result["stderr"]
    assert_same_model(tmp_path / "1", tmp_path / "2")


@pytest.mark.exhaustive
def test_it_is_cut_to_a_latency_that_was_measured(prune, hybrid, tmp_path):  # noqa: F811
    """How fast it is afterwards is for no test; that widths were chosen by a table of its blocks shows in both."""
    table, budget = tmp_path / "table.json", SETTINGS[: SETTINGS.index("--sparsity")]
    command = (hybrid, *budget, "--round-to", 4, "--target-latency", "0.99x", "--latency-table", table)
    assert prune(*command, "--output", tmp_path / "out")["codes"] == [0]
    sites = json.loads((tmp_path / "out/prune_report.json").read_text())["sites"]
    assert json.loads(table.read_text())["whole"] > 0
    assert any(site["units_after"] < site["units_before"] for site in sites)
