"""What a long piece of work tells of itself while it goes on. Knows not who listens, nor what is done."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


def unheard(_said: Any) -> None:
    """Listens to nothing."""


@dataclass(frozen=True)
class Signs:
    """Signs of life of a long piece of work.

    Attributes:
        step: takes a line about a step that is done.
        begin: takes a line about what begins now, and is none of the steps.
        skip: takes how many of the steps an earlier run has done.
        expect: takes how many steps there will be, once that is known.
        share: takes the share of the work that is done, in [0, 1], where it has no steps.
    """

    step: Callable[[str], None] = unheard
    begin: Callable[[str], None] = unheard
    skip: Callable[[int], None] = unheard
    expect: Callable[[int], None] = unheard
    share: Callable[[float], None] = unheard


UNWATCHED = Signs()

# Opens the signs of a piece of work whose steps are not counted, by what it is.
Watch = Callable[[str], AbstractContextManager[Signs]]
