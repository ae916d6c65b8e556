import json

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from snp_llm import Recipe, prune
from snp_llm.checkpoint import contents
from snp_llm.checkpoint.base_card import inherited
from snp_llm.models.size import model_size
from snp_llm.report import card as model_cards
from snp_llm.report import facts, rows, words
from snp_llm.report.limits import limits
from snp_llm.report.results import dataset_of
from snp_llm.report.words import asked, percent
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
    read = json.loads((tmp_path / contents.REPORT).read_text())
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
    origin = model_cards.Origin("user/small", {"license": "mit", "language": ["en"]})
    card = model_cards.model_card(run[3], origin, model_type="snp_opt", has_code=True)
    _, front, text = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["base_model"] == "user/small" and data["library_name"] == "transformers"
    assert {"snp-llm", "pruned", "custom_code"} <= set(data["tags"])
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["type"] == "perplexity" and result["metrics"][0]["value"] == 55.5
    assert result["dataset"]["type"] == "Salesforce/wikitext"
    assert result["dataset"]["config"] == "wikitext-2-raw-v1"
    assert data["pipeline_tag"] == "text-generation" and data["metrics"] == ["perplexity"]
    assert result["task"] == {"type": "text-generation", "name": "Text Generation"}
    assert data["license"] == "mit" and data["language"] == ["en"]
    assert "2405.17506" in text and "model.generate(" in text and "## Limits" in text
    assert "trust_remote_code=True" in text and "snp-llm prune user/small" in text
    assert "in vLLM where the package snp-llm is installed too" in text


def test_what_is_measured_later_joins_the_results_in_the_card(run, tmp_path):
    """As the Hub's own reader finds them: the task, the data and the figure of each, once."""
    report = {
        **run[3],
        "perplexities": [{"text": "c4 (validation), 2 windows of 32 tokens", "sha256": "", "perplexity": 60.0}],
        "tasks": {"piqa": {"acc": 0.5, "acc_stderr": 0.1, "acc_norm": 0.6, "samples": 6, "num_fewshot": 0}},
    }
    card = model_cards.model_card(run[3], model_cards.Origin(), model_type="opt", has_code=False)
    (tmp_path / "README.md").write_text(card)
    for _again in range(2):
        model_cards.refresh_card(report, tmp_path)
    read = ModelCard.load(tmp_path / "README.md")
    found = {(r.dataset_type, r.metric_type): r for r in read.data.eval_results}
    assert {of: r.metric_value for of, r in found.items()} == {
        ("Salesforce/wikitext", "perplexity"): 55.5,
        ("allenai/c4", "perplexity"): 60.0,
        ("piqa", "accuracy"): 0.5,
        ("piqa", "acc_norm"): 0.6,
    }
    assert {r.task_name for r in found.values()} == {"Text Generation"}
    assert found["piqa", "accuracy"].dataset_args == {"samples": 6, "num_fewshot": 0}
    assert read.data.metrics == ["perplexity", "accuracy", "acc_norm"] and read.text.count("| piqa | acc_norm |") == 1
    before, _, after = read.text.partition("<!-- Evaluation -->")
    assert before.strip() == ModelCard(card).text.strip() and after.strip().endswith("<!-- end of Evaluation -->")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("c4", ("allenai/c4", "en")),
        ("user/texts:small", ("user/texts", "small")),
        ("user/texts", ("user/texts", None)),
        *((name, None) for name in ("bundled", "notes.txt", "/home/me/notes.txt", "./me/texts", "my/notes.jsonl")),
        ("data of the program", None),
        ("wikitext2,notes.txt=0.5", None),
    ],
)
def test_datasets_that_the_hub_knows(name, expected):
    assert dataset_of(name) == expected


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        (
            "---\nlicense: other\nlicense_name: mine\nlanguage: [en, de]\ntags: [x]\n---\n# A",
            ["other", "mine", ["en", "de"]],
        ),
        ("---\nlicense: [1]\nlanguage: {}\n---\n", []),
        ("# no front matter\n---\nlicense: mit\n---\n", []),
        ("---\n: : :\n", []),
    ],
)
def test_a_base_card_gives_license_and_languages(card, expected, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert [*inherited(str(tmp_path)).values()] == expected
    assert inherited(str(tmp_path / "nowhere")) == {}


def test_card_of_a_local_plain_model(run):
    card = model_cards.model_card(run[3], model_cards.Origin(), model_type="opt", has_code=False)
    assert "base_model" not in card and "trust_remote_code" not in card and "custom_code" not in card
    assert "other engine that reads `opt` checkpoints" in card


def test_closing_table_has_both_models_side_by_side(run):
    console = Console(width=100)
    with console.capture() as capture:
        console.print(rows.closing_table(run[3]))
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


@pytest.mark.parametrize(
    ("goal", "ratio", "said"),
    [
        ("0.8x", (1.25, 1.0, 1.6), "was too noisy to say"),
        ("0.8x", (1.25, 1.2, 1.28), "took 0.80 (0.78 to 0.83) of the dense model's time"),
        ("12ms", (1.25, 1.2, 1.28), "took 16 ms"),
        (None, (1.25, 1.2, 1.28), None),
    ],
)
def test_what_came_of_a_latency_is_said(goal, ratio, said, run):
    recipe = {**run[3]["recipe"], "target_latency": goal, "seq_len": 32}
    speed_up = dict(zip(("ratio", "low", "high"), ratio, strict=True))
    report = {**run[3], "recipe": recipe, "speed_up": speed_up, "pruned": {**run[3]["pruned"], "speed": 2000.0}}
    of = f"--target-latency {goal}: measured afterwards, a window of 32 tokens "
    assert words.latency_line(report) == (None if said is None else of + said)
    assert [line for line in words.said_of(report) if "latency" in line] == ([] if said is None else [f"{of}{said}."])


def test_terminal_and_card_show_the_same_rows(run):
    card = model_cards.model_card(run[3], model_cards.Origin(), model_type="opt", has_code=False)
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.splitlines() if line[:1] == "|"]
    columns = [[*column.cells] for column in rows.closing_table(run[3]).columns]
    assert table[2:] == [[*row] for row in zip(*columns, strict=True)][: len(table) - 2]
    assert [row[0] for row in table[2:]] == [
        *("parameters", "block-linear parameters", "attention heads", "FFN channels", "size on disk, MB"),
        *("MFLOPs a token", "perplexity", "prefill, tokens a second"),
    ]


