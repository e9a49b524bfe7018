"""A long import shows on a terminal that it runs, and leaves nothing there."""

import subprocess
import sys

from tests.support.terminal import CTRL_C, run_on_terminal

CODE = """
import time
from treeswarm.programs.interrupts import interrupt_ends_process, ticking
with interrupt_ends_process(), ticking("loading torch"{after}):
    time.sleep({seconds})
print("done")
"""


def command(seconds: float, after: str = "") -> list[str]:
    return [sys.executable, "-c", CODE.format(seconds=seconds, after=after)]


def test_a_terminal_shows_the_seconds_of_an_import() -> None:
    with run_on_terminal(command(1.5), {"TERM": "xterm"}) as terminal:
        terminal.read_until("\r\x1b[Kloading torch … 0 s")
        terminal.read_until("\r\x1b[Kloading torch … 1 s")
        terminal.read_until("\r\x1b[Kdone")
        assert terminal.wait_for_exit() == 0


def test_ctrl_c_leaves_one_line() -> None:
    with run_on_terminal(command(60.0), {"TERM": "xterm"}) as terminal:
        terminal.read_until("loading torch … 0 s")
        terminal.press(CTRL_C)
        terminal.read_until("\r\x1b[K\r\nstopped")
        assert terminal.wait_for_exit() == 130


def test_elsewhere_nothing_is_written() -> None:
    result = subprocess.run(command(0.1), capture_output=True, text=True, timeout=60, check=True)
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_a_terminal_shows_only_what_takes_long_enough() -> None:
    with run_on_terminal(command(0.1, ", 60.0"), {"TERM": "xterm"}) as terminal:
        shown = terminal.read_until("done")
        assert terminal.wait_for_exit() == 0
    assert "loading torch" not in shown
    with run_on_terminal(command(1.0, ", 0.2"), {"TERM": "xterm"}) as terminal:
        terminal.read_until("\r\x1b[Kloading torch … 0 s")
        terminal.read_until("\r\x1b[Kdone")
        assert terminal.wait_for_exit() == 0
