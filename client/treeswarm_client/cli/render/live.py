"""Writes tokens as they arrive, on a terminal with one colour per traversal."""

import io
import sys
import unicodedata

from rich.console import Console
from rich.text import Text

from treeswarm_client.generation.run import Token
from treeswarm_client.generation.stats import Stats

# Six colours that most people can tell apart, readable on dark and on light backgrounds.
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
ALLOWED_CONTROLS = "\n\t\r"
"""Control characters that are written to a terminal; rich itself drops the last."""
BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text around them."""


def stdout_console() -> Console:
    """Return a console on standard output, which writes question marks for characters that it cannot encode.

    rich itself honours NO_COLOR and TERM=dumb.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


class LiveText:
    """Writes tokens as they come; without a terminal, the text as it is and nothing else."""

    def __init__(self, console: Console, *, colours: bool = True) -> None:
        self._console = console
        self._colours = colours

    def prompt(self, prompt: str) -> None:
        """Write the prompt, dimmed; the answer follows on the same line."""
        self._write(prompt, "dim")

    def token(self, token: Token) -> None:
        """Write one token in its traversal's colour."""
        self._write(token.text, COLOURS[token.traversal % len(COLOURS)] if self._colours else "")

    def end(self) -> None:
        """End the line."""
        self._console.print()

    def _write(self, text: str, style: str) -> None:
        if self._console.is_terminal:
            # With soft_wrap the terminal wraps lines, so that text copied from it keeps the model's own line ends.
            self._console.print(Text(escape_controls(text), style=style), end="", soft_wrap=True)
        else:
            self._console.file.write(text)
        self._console.file.flush()


def escape_controls(text: str) -> str:
    """Replace the characters that would control the terminal: unknown nodes compute the text."""
    return "".join("�" if _is_control(character) else character for character in text)


def _is_control(character: str) -> bool:
    is_control = unicodedata.category(character) == "Cc" or character in BIDI_CONTROLS
    return is_control and character not in ALLOWED_CONTROLS


def summary_line(stats: Stats) -> Text:
    """Return one line about a text's cost, to be printed below it."""
    time = stats.time
    return Text(
        f"{stats.committed} tokens in {stats.traversals} traversals: "
        f"{stats.tokens_per_traversal:.2f} tokens per traversal, {stats.tokens_per_second:.1f} tokens/s "
        f"(draft {time.draft:.2f} s, wire {time.wire:.2f} s, queue {time.queue:.2f} s, compute {time.compute:.2f} s)",
        style="dim",
    )
