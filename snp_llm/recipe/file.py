"""Recipes as YAML files: read with every mistake named, written beside the weights. Knows no models."""

from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from snp_llm.recipe.checks import LONGEST_NAME, described, fits, kinds_of, meant
from snp_llm.recipe.groups import ONCE
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.errors import SnpError, reason, shown
from snp_llm.runtime.version import __version__

RENAMED = {"target": ("reference",), "target_weight": ("reference_weight",)}  # what files of before may say

LONGEST_FILE = 100_000  # bytes; all settings take about two thousand

NODES = {yaml.MappingNode: "a mapping", yaml.SequenceNode: "a list"}


def load_recipe(path: Path | str) -> Recipe:
    """The recipe in a file.

    Args:
        path: YAML, one `name: value` a line; names are those of `Recipe`, what is left out has its default. Paths in it
            are relative to the working directory, as on the command line.

    Raises:
        SnpError: as `read_settings`; no model; values that are out of range or contradict each other.
    """
    settings = read_settings(path)
    if "model" not in settings:
        raise SnpError(f"recipe {path}: expected a model, got none. Add `model: NAME`.")
    return build_recipe(path, settings)


def build_recipe(path: Path | str, settings: dict[str, Any]) -> Recipe:
    """A recipe of settings from a file, which errors then name."""
    try:
        return Recipe(**settings)
    except SnpError as error:
        raise SnpError(f"recipe {path}: {error}") from error


def read_settings(path: Path | str) -> dict[str, Any]:
    """What a recipe file sets, each value of its setting's type.

    Values are read one by one, and only where they are single ones: what lists, references to them (which a few hundred
    bytes are enough to make millions of) or objects would hold is never built.

    Raises:
        SnpError: no file, not YAML, not a mapping; an unknown or repeated name, a value of another type; permission to
            run a repository's code, which only the person at the command line can give.
    """
    where = f"recipe {path}"
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: no name at all
        raise SnpError(f"{where}: cannot be read ({reason(error)}).") from error
    if len(data) > LONGEST_FILE:
        raise SnpError(f"{where}: expected settings in at most {LONGEST_FILE:,} bytes, got more.")
    try:
        node = yaml.compose(data, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SnpError(f"{where}: is not YAML: {reason(error)[:300]}.") from error
    if node is None or node.tag == "tag:yaml.org,2002:null":
        raise SnpError(f"{where}: is empty; expected settings, one `name: value` a line.")
    if not isinstance(node, yaml.MappingNode):
        got = NODES.get(type(node)) or shown(node.value)
        raise SnpError(f"{where}: expected settings, one `name: value` a line, got {got}.")
    settings: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = key.value if isinstance(key, yaml.ScalarNode) else NODES[type(key)], key.start_mark.line + 1
        if name in lines:
            raise SnpError(f"{where}, line {line}: {name}: expected once, stands in line {lines[name]} already.")
        lines[name] = line
        settings[name] = _checked(f"{where}, line {line}", name, value)
    return settings


def unknown(name: str) -> str:
    """What to say of a name that no setting has."""
    names = [field.name for field in fields(Recipe)]
    found = RENAMED.get(name) or get_close_matches(name[:LONGEST_NAME].replace("-", "_"), names, n=1)
    hint = f" Did you mean {found[0]!r}?" if found else " `snp-llm prune --help` lists them, with dashes."
    return f"{shown(name)}: expected a setting's name, got an unknown one.{hint}"


def save_recipe(recipe: Recipe, path: Path | str, command: str | None = None) -> None:
    """Writes all settings but those of `ONCE`, under a comment that says where they come from.

    Args:
        recipe: as `prune` resolved it, for a file that makes the same model again.
        command: that was run.
    """
    remarks = [
        f"Written by snp-llm {__version__}" + (f" for: {command}" if command else "."),
        "The same model again: snp-llm prune --config THIS_FILE --output FOLDER",
        f"Not kept, to be said anew: {', '.join(ONCE)}.",
    ]
    # A line break in an argument would otherwise end the comment.
    comment = "".join(f"# {''.join(c if c.isprintable() else ascii(c)[1:-1] for c in line)}\n" for line in remarks)
    settings = {name: value for name, value in asdict(recipe).items() if name not in ONCE}
    Path(path).write_text(comment + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _checked(where: str, name: str, node: yaml.Node) -> Any:
    """The value of a node, if it is one that the setting may have."""
    if name not in kinds_of(Recipe):
        raise SnpError(f"{where}: {unknown(name)}")
    kinds = kinds_of(Recipe)[name]
    expected = described(kinds)
    if not isinstance(node, yaml.ScalarNode):
        raise SnpError(f"{where}: {name}: expected {expected}, got {NODES[type(node)]}.")
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of odd dates and tags
        raise SnpError(
            f"{where}: {name}: expected {expected}, got {shown(node.value)} ({reason(error)[:200]})."
        ) from error
    if name == "trust_remote_code" and value is True:
        raise SnpError(
            f"{where}: trust_remote_code: expected false, got true. Whether code of a repository may run is said on "
            "the command line: --trust-remote-code."
        )
    if any(fits(value, kind) for kind in kinds):
        return value
    raise SnpError(f"{where}: {name}: expected {expected}, got {shown(value)}.{_remedy(value, kinds)}")


def _remedy(value: Any, kinds: tuple[Any, ...]) -> str:
    """What to do about a value of a wrong type, where that can be told."""
    if question := meant(value, kinds):
        return question
    if str in kinds:
        return " Put it in quotes."
    if float in kinds and isinstance(value, str):
        try:  # 1e-2 is text to YAML 1.1, and 1.0e-2 a number
            return f" Write {yaml.safe_dump(float(value)).split()[0]}, without quotes."
        except ValueError:
            pass
    return ""
