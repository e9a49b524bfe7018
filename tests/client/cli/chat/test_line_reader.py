"""Lines typed at a terminal before anybody asks for them, or just while somebody does."""

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
    """Keys at this test's terminal; they have arrived when it returns."""
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
        TerminalReader().next(more=False)


def test_a_line_typed_ahead_is_read(press: Keys) -> None:
    press(b"/quit\r")
    assert TerminalReader().next(more=False) == "/quit"


def test_a_line_typed_while_the_end_is_looked_for_loses_no_letter(press: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(select, "select", _typing_after(select.select, press, patched))
        patched.setattr(fcntl, "ioctl", _typing_after(fcntl.ioctl, press, patched))
        assert TerminalReader().next(more=False) == "/quit"


def test_a_line_typed_behind_the_end_is_whole(press: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    press(CTRL_D)
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "ioctl", _typing_after(fcntl.ioctl, press, patched))
        with pytest.raises(EOFError):
            TerminalReader().next(more=False)
    assert TerminalReader().next(more=False) == "/quit"


def _typing_after(question: Callable[..., Any], press: Keys, patched: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The first question asked is answered before a line comes."""

    def answer(*arguments: Any) -> Any:
        answered = question(*arguments)
        patched.undo()
        press(b"/quit\r")
        return answered

    return answer
