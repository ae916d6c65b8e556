"""Writes docs/checked_types.md from what a run of the tests has said of every type:

    python -m pytest -m "" tests/flow/test_every_family.py tests/flow/test_hybrids.py tests/flow/test_multimodal.py \\
        tests/flow/test_checkpoint.py --junitxml results.xml
    python docs/checked_types.py results.xml

A mark is a test that ran and passed; what was skipped has none, but its reason.
"""

import platform
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import torch
import transformers

from snp_llm.models.families.decoders import FAMILIES, WRAPPERS
from snp_llm.runtime.version import __version__

PAGE = Path(__file__).with_name("checked_types.md")
# By column: tests of dense types, of those whose blocks differ, and of wrappers, and what has to be in a case's name.
FAMILY, HYBRID, WRAPPER = (f"tests.flow.test_{name}." for name in ("every_family", "hybrids", "multimodal"))
ZERO = "test_sparsity_zero_is_the_dense_model_to_the_bit"
ZEROED = "test_pruned_equals_dense_with_those_units_zeroed"
PADDED = "test_padding_back_gives_the_dense_shape_and_the_same_function"
CACHE = "test_generation_with_a_cache_equals_"
AGAIN = "test_a_pruned_model_is_an_input_like_any_other"
COLUMNS = {
    "sparsity 0": (FAMILY + ZERO, HYBRID + ZERO, WRAPPER + ZERO),
    "zeroed": (FAMILY + ZEROED, HYBRID + ZEROED, WRAPPER + ZEROED),
    "uniform": (
        FAMILY + "test_the_uniform_layout_is_a_plain_config",
        *(f"{place}{ZEROED} uniform" for place in (FAMILY, HYBRID, WRAPPER)),
    ),
    "padded": (FAMILY + PADDED, HYBRID + PADDED, f"{WRAPPER}{ZEROED} padded"),
    "fresh process": (
        "tests.flow.test_checkpoint.test_every_family_and_layout_reloads",
        HYBRID + "test_a_fresh_process_reads",
        WRAPPER + "test_a_fresh_process_loads",
    ),
    "cache": (FAMILY + CACHE, HYBRID + CACHE, WRAPPER + CACHE),
    "padding": (
        FAMILY + "test_padding_and_batch_do_not_change_logits",
        HYBRID + "test_padding_moves_no_more",
        WRAPPER + "test_padding_and_batch_do_not_change_logits",
    ),
    "again": (FAMILY + AGAIN, HYBRID + AGAIN, WRAPPER + AGAIN),
}
TEXT = """# Checked types

What every type in the table of [families](families.md) has passed, from a small random model of it. A mark is a test
that ran and passed; this page is written from its results by `docs/checked_types.py`, which says how to repeat it.

| column | |
|---|---|
| sparsity 0 | gives the dense model's logits to the bit, in all three layouts; of wrappers with an image and without |
| zeroed | a pruned model computes what the dense one does with those units zeroed and the out-projections repaired |
| uniform | so does one whose widths are alike and stand in a plain config |
| padded | so does one that is filled up with zeros, and has the dense model's shapes |
| fresh process | a process without this package loads compact and uniform folders and computes the same |
| cache | generation with a cache is that without; of wrappers after a text with an image |
| padding | a text beside a longer one has the logits that it has alone |
| again | the pruned model is pruned again |

"""


@dataclass
class Case:
    """Cases of tests that are about a type.

    Attributes:
        passed, failed: how many.
        reasons: why others were skipped.
    """

    passed: int = 0
    failed: int = 0
    reasons: list[str] = field(default_factory=list)

    def mark(self) -> str:
        """A mark, or why there is none."""
        return "✓" if self.passed and not self.failed else "failed" if self.failed else "; ".join(set(self.reasons))


def read(results: Sequence[ElementTree.ElementTree]) -> dict[str, dict[str, Case]]:
    """Cases by column and type, of the results of runs as pytest writes them for JUnit; the last of a test counts."""
    types = [family.model_type for family in (*FAMILIES, *WRAPPERS)]
    found: dict[str, dict[str, Case]] = {column: defaultdict(Case) for column in COLUMNS}
    last = {f"{case.get('classname')}.{case.get('name')}": case for run in results for case in run.iter("testcase")}
    for test_name, case in last.items():
        name, _, words = test_name.rstrip("]").partition("[")
        about = {p.get("value", "") for p in case.iter("property") if p.get("name") == "model_type"}
        about |= {kind for kind in types if f"-{kind}-" in f"-{words}-"}
        for column, tests in COLUMNS.items():
            for test, _, part in (wanted.partition(" ") for wanted in tests):
                if not name.startswith(test) or part not in ("", *words.split("-")):
                    continue
                for kind in about:
                    skipped = case.find("skipped")
                    if skipped is not None:
                        found[column][kind].reasons.append(skipped.get("message", ""))
                    elif case.find("failure") is not None or case.find("error") is not None:
                        found[column][kind].failed += 1
                    else:
                        found[column][kind].passed += 1
    return found


def page(results: Sequence[ElementTree.ElementTree]) -> str:
    """The page, in Markdown."""
    found, text, notes = read(results), TEXT, dict[str, int]()
    date = max(suite.get("timestamp", "").partition("T")[0] for run in results for suite in run.iter("testsuite"))
    titles = {"dense": "Dense", "hybrid": "Hybrids", "MLA": "Latent attention", "mixture": "Mixtures of experts"}
    for kind, title in {**titles, "wrapper": "Wrappers"}.items():
        families = [family for family in (*FAMILIES, *WRAPPERS) if family.kind == kind]
        full = sum(all(found[column][f.model_type].mark() for column in COLUMNS) for f in families)
        text += f"## {title}\n\n{len(families)} types; {full} of them with an entry in every column.\n\n"
        text += f"| model_type | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}\n"
        for family in families:
            marks = [found[column][family.model_type].mark() for column in COLUMNS]
            short = [m if m in ("✓", "failed", "") else f"({notes.setdefault(m, len(notes) + 1)})" for m in marks]
            text += f"| {family.model_type} | {' | '.join(short)} |\n"
        text += "\n"
    for reason, number in notes.items():
        text += f"({number}) {reason}\n\n"
    text += (
        f"{date}: snp-llm {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, CPU.\n"
    )
    return text


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    PAGE.write_text(page([ElementTree.parse(file) for file in sys.argv[1:]]))
