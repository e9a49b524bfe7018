"""Tokens on a terminal as they arrive: one colour a traversal, so that one sees what each round trip bought."""

from rich.console import Console
from rich.text import Text

from treeswarm_client.run import Token
from treeswarm_client.stats import Stats

# Six that differ for most eyes and read on dark and light grounds alike.
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


class LiveText:
    """Writes tokens as they come."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def prompt(self, prompt: str) -> None:
        """The prompt, dimmed, with the answer to follow on the same line."""
        self._write(prompt, "dim")

    def token(self, token: Token) -> None:
        """One token in its traversal's colour."""
        self._write(token.text, COLOURS[token.traversal % len(COLOURS)])

    def end(self) -> None:
        self._console.print()

    def _write(self, text: str, style: str) -> None:
        # soft_wrap: the terminal wraps, so that text copied from it keeps the model's own line ends.
        self._console.print(Text(text, style=style), end="", soft_wrap=True)
        self._console.file.flush()


def summary_line(stats: Stats) -> Text:
    """One line under the text."""
    time = stats.time
    return Text(
        f"{stats.committed} tokens in {stats.traversals} traversals: "
        f"{stats.tokens_per_traversal:.2f} tokens a traversal, {stats.tokens_per_second:.1f} tokens/s "
        f"(draft {time.draft:.2f} s, wire {time.wire:.2f} s, queue {time.queue:.2f} s, compute {time.compute:.2f} s)",
        style="dim",
    )
