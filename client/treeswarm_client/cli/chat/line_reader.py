"""Lines from whoever chats: a terminal with history and editing, or a pipe."""

import contextlib
import os
import select
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

# More is never scrolled through.
HISTORY_LINES = 1000


class LineReader(Protocol):
    """Where lines come from."""

    def next(self, *, more: bool) -> str:
        """One line without its end; `more` of something begun.  Raises EOFError at the end, KeyboardInterrupt."""
        ...


class TerminalReader:
    """A person's, through readline where Python has it."""

    def __init__(self, *, prompted: bool = True) -> None:
        self._prompts = ("> ", ". ") if prompted else ("", "")

    def next(self, *, more: bool) -> str:
        """One line."""
        if _end_was_typed():
            raise EOFError
        return input(self._prompts[more])


class PipeReader:
    """Somebody else's output."""

    def next(self, *, more: bool) -> str:
        """One line."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


def _end_was_typed() -> bool:
    """Ctrl-D, before anybody asked: the terminal keeps it as a line of no letters, and readline would turn that into a
    letter which means nothing to it."""
    try:
        import fcntl  # noqa: PLC0415  # Windows has none
        import termios  # noqa: PLC0415
    except ImportError:
        return False
    keyboard = sys.stdin.fileno()
    try:
        # In this order: a line typed after both questions cannot be taken for the end, nor lose a letter to it.
        if not select.select([keyboard], [], [], 0)[0]:
            return False
        letters = struct.unpack("i", fcntl.ioctl(keyboard, termios.FIONREAD, bytes(4)))[0]
        return not letters and not os.read(keyboard, 1)
    except OSError:  # the terminal is gone; `input` says how
        return False


@contextlib.contextmanager
def line_editing(words: Iterable[str], *, history: Path | None) -> Iterator[None]:
    """While it lasts, `input` completes `words`, and remembers lines in the file `history`, which others cannot read.
    Without readline, or where the file cannot be written, lines are typed all the same."""
    try:
        import readline  # noqa: PLC0415  # Windows has none
    except ImportError:
        yield
        return
    _complete(readline, list(words))
    readline.set_history_length(HISTORY_LINES)
    with contextlib.suppress(OSError):
        if history is not None:
            readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if history is not None:
                _keep_private(history)
                readline.write_history_file(history)
                _keep_private(history)


def history_path() -> Path:
    """Beside the rest of this user's state."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "treeswarm" / "chat_history"


def _keep_private(path: Path) -> None:
    """There, and its owner's alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.chmod(0o600)


def _complete(readline: ModuleType, words: list[str]) -> None:
    def complete(text: str, number: int) -> str | None:
        found = [word for word in words if word.startswith(text)] if text.startswith("/") else []
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
