"""Imports go down one list of folders, and never in a circle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import snp_llm

ROOT = Path(snp_llm.__file__).parent
# From the entry down to the ground; a folder imports itself and those after it.
FLOORS = (
    "api",
    "cli",
    "report",
    "engines",
    "recovery",
    "pruning",
    "evaluate",
    "checkpoint",
    "models",
    "data",
    "linalg",
    "recipe",
    "runtime",
)
PROGRAMS = ("__init__", "prune", "evaluate.__main__", "recovery.__main__")  # names for what is inside
ENTRIES = 15  # that one sees in the package's folder


def arrows() -> dict[str, set[str]]:
    """By module, the modules that it imports, wherever in it; without `snp_llm.`."""
    found = {}
    for file in ROOT.rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if name in PROGRAMS:
            continue
        found[name] = targets = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "snp_llm":
                for alias in node.names:
                    inner = [*node.module.split(".")[1:], alias.name]
                    module = inner if ROOT.joinpath(*inner).with_suffix(".py").exists() else inner[:-1]
                    folder = ROOT.joinpath(*module)
                    targets.add(".".join([*module, "__init__"] if folder.is_dir() else module))
    return found


def test_every_folder_is_on_the_list():
    assert {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(FLOORS) - {
        "api"
    }
    shown = [path for path in ROOT.iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(shown) <= ENTRIES, sorted(path.name for path in shown)


def test_the_table_for_contributors_has_every_folder_in_that_order():
    table = re.findall(r"^\|[^|]*\| `(\w+)/` \|", (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert table == list(FLOORS[1:])


def test_imports_go_down():
    seen = 0
    for name, targets in arrows().items():
        for target in targets:
            if target == "__init__":
                continue  # names that it takes from below
            floor, below = FLOORS.index(name.split(".")[0]), FLOORS.index(target.split(".")[0])
            assert below >= floor, f"{name} imports {target}, which is above it"
            seen += 1
    assert seen > 200


def test_no_circle():
    left = arrows()
    while left:
        free = [name for name, targets in left.items() if not (targets - {name}) & left.keys()]
        assert free, f"these import each other: {sorted(left)}"
        for name in free:
            del left[name]


def test_the_function_survives_the_import_of_the_program():
    import snp_llm.prune
    from snp_llm.api import prune

    assert snp_llm.prune is prune
    assert all(getattr(snp_llm, name) is not None for name in snp_llm.__all__)


# In what order people import things. Each is followed by a look whether a pruned config and model are known.
FIRST = (
    "from transformers import AutoModelForCausalLM",
    "from transformers import AutoConfig",
    "from transformers import PreTrainedModel",
    "from transformers import OPTForCausalLM",
    "import transformers; transformers.PreTrainedModel",
    "from transformers import AutoTokenizer, pipeline",
    "from snp_llm import prune",
    "from snp_llm import Recipe, perplexity",
    "import snp_llm.cli.prune",
    "import snp_llm.prune",
    "import snp_llm.checkpoint",
)
KNOWN = (
    "from transformers import AutoConfig, AutoModelForCausalLM; "
    "config = AutoConfig.for_model('snp_opt'); AutoModelForCausalLM._model_mapping[type(config)]"
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("first", FIRST)
def test_pruned_models_are_known_whatever_is_imported_first(first, before):
    code = f"import snp_llm; {first}; {KNOWN}" if before else f"{first}; import snp_llm; {KNOWN}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.returncode == 0, run.stderr[-1000:]
