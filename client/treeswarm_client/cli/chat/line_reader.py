"""Reads the lines of a chat from a terminal, with history and editing, or from a pipe."""

import contextlib
import os
import select
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol

# Number of lines that the history keeps.
HISTORY_LINES = 1000


class LineReader(Protocol):
    """A source of lines."""

    def read_line(self, *, continued: bool) -> str:
        """Return one line without its end; `continued` says that it continues an entry.

        Raises EOFError at the end of the input, and KeyboardInterrupt.
        """
        ...


class TerminalReader:
    """Reads what a person types, through readline where Python has it."""

    def __init__(self, *, prompted: bool = True) -> None:
        self._prompts = ("> ", ". ") if prompted else ("", "")

    def read_line(self, *, continued: bool) -> str:
        """Return one line."""
        if _end_was_typed():
            raise EOFError
        return input(self._prompts[continued])


class PipeReader:
    """Reads the output of another program."""

    def read_line(self, *, continued: bool) -> str:
        """Return one line."""
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")


def _end_was_typed() -> bool:
    """Return whether Ctrl-D was typed before a line was asked for.

    The terminal keeps it as a line without characters.  readline would turn that into a character without meaning.
    """
    try:
        import fcntl  # noqa: PLC0415  # not on Windows
        import termios  # noqa: PLC0415
    except ImportError:
        return False
    keyboard = sys.stdin.fileno()
    try:
        # The order matters: a line typed after both checks is neither taken for the end nor loses a character.
        if not select.select([keyboard], [], [], 0)[0]:
            return False
        available = struct.unpack("i", fcntl.ioctl(keyboard, termios.FIONREAD, bytes(4)))[0]
        return not available and not os.read(keyboard, 1)
    except OSError:  # the terminal is gone, which `input` will report
        return False


@contextlib.contextmanager
def line_editing(words: Iterable[str], *, history: Path | None) -> Iterator[None]:
    """Let `input` complete `words` and keep a history in the file `history`, which other users cannot read.

    Without readline, or if the file cannot be written, lines can still be typed.
    """
    try:
        import readline  # noqa: PLC0415  # not on Windows
    except ImportError:
        yield
        return
    _set_up_completion(readline, list(words))
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
    """Return the path of the chat history in the directory for this user's state."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "treeswarm" / "chat_history"


def _keep_private(path: Path) -> None:
    """Create the file if necessary, and let only its owner read it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.chmod(0o600)


def _set_up_completion(readline: ModuleType, words: list[str]) -> None:
    def complete(text: str, number: int) -> str | None:
        matches = [word for word in words if word.startswith(text)] if text.startswith("/") else []
        return matches[number] if number < len(matches) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
