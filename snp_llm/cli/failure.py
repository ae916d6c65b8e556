"""How a command says that it failed. Imports nothing that takes time."""

import re
import sys

LINE_BREAKING = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # in names and texts


def fail(message: str, code: int = 2) -> int:
    """Prints why a command failed, on one line, and returns its exit code."""
    line = LINE_BREAKING.sub(lambda found: ascii(found[0])[1:-1], message)
    print(f"snp-llm: error: {line}", file=sys.stderr)
    return code
