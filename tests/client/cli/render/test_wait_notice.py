"""Whoever waits at a terminal is told for what, and how long still."""

import io

from rich.console import Console

from treeswarm.errors import MissingBlocks
from treeswarm_client.chain.wait_events import ChainWait
from treeswarm_client.cli.render.wait_notice import WaitNotice

NOBODY = MissingBlocks("no node serves blocks 2:4: start `swarm-node MODEL --blocks 2:4`, or wait")
A, B = b"a" * 16, b"b" * 16


class Screen:
    """Lines at the seconds of a clock that is set by hand."""

    def __init__(self, *, midline: bool = False) -> None:
        self.now = 100.0
        self._file = io.StringIO()
        self.lines = WaitNotice(Console(file=self._file), midline, lambda: self.now)

    def at(self, now: float, wait: ChainWait) -> str:
        """What is written."""
        self.now = now
        self.lines(wait)
        written = self._file.getvalue()
        self._file.seek(0)
        self._file.truncate()
        return written


def test_a_wait_is_told_at_its_beginning_now_and_then_and_at_its_end() -> None:
    terminal = Screen()
    assert terminal.at(100.0, ChainWait(A, NOBODY, 30.0)) == "no node serves blocks 2:4: waiting, 30 s left\n"
    assert [terminal.at(now, ChainWait(A, NOBODY, 130.0 - now)) for now in (100.5, 109.5)] == ["", ""]
    assert terminal.at(110.0, ChainWait(A, NOBODY, 20.0)) == "no node serves blocks 2:4: waiting, 20 s left\n"
    full = MissingBlocks("blocks 2:4 are served only by nodes that are full (1) or failed lately (0): try again")
    assert "only by nodes that are full (1)" in terminal.at(111.0, ChainWait(A, full, 19.0))
    assert terminal.at(112.0, ChainWait(A, None, succeeded=True)) == "going on after 12 s\n"


def test_the_text_so_far_keeps_its_line() -> None:
    terminal = Screen(midline=True)
    assert terminal.at(100.0, ChainWait(A, NOBODY, 30.0)).startswith("\nno node")
    assert terminal.at(110.0, ChainWait(A, NOBODY, 20.0)).startswith("no node")


def test_several_that_wait_are_told_of_once() -> None:
    terminal = Screen()
    assert terminal.at(100.0, ChainWait(A, NOBODY, 30.0))
    assert not terminal.at(100.1, ChainWait(B, NOBODY, 30.0))
    assert not terminal.at(103.0, ChainWait(A, None, succeeded=True))
    assert terminal.at(104.0, ChainWait(B, None, succeeded=True)) == "going on after 4 s\n"


def test_a_wait_in_vain_leaves_the_words_to_its_error_and_the_next_one_is_told_anew() -> None:
    terminal = Screen()
    assert terminal.at(100.0, ChainWait(A, NOBODY, 1.0))
    assert not terminal.at(101.0, ChainWait(A, None))
    assert terminal.at(102.0, ChainWait(B, NOBODY, 1.0))
    assert terminal.at(103.0, ChainWait(B, None, succeeded=True)) == "going on after 1 s\n"
