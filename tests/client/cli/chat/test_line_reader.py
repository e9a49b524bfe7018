"""Lines typed at a terminal are read whole, also those typed before or while they are asked for."""

import fcntl
import io
import os
import pty
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from treeswarm_client.cli.chat.line_reader import TerminalReader

CTRL_D = b"\x04"
Keys = Callable[[bytes], None]


@pytest.fixture
def press(monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    """Return a function that presses keys at this test's terminal, and waits until they have arrived."""
    keyboard, terminal = pty.openpty()

    def pressed(keys: bytes) -> None:
        os.write(keyboard, keys)
        assert select.select([terminal], [], [], 10)[0]

    with io.TextIOWrapper(os.fdopen(terminal, "rb")) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield pressed
    os.close(keyboard)


def test_ctrl_d_typed_ahead_is_the_end(press: Keys) -> None:
    press(CTRL_D)
    with pytest.raises(EOFError):
        TerminalReader().read_line(continued=False)


def test_line_typed_ahead_is_read(press: Keys) -> None:
    press(b"/quit\r")
    assert TerminalReader().read_line(continued=False) == "/quit"


def test_line_typed_during_the_check_for_ctrl_d_is_whole(press: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(select, "select", _typing_after(select.select, press, patched))
        patched.setattr(fcntl, "ioctl", _typing_after(fcntl.ioctl, press, patched))
        assert TerminalReader().read_line(continued=False) == "/quit"


def test_line_typed_after_ctrl_d_is_whole(press: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    press(CTRL_D)
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "ioctl", _typing_after(fcntl.ioctl, press, patched))
        with pytest.raises(EOFError):
            TerminalReader().read_line(continued=False)
    assert TerminalReader().read_line(continued=False) == "/quit"


def _typing_after(function: Callable[..., Any], press: Keys, patched: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return `function` patched so that a line is typed right after its first call."""

    def call(*arguments: Any) -> Any:
        result = function(*arguments)
        patched.undo()
        press(b"/quit\r")
        return result

    return call
