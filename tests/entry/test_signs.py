"""What a run tells of itself: lines where there is no terminal, and a bar on one."""

import io
import logging

import pytest
from rich.console import Console

from snp_llm.evaluate.turns import TOO_NOISY, in_turns, ratio_of, speed_words
from snp_llm.runtime import terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes only where a test moves it."""
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="snp_llm")
    return lambda: [record.getMessage() for record in caplog.records]


def test_lines_say_how_much_is_done_and_how_long_the_rest_takes(clock, said):
    signs = terminal.Lines(None, "pruning", 0.0, began=100.0, said=100.0).signs()
    signs.begin("reading")
    signs.expect(5)
    for line in ("one", "two"):
        clock[0] += 10
        signs.step(line)
    signs.skip(1)  # one of the five was done by another run
    clock[0] += 10
    signs.step("three")
    signs.step("four")
    assert said() == [
        *("reading", "one (1 of 5), 40 seconds left", "two (2 of 5), 30 seconds left"),
        *("three (3 of 4), 10 seconds left", "four"),
    ]


def test_shares_are_said_now_and_then(clock, said):
    signs = terminal.Lines(None, "perplexity", 10.0, began=100.0, said=100.0).signs()
    for share in (0.1, 0.2, 0.3, 0.4, 1.0):
        clock[0] += 6
        signs.share(share)
    assert said() == ["perplexity", "perplexity: 20 %, 48 seconds left", "perplexity: 40 %, 36 seconds left"]


def test_a_terminal_has_a_bar(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "Console", lambda **_: Console(file=shown, force_terminal=True, width=80))
    monkeypatch.setattr(terminal.log, "level", logging.INFO)
    with terminal.progress(None, "pruning") as signs:
        signs.expect(4)
        signs.skip(1)
        signs.step("block 0")
    with terminal.watching("perplexity") as signs:
        signs.share(0.25)
    assert "1/3" in shown.getvalue() and "block 0" in shown.getvalue() and "25 %" in shown.getvalue()


def test_a_speed_that_its_spread_hides_is_not_said():
    assert speed_words(1.17, 1.12, 1.2) == "1.17 (1.12 to 1.20)"
    assert speed_words(1.01, 0.99, 1.02) == "1.01 (0.99 to 1.02)"  # a difference that would be seen is not there
    assert speed_words(0.73, 0.6, 1.1) == speed_words(1.17, 1.0, 1.3) == TOO_NOISY


def test_ratios_are_of_neighbours_and_everyone_is_first_in_turn():
    order, clock = [], [0.0]

    def once(name, seconds):
        order.append(name)
        clock[0] += 1  # the machine gets slower
        return seconds * clock[0]

    times = in_turns([lambda: once("a", 2.0), lambda: once("b", 1.0)], 4)
    assert order == list("abbaabba") and [len(of_one) for of_one in times] == [4, 4]
    found = ratio_of([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0]])
    assert (found.low, found.ratio, found.high) == (2.0, 2.0, 2.0)
