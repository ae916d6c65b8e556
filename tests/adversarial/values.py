"""Values that a JSON or YAML file may hold where another one is expected."""

import copy
import random
from collections.abc import Iterator
from typing import Any

MISSING = object()
CODE = "evil/repo--evil.Model"
NAMING = {
    "auto_map": {"AutoConfig": CODE, "AutoModelForCausalLM": CODE, "AutoTokenizer": [None, CODE]},
    "custom_pipelines": {"text-generation": {"impl": CODE, "pt": ["AutoModelForCausalLM"]}},
    "custom_generate": CODE,
    "kernel_config": {"impl": CODE},
    "tokenizer_class": "EvilTokenizer",
    "some_loader": CODE,
    "hooks": [CODE],
}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, -(2**63), 10**400, 0.0, 0.5, -0.5, 1e-30, 1e308),
    *(float("nan"), float("inf"), float("-inf"), "", "text", "16", "nan", "../../etc/passwd", "\ud800", "a\nb", "\x00"),
    *(
        [],
        [1],
        [None],
        ["full_attention"],
        [[]],
        {},
        {"a": 1},
        {"": None},
        {"rope_type": "yarn"},
        nested(50),
        "x" * 9999,
    ),
    MISSING,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value in one place, or without it."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if new is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def near(generator: random.Random, value: Any) -> Any:
    """Another value, often of the same kind and not far from this one, so that not all are refused for their type."""
    kind = generator.randrange(4)
    if kind == 0 or not isinstance(value, int | float | str) or isinstance(value, bool):
        return generator.choice(ODD)
    if isinstance(value, str):
        return generator.choice((value[:-1], value + "x", value.upper(), value + "\n", value * 2, f" {value}"))
    return generator.choice((value + 1, value - 1, value * 2, value // 2, -value, value * 1.0, value + 0.5, str(value)))


def damaged(generator: random.Random, content: bytes) -> tuple[str, bytes]:
    """A file's content as no JSON or another one, and what was done to it."""
    at = generator.randrange(len(content))
    name, new = generator.choice(
        (
            ("cut off", content[:at]),
            ("empty", b""),
            ("a byte gone", content[:at] + content[at + 1 :]),
            ("a flipped bit", content[:at] + bytes([content[at] ^ 1 << generator.randrange(8)]) + content[at + 1 :]),
            ("a NUL", content[:at] + b"\0" + content[at:]),
            ("not UTF-8", content[:at] + b"\xff\xfe" + content[at:]),
            ("UTF-16", content.decode(errors="replace").encode("utf-16")),
            ("with a BOM", b"\xef\xbb\xbf" + content),
            ("deep", b"[" * 100_000),
            ("deep objects", b'{"a":' * 100_000),
            ("a list", b"[1, 2]"),
            ("a number", b"1"),
            ("null", b"null"),
            ("an empty object", b"{}"),
            ("spaces after it", content + b"  \n\n"),
            ("twice", content + content),
            ("random", generator.randbytes(200)),
        )
    )
    return f"{name} at {at}", new
