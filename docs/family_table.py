"""Writes docs/families.md: `python docs/family_table.py`. A test holds that it is what the table of families gives."""

from pathlib import Path

import transformers

from snp_llm.cli.families import COLUMNS, families, family_row

PAGE = Path(__file__).with_name("families.md")
TEXT = """# Families

Types of models that the tests are run on, as `snp-llm families` lists them; `config.model_type` counts, never a model's
name. [Checked types](checked_types.md) says which checks each has passed.

Heads go one by one, as KV groups with all their query heads, or as query heads evenly from every group, where they do
not stay. FFN channels go wherever blocks have an FFN that is dense, or experts that all tokens share. Of hybrids and
mixtures the other parts of blocks stay as they are, and of wrappers the towers; a run names them. `--layout compact`
writes whatever comes out and loads in transformers; `--layout uniform` writes a plain config where the columns say that
it can hold other widths, of heads as many as its class accepts. The last column is what loads that.

"""
AFTER = """
A decoder of another type is pruned as well where its blocks look like one of these: its attention and FFN are told by
the names and shapes of their projections, a cut of each is tried first, and a remark says so. So is one of what
is not dense. [Adding a model family](adding_a_family.md) is one line in this table and one in the tests.
"""


def page() -> str:
    """The page, in Markdown."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(family_row(fact) for fact in families())]
    return TEXT + "".join(f"| {' | '.join(row)} |\n" for row in rows) + AFTER


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page())
