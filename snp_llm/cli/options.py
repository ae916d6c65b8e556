"""A command's options in groups, those that most people need first, as tyro shows and parses them. Runs nothing."""

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

import docstring_parser
import tyro

from snp_llm.recipe.checks import flag, kinds_of
from snp_llm.recipe.commands import Talk
from snp_llm.recipe.groups import GROUPS
from snp_llm.recipe.recipe import Recipe

T = TypeVar("T")

FIRST = (
    *("output", "sparsity", "layout", "calibration", "num_samples", "seq_len", "device", "eval_dataset"),
    *("resume", "dry_run"),
)

_annotate: Any = Annotated  # types that are known when the program runs

METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}

ConfigFile = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="FILE",
        help="Recipe file, YAML, to start from; options given here override what it says.",
        help_behavior_hint="",
    ),
]

# What tyro says of a wrong argument, and the same in the words of this program.
SAYINGS = (
    (r"Unrecognized options: (.*)", r"expected no further argument, got \1."),
    (r"Missing from \S+ \S+: (--\S+) .*", r"expected \1, got none."),
    (r"Missing from \S+ \S+: (.*?) [A-Z][a-z].*", r"expected \1, got none."),
    (r"Missing value for argument '[\w-]+\.(\S+)'.*", r"expected \1, got none."),
    (r"Missing value for argument '(\S+)'.*", r"\1: expected a value, got none."),
    (
        r"(?:Invalid choice )?invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*?),?\).*",
        r"\2: expected one of \3, got '\1'.",
    ),
    (r"Error parsing (\S+?): .*? from \['(.*?)'\]\..*", r"\1: expected {}, got '\2'."),
    (r"Error parsing (\S+?): could not convert string to float: (.*?) .*", r"\1: expected {}, got \2."),
    (r"Error parsing (\S+?): invalid literal for int.*?: (.*?) .*", r"\1: expected {}, got \2."),
)


@cache
def groups_of(kind: Any) -> dict[str, type]:
    """By their names, groups of a recipe's settings as dataclasses, in the order in which help shows them."""
    names = [f.name for f in fields(kind)]
    chosen: dict[str, Sequence[str]] = {"command": names}
    if kind is Recipe:
        chosen = {"most used": [n for n in names if n in ("model", *FIRST)]}
        chosen |= {group: [n for n in inside if n not in chosen["most used"]] for group, inside in GROUPS.items()}
    chosen["talk"] = [f.name for f in fields(Talk)]
    return {group: _group(Talk if group == "talk" else kind, group, inside) for group, inside in chosen.items()}


def _group(kind: type, group: str, names: Sequence[str]) -> type:
    hints, by_name = get_type_hints(kind, include_extras=True), {f.name: f for f in fields(kind)}
    described = docstring_parser.parse_from_object(kind).params
    said = {p.arg_name: " ".join((p.description or "").split()) for p in described}
    parts: list[Any] = []
    for name in names:
        default, kinds = by_name[name].default, kinds_of(kind)[name]
        own = [m.metavar for m in getattr(hints[name], "__metadata__", ()) if getattr(m, "metavar", None)]
        usual = next((METAVARS[k] for k in kinds if k in METAVARS), None)
        hint = "" if "efault: " in said[name] else _hint(default)
        named = flag(name)[2:] if name.endswith("_") else None
        shown = own[0] if own else usual
        options = tyro.conf.arg(name=named, metavar=shown, help=said[name], help_behavior_hint=hint)
        annotated = _annotate[hints[name], options]
        parts.append((name, annotated) if default is MISSING else (name, annotated, field(default=default)))
    return make_dataclass(group.replace(" ", "_"), parts, frozen=True, namespace={"__doc__": ""})


def _hint(default: Any) -> str:
    """What help says of a default: nothing where it is nothing."""
    if default is MISSING or default is None or default is False:
        return ""
    words = " ".join(map(str, default)) if isinstance(default, tuple) else "yes" if default is True else default
    return f"Default: {words}."


def command_of(kind: type) -> type:
    """A command's groups as fields of one dataclass, and the recipe file where there may be one."""
    flat: Any = tyro.conf.OmitArgPrefixes
    parts: list[Any] = [(name.replace(" ", "_"), flat[group]) for name, group in groups_of(kind).items()]
    if kind is Recipe:
        parts.append(("config", ConfigFile, None))
    return make_dataclass(kind.__name__, parts, namespace={"__doc__": kind.__doc__})


def filled(kind: type, recipe: Any, file: str) -> Any:
    """A command whose defaults are a recipe's from a file."""
    values = {**vars(recipe), **vars(Talk())}
    groups = {
        name.replace(" ", "_"): group(**{f.name: values[f.name] for f in fields(group)})
        for name, group in groups_of(kind).items()
    }
    return command_of(kind)(**groups, config=file)


def taken_apart(kind: Callable[..., T], parsed: Any) -> tuple[T, Talk]:
    """The recipe and the talk in a parsed command.

    Raises:
        SnpError: settings that cannot be.
    """
    values: dict[str, Any] = {}
    for name in groups_of(kind):
        values |= vars(getattr(parsed, name.replace(" ", "_")))
    talk = Talk(**{f.name: values.pop(f.name) for f in fields(Talk)})
    return kind(**values), talk


def in_words(text: str, kind: type, arguments: Sequence[str]) -> str:
    """What tyro says of wrong arguments, in one sentence: of an option that there is not, whatever else it leads to."""
    known = [flag(f.name) for group in groups_of(kind).values() for f in fields(group)] + ["--config", "--help"]
    for word in (word.split("=")[0].replace("_", "-") for word in arguments if word.startswith("--")):
        if word != "--" and f"--{word.removeprefix('--no-')}" not in known and word not in known:
            near = get_close_matches(word, [*known, *(f"--no-{name[2:]}" for name in known)], n=1)
            return f"unknown option {word}.{f' Did you mean {near[0]}?' if near else ''}"
    text = text.split(" For full helptext")[0]
    for pattern, words in SAYINGS:
        if (found := re.fullmatch(pattern, text)) is not None:
            name = found[1].removeprefix("--").replace("-", "_") if "{}" in words else ""
            kinds = kinds_of(kind).get(name, ())
            expected = " or ".join({int: "an integer", float: "a number"}.get(k, "") for k in kinds if k in METAVARS)
            return found.expand(words.replace("{}", expected or "a value")).replace("'", "")
    return text
