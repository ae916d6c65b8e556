import json

import pytest
import yaml
from rich.console import Console

from snp_llm import prune
from snp_llm.checkpoint import output
from snp_llm.models.size import model_size
from snp_llm.report import card as model_cards
from snp_llm.report import facts, rows
from tests.conftest import small_opt, small_recipe


@pytest.fixture
def run(tokenizer):
    dense = small_opt()
    pruned = prune(
        dense, tokenizer, small_recipe(model="user/small", sparsity=0.3, eval_dataset="wikitext2", dampening=0.01)
    )
    sizes = [model_size(m, 32) for m in (dense, pruned.model)]
    before, after = (facts.Measured(s, s.bytes, p, 100.0) for s, p in zip(sizes, (50.0, 55.5), strict=True))
    more = {"command": "snp-llm prune user/small", "evaluation": "wikitext2 (test), 3 windows of 32 tokens"}
    return pruned, before, after, facts.build_report(pruned, before, after, more)


def test_report_holds_what_is_needed_to_repeat_the_run(run, tmp_path):
    pruned, before, _, summary = run
    facts.write_report(summary, tmp_path)
    read = json.loads((tmp_path / output.REPORT).read_text())
    assert read["recipe"]["seq_len"] == 32 and read["recipe"]["calibration"] == "bundled" and read["seed"] == 0
    assert read["calibration"]["sha256"] == pruned.calibration.digest
    assert set(read["versions"]) == {"python", "torch", "transformers"}
    removed = sum(
        (s["units_before"] - s["units_after"]) * r.site.cost for s, r in zip(read["sites"], pruned.sites, strict=True)
    )
    assert read["sparsity"]["achieved"] == pytest.approx(removed / before.size.block_linear)
    assert read["dense"]["size"]["block_linear"] - read["pruned"]["size"]["block_linear"] == removed
    for site in read["sites"]:
        assert site["units_after"] == len(site["kept"]) and 0 <= site["relative_error"] < 1
        assert site["relative_error"] == pytest.approx(site["predicted_error"], rel=0.2, abs=1e-6)


def test_card_front_matter_is_yaml_that_the_hub_understands(run):
    card = model_cards.model_card(run[3], "user/small", model_type="snp_opt", has_code=True)
    _, front, text = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == "user/small" and data["library_name"] == "transformers"
    assert {"snp-llm", "pruned", "custom_code"} <= set(data["tags"])
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["type"] == "perplexity" and result["metrics"][0]["value"] == 55.5
    assert result["dataset"]["type"] == "wikitext2"
    assert "trust_remote_code=True" in text and "snp-llm prune user/small" in text
    assert "not in engines with models of their own, such as vLLM" in text


def test_card_of_a_local_plain_model(run):
    card = model_cards.model_card(run[3], None, model_type="opt", has_code=False)
    assert "base_model" not in card and "trust_remote_code" not in card and "custom_code" not in card
    assert "other engine that reads `opt` checkpoints" in card


def test_closing_table_has_both_models_side_by_side(run):
    pruned, before, after, _ = run
    console = Console(width=100)
    with console.capture() as capture:
        console.print(rows.closing_table(before, after, pruned))
    text = capture.get()
    for name in (
        "parameters",
        "size on disk",
        "FLOPs a token",
        "perplexity",
        "tokens a second",
        "ordering",
        "factorisation",
        "reconstruction",
        "surgery",
    ):
        assert name in text
    assert "50.00" in text and "55.50" in text and "1.110" in text
