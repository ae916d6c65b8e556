"""Texts of every ending that hold what nobody reads, or nothing."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest

from snp_llm.cli.parse import evaluate_main
from tests.adversarial.trials import KEEP_ALL

pytestmark = pytest.mark.exhaustive
COUNT = 110
WORDS = [
    "the",
    "model",
    "reads",
    "what",
    "is",
    "written",
    "and",
    "says",
    "what",
    "comes",
    "next",
    "in",
    "a",
    "text",
    "of",
    "many",
    "words",
]
LONG = 300_000  # characters in a line


def sentence(generator, words=60):
    return " ".join(generator.choices(WORDS, k=words))


def plain(generator):
    """The bytes of a text, and what they are."""
    text = "\n".join(sentence(generator) for _ in range(30))
    at = generator.randrange(len(text))
    return generator.choice(
        (
            ("text", text.encode()),
            ("without an end of line", text.rstrip().encode()),
            ("with a BOM", b"\xef\xbb\xbf" + text.encode()),
            ("one long line", (sentence(generator, 100) * (LONG // 500)).encode()),
            ("one long word", b"a" * LONG),
            ("with Windows' line ends", text.replace("\n", "\r\n").encode()),
            ("with odd line ends", text.replace("\n", "\u2028").encode()),
            ("with NULs", text[:at].encode() + b"\0\0\0" + text[at:].encode()),
            ("emoji", "🙂 e\u0301 \u202e تجربة ".encode() * 400),
            ("control characters", bytes(range(1, 32)) * 60),
            ("empty", b""),
            ("a line end", b"\n"),
            ("spaces", b" " * 5000),
            ("a word", b"word"),
            ("UTF-16", text.encode("utf-16")),
            ("Latin-1", b"caf\xe9 " * 400),
            ("cut in a character", text.encode() + "東".encode()[:2]),
            ("half characters", text.encode() + b"\xed\xa0\x80"),
            ("overlong", text.encode() + b"\xc0\xaf"),
            ("random", generator.randbytes(3000)),
        )
    )


def records(generator):
    """Texts as JSON: a record a line, or a list."""
    rows = [{"text": sentence(generator), "number": i} for i in range(30)]
    other = generator.choice((None, 3, 1.5, True, [], ["a"], {"a": 1}, ""))
    place = generator.randrange(30)
    lines = [json.dumps(row) for row in rows]
    with_other = [json.dumps({**row, "text": other}) if i == place else json.dumps(row) for i, row in enumerate(rows)]
    ways = {
        "records": "\n".join(lines) + "\n",
        "without an end of line": "\n".join(lines),
        "a list": json.dumps(rows),
        "a list of texts": json.dumps([row["text"] for row in rows]),
        "an object": json.dumps({"data": rows}),
        "indented": json.dumps(rows, indent=2),
        f"one is {other}": "\n".join(with_other),
        f"all are {other}": "\n".join(json.dumps({"text": other}) for _ in rows),
        "some without the column": "\n".join(json.dumps(row if i % 2 else {"number": i}) for i, row in enumerate(rows)),
        "all without the column": "\n".join(json.dumps({"number": i}) for i in range(30)),
        "another column": "\n".join(json.dumps({"content": row["text"]}) for row in rows),
        "blank lines": "\n\n".join(lines) + "\n\n\n",
        "a broken line": "\n".join([*lines[:place], lines[place][:-5], *lines[place:]]),
        "not JSON": sentence(generator, 2000),
        "empty": "",
        "a line end": "\n",
        "null": "null",
        "nulls": "null\n" * 20,
        "an empty list": "[]",
        "empty objects": "{}\n" * 20,
        "half characters": "\n".join([*lines, '{"text": "\\ud800 half"}']),
        "NaN": "\n".join([*lines, '{"text": NaN}']),
        "deep": "[" * 50_000,
        "a long line": json.dumps({"text": sentence(generator, LONG // 6)}),
        "a name twice": '{"text": "a b c", "text": "' + sentence(generator, 300) + '"}\n',
        "a huge number": "\n".join([*lines, json.dumps({"text": "a", "number": 10**400})]),
    }
    name, text = generator.choice([*ways.items()])
    marked = generator.random() < 0.1
    return name + " with a BOM" * marked, b"\xef\xbb\xbf" * marked + text.encode()


def table(generator, file):
    """Texts as parquet, written to a file."""
    texts = [sentence(generator) for _ in range(30)]
    ways = {
        "texts": {"text": texts},
        "some nulls": {"text": [t if i % 3 else None for i, t in enumerate(texts)]},
        "nulls alone": {"text": pyarrow.array([None] * 30, pyarrow.string())},
        "no type": {"text": pyarrow.nulls(30)},
        "numbers": {"text": list(range(30))},
        "bytes": {"text": [t.encode() for t in texts]},
        "bytes that are no text": {"text": [b"\xff\xfe"] * 30},
        "lists": {"text": [[t] for t in texts]},
        "another column": {"content": texts, "text_": texts},
        "large texts": {"text": pyarrow.array(texts, pyarrow.large_string())},
        "a dictionary": {"text": pyarrow.array(texts * 2).dictionary_encode()},
        "no rows": {"text": pyarrow.array([], pyarrow.string())},
        "a column more": {"text": texts, "when": [1.5] * 30, "tags": [["a"]] * 30},
    }
    name, columns = generator.choice([*ways.items()])
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    if generator.random() < 0.3:
        content = file.read_bytes()
        name, content = generator.choice(
            (
                ("cut off", content[: generator.randrange(len(content))]),
                ("empty", b""),
                ("text", b"text " * 500),
                ("damaged", content[:40] + generator.randbytes(60) + content[100:]),
                ("without a beginning", content[50:]),
            )
        )
        file.write_bytes(content)
    return name


def write(generator, folder):
    """A text of some kind in a file, and what it is."""
    ending = generator.choice((".txt", ".txt", ".raw", ".tokens", ".jsonl", ".jsonl", ".json", ".parquet", ".csv", ""))
    file = folder / f"text{ending}"
    if ending == ".parquet":
        return file, table(generator, file)
    name, content = records(generator) if ending.startswith(".json") else plain(generator)
    file.write_bytes(content)
    return file, name


def test_texts(model_of, trials):
    model = model_of("opt")
    for seed in range(COUNT):
        generator = random.Random(seed)
        file, done = write(generator, trials.clean())
        where, column = f"{seed} {file.name} {done}", generator.choice(("text", "text", "text", "number", "content"))
        way = seed % 4
        if way == 0:
            few = ("--seq-len", 16, "--max-windows", 2, "--quiet")
            trials.run(where, evaluate_main, [model, "--dataset", file, "--text-column", column, *few])
        elif way == 1:
            evaluated = [word for word in KEEP_ALL if word != "--no-eval"]
            texts = ("--calibration", "bundled", "--eval-dataset", file, "--text-column", column)
            trials.prune(where, model, *evaluated, *texts)
        else:
            trials.prune(where, model, *KEEP_ALL, "--calibration", file, "--text-column", column)
    trials.check(COUNT)
