"""Users at a terminal see why generations wait, and for how long still."""

import io

from rich.console import Console

from treeswarm.errors import MissingBlocks
from treeswarm_client.chain.wait_events import ChainWait
from treeswarm_client.cli.render.wait_notice import WaitNotice

NOBODY = MissingBlocks("no node serves blocks 2:4: start `swarm-node MODEL --blocks 2:4`, or wait")
A, B = b"a" * 16, b"b" * 16


class Screen:
    """Shows the lines written at the times of a clock that the test sets."""

    def __init__(self, *, midline: bool = False) -> None:
        self.now = 100.0
        self._file = io.StringIO()
        self.notice = WaitNotice(Console(file=self._file), midline, lambda: self.now)

    def at(self, now: float, wait: ChainWait) -> str:
        """Return what is written for an event at this time."""
        self.now = now
        self.notice(wait)
        written = self._file.getvalue()
        self._file.seek(0)
        self._file.truncate()
        return written


def test_wait_is_shown_at_begin_at_intervals_and_at_its_end() -> None:
    terminal = Screen()
    assert terminal.at(100.0, ChainWait(A, NOBODY, 30.0)) == "no node serves blocks 2:4: waiting, 30 s left\n"
    assert [terminal.at(now, ChainWait(A, NOBODY, 130.0 - now)) for now in (100.5, 109.5)] == ["", ""]
    assert terminal.at(110.0, ChainWait(A, NOBODY, 20.0)) == "no node serves blocks 2:4: waiting, 20 s left\n"
    full = MissingBlocks("blocks 2:4 are served only by nodes that are full (1): try again")
    assert "only by nodes that are full (1)" in terminal.at(111.0, ChainWait(A, full, 19.0))
    assert terminal.at(112.0, ChainWait(A, None, succeeded=True)) == "continuing after 12 s\n"


def test_notice_begins_on_a_new_line_below_text() -> None:
    terminal = Screen(midline=True)
    assert terminal.at(100.0, ChainWait(A, NOBODY, 30.0)).startswith("\nno node")
    assert terminal.at(110.0, ChainWait(A, NOBODY, 20.0)).startswith("no node")


def test_waits_of_several_sessions_share_a_notice() -> None:
    terminal = Screen()
    assert terminal.at(100.0, ChainWait(A, NOBODY, 30.0))
    assert not terminal.at(100.1, ChainWait(B, NOBODY, 30.0))
    assert not terminal.at(103.0, ChainWait(A, None, succeeded=True))
    assert terminal.at(104.0, ChainWait(B, None, succeeded=True)) == "continuing after 4 s\n"


def test_failed_wait_writes_nothing_and_the_next_starts_anew() -> None:
    terminal = Screen()
    assert terminal.at(100.0, ChainWait(A, NOBODY, 1.0))
    assert not terminal.at(101.0, ChainWait(A, None))
    assert terminal.at(102.0, ChainWait(B, NOBODY, 1.0))
    assert terminal.at(103.0, ChainWait(B, None, succeeded=True)) == "continuing after 1 s\n"
