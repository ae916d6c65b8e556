"""`snp-llm families`, and the page that is made of it."""

import json
import runpy
from pathlib import Path

from snp_llm.cli.parse import families_main
from snp_llm.models.families.decoders import FAMILIES, WRAPPERS
from tests.families import FAMILY_CONFIGS

DOCS = Path(__file__).parents[2] / "docs"


def test_every_family_is_listed_with_what_can_go(capsys):
    assert families_main(["--json"]) == 0
    facts = {fact["model_type"]: fact for fact in json.loads(capsys.readouterr().out)["families"]}
    assert list(facts) == [family.model_type for family in (*FAMILIES, *WRAPPERS)]
    assert facts["llama"]["head_units"] == ["KV groups", "query heads"] and facts["gptj"]["head_units"] == ["heads"]
    assert facts["bloom"]["heads_stay"] == "its ALiBi slopes belong to the number of heads"
    assert facts["bloom"]["layouts"] == {"compact": True, "uniform_ffn": "", "uniform_heads": ""}
    assert facts["bloom"]["engines"] == [] and facts["qwen2"]["head_engines"] == ["transformers"]
    assert [facts[name]["layouts"]["uniform_heads"] for name in ("mistral", "llama", "arcee", "opt")] == [
        "any",
        "any, some as Mistral",
        "divisors of the hidden size",
        "",
    ]
    assert facts["deepseek_v3"]["head_units"] == ["heads"] and facts["deepseek_v3"]["stays"] == "experts"
    assert facts["qwen3_5"]["kind"] == "wrapper" and facts["qwen3_5"]["stays"] == "towers, gated delta nets"
    assert facts["gemma3"]["engines"] == ["transformers"] != facts["gemma3_text"]["engines"]


def test_the_table_says_it_in_words(capsys):
    assert families_main([]) == 0
    printed = capsys.readouterr().out
    for words in ("GPT-NeoX / Pythia", "stay: a norm over all of them", "with fewer heads", "gated delta nets"):
        assert words in printed


def test_every_type_has_been_through_every_check():
    """By the page that a run of all the tests has left; what is skipped for a reason is counted beside it."""
    rows = [line.strip("| \n").split(" | ") for line in (DOCS / "checked_types.md").read_text().splitlines()]
    marks = {row[0]: row[1:] for row in rows if len(row) == 9 and row[0] != "model_type"}
    assert set(marks) == {family.model_type for family in (*FAMILIES, *WRAPPERS)}, "docs/checked_types.py says how"
    assert all(mark == "✓" or mark.startswith("(") for row in marks.values() for mark in row)
    for kind, least in {"hybrid": 8, "MLA": 3, "wrapper": 6}.items():
        assert sum(family.kind == kind for family in (*FAMILIES, *WRAPPERS)) >= least
    assert len(FAMILY_CONFIGS) >= 60  # dense, some of which may have experts or blocks that differ as well
    assert all(row[0] == row[1] == row[3] == row[4] == row[7] == "✓" for row in marks.values())


def test_the_page_is_what_the_table_gives():
    page = runpy.run_path(str(DOCS / "family_table.py"))["page"]
    assert (DOCS / "families.md").read_text() == page(), "python docs/family_table.py writes it anew"