def test_figures_are_those_of_the_cut_model(run):
    pruned, before, _, report = run
    found = {row.name: (row.dense, row.pruned, row.ratio) for row in rows.summary(report)}
    kept = {kind: [r for r in pruned.sites if r.site.kind == kind] for kind in ("attention", "ffn")}
    for name, dense, now in (
        ("parameters", before.size.parameters, sum(p.numel() for p in pruned.model.parameters())),
        ("attention heads", *(sum(f(r).query for r in kept["attention"]) for f in (heads_of, heads_left))),
        ("FFN channels", sum(r.site.units for r in kept["ffn"]), sum(len(r.kept) for r in kept["ffn"])),
    ):
        assert found[name] == (f"{dense:,}", f"{now:,}", f"{now / dense:.3f}"), name


def heads_of(result):
    return result.site.heads


def heads_left(result):
    return result.site.heads_after(len(result.kept))


@pytest.mark.parametrize(
    ("settings", "said", "in_percent"),
    [
        ({}, "0.3", "30 %"),
        ({"sparsity": 0.125}, "0.125", "12.5 %"),
        ({"ffn_sparsity": 0.5}, "0.3 of attention and 0.5 of FFN", "30 % of attention and 50 % of FFN"),
        ({"sparsity": 0.2, "head_sparsity": 0.0}, "0 of attention and 0.2 of FFN", "0 % of attention and 20 % of FFN"),
        ({"target_size": "2GB"}, "--target-size 2GB", "--target-size 2GB"),
        ({"max_perplexity_increase": "5%"}, "--max-perplexity-increase 5%", "--max-perplexity-increase 5%"),
    ],
)
def test_what_was_asked_for(settings, said, in_percent):
    recipe = Recipe(model="m", **settings)
    assert asked(recipe.as_dict()) == said and asked(recipe.as_dict(), percent) == in_percent
    assert asked({name: value for name, value in recipe.as_dict().items() if value is not None}) == said


def lost(site, kind, before, after, unit="channels"):
    return {"site": site, "kind": kind, "unit": unit, "units_before": before, "units_after": after}


@pytest.mark.parametrize(
    "sites, said",
    [
        ([("block 0 a", "attention", 4, 3), ("block 0 f", "ffn", 64, 32)], "FFN neurons and attention heads"),
        ([("block 0 a", "attention", 4, 4), ("block 0 f", "ffn", 64, 32)], "FFN neurons"),
        ([("block 0", "block", 1, 0), ("block 0 a", "attention", 4, 0), ("block 0 f", "ffn", 64, 0)], "blocks"),
        ([("block 1", "block", 1, 1), ("block 1 a", "attention", 4, 0), ("block 1 f", "ffn", 64, 64)], "attentions"),
        (
            [
                ("block 1", "block", 1, 0),
                ("block 1 f", "ffn", 64, 0),
                ("block 2 f", "ffn", 64, 0),
                ("block 10 f", "ffn", 64, 8),
            ],
            "blocks, FFNs and FFN neurons",
        ),
        (
            [
                ("block 0 e", "experts", 8, 6, "experts"),
                ("block 0 c", "experts", 64, 32),
                ("block 0 a", "attention", 4, 4),
            ],
            "experts and channels of experts",
        ),
        ([("block 0 a", "attention", 4, 4), ("block 0 f", "ffn", 64, 64)], "FFN neurons and attention heads"),
        ([("stage 0 conv", "convolution", 64, 32)], "channels"),
    ],
)
def test_what_went_is_what_lost_something(sites, said):
    assert rows.what_went({"sites": [lost(*site) for site in sites]})[0] == said


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "heads come in whole numbers and FFN widths in multiples of 8."),
        ({"layout": "uniform"}, "heads come in whole numbers and FFN widths in multiples of 8, alike in every block."),
        ({"depth": "only", "layout": "uniform"}, "blocks, attentions and FFNs go as a whole or not at all."),
    ],
)
def test_what_keeps_a_run_from_its_budget_is_said(settings, said, run):
    report = run[-1]
    recipe = {**report["recipe"], "round_to": 8, **settings}
    found = limits({**report, "recipe": recipe, "sparsity": {"target": 0.3, "achieved": 0.375}})
    assert f"30 % were asked for and 37.5 % removed: {said}" in found
