"""Tokens on a terminal as they arrive: one colour a traversal, so that one sees what each round trip bought."""

import io
import sys
import unicodedata

from rich.console import Console
from rich.text import Text

from treeswarm_client.generation.run import Token
from treeswarm_client.generation.stats import Stats

# Six that differ for most eyes and read on dark and light grounds alike.
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
KEPT = "\n\t\r"
"""Of the letters that move a terminal's cursor; rich leaves the last out."""
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn the writing around them."""


def stdout_console() -> Console:
    """On standard output; letters that it cannot write become question marks.  rich minds NO_COLOR and TERM=dumb."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


class LiveText:
    """Writes tokens as they come; where nobody looks, the text as it is and nothing else."""

    def __init__(self, console: Console, *, colours: bool = True) -> None:
        self._console = console
        self._colours = colours

    def prompt(self, prompt: str) -> None:
        """The prompt, dimmed, with the answer to follow on the same line."""
        self._write(prompt, "dim")

    def token(self, token: Token) -> None:
        """One token in its traversal's colour."""
        self._write(token.text, COLOURS[token.traversal % len(COLOURS)] if self._colours else "")

    def end(self) -> None:
        self._console.print()

    def _write(self, text: str, style: str) -> None:
        if self._console.is_terminal:
            # soft_wrap: the terminal wraps, so that text copied from it keeps the model's own line ends.
            self._console.print(Text(escape_controls(text), style=style), end="", soft_wrap=True)
        else:
            self._console.file.write(text)
        self._console.file.flush()


def escape_controls(text: str) -> str:
    """Strangers compute the text: nothing in it commands the terminal that shows it."""
    return "".join("�" if _commands(letter) else letter for letter in text)


def _commands(letter: str) -> bool:
    return letter not in KEPT and (unicodedata.category(letter) == "Cc" or letter in TURNING)


def summary_line(stats: Stats) -> Text:
    """One line under the text."""
    time = stats.time
    return Text(
        f"{stats.committed} tokens in {stats.traversals} traversals: "
        f"{stats.tokens_per_traversal:.2f} tokens a traversal, {stats.tokens_per_second:.1f} tokens/s "
        f"(draft {time.draft:.2f} s, wire {time.wire:.2f} s, queue {time.queue:.2f} s, compute {time.compute:.2f} s)",
        style="dim",
    )
