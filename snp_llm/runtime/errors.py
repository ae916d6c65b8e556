"""The exceptions that users see, how they quote what came and ask what was meant. Knows nothing else of the package."""

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches

LONGEST_INTEGER = 10**30  # that is written out


class SnpError(Exception):
    """An expected failure; the message says where, what was expected, what came and what to do.

    The command line prints it on one or two lines and exits with 2.
    """


class DiskError(SnpError):
    """What was to be written could not be: no mistake of the run, which can go on once there is room."""


def shown(value: object) -> str:
    """A value as a message quotes it: short and on one line, whatever was given."""
    if isinstance(value, int) and abs(value) >= LONGEST_INTEGER:  # Python refuses to write out the longest
        return "an integer of more than 30 digits"
    return reprlib.repr(value)


def near(value: str, choices: Iterable[str]) -> str:
    """The choice that a word that is none was meant to be, as a question; nothing where none is like it."""
    found = get_close_matches(value, [*choices], n=1)
    return f" Did you mean {found[0]!r}?" if found else ""


def reason(error: BaseException) -> str:
    """What an error of a library says, all its lines joined, up to a few hundred characters; else its kind."""
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return (text if len(text) <= 400 else f"{text[:400].rstrip()} ...") or type(error).__name__
