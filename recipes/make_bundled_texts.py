"""Makes the two bundled English texts out of the documentation that CPython carries in its standard library.

    python recipes/make_bundled_texts.py

It takes the prose paragraphs of `pydoc_data.topics` (no code, no headings): two disjoint sets of topics, one for
calibration and one for evaluation. The texts of CPython 3.11.7 are the ones in the repository. Documentation and
licence: Copyright (c) 2001 Python Software Foundation; PSF License Agreement version 2 (see NOTICE).
"""

from pathlib import Path
from pydoc_data.topics import topics

BUNDLED = Path(__file__).parent.parent / "snp_llm" / "bundled"
EVALUATION_TOPICS = {
    "types",
    "execmodel",
    "import",
    "naming",
    "objects",
    "assignment",
    "function",
    "try",
    "identifiers",
}
CALIBRATION_CHARACTERS = 160_000


def prose(topic: str) -> list[str]:
    """The unwrapped paragraphs of one topic that read as sentences."""
    paragraphs = [" ".join(p.replace("*", "").split()) for p in topics[topic].split("\n\n")]
    return [p for p in paragraphs if len(p.split()) >= 12 and p[0].isupper() and p[-1] in ".:)" and "::=" not in p]


def main() -> None:
    evaluation = {p for t in sorted(EVALUATION_TOPICS) for p in prose(t)}
    seen: set[str] = set()
    texts: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for topic in sorted(topics):
        for p in prose(topic):
            if p in seen:  # topics quote each other
                continue
            seen.add(p)
            texts["evaluation" if p in evaluation else "calibration"].append(p)
    for name, paragraphs in texts.items():
        text = "\n\n".join(paragraphs)[:CALIBRATION_CHARACTERS].rsplit("\n\n", 1)[0] + "\n"
        (BUNDLED / f"{name}.txt").write_text(text, encoding="utf-8")
        print(name, len(text))


if __name__ == "__main__":
    main()
