"""Text on terminals, and where nobody looks."""

import io

import pytest
from rich.console import Console

from treeswarm_client.cli.render.live import LiveText, escape_controls
from treeswarm_client.generation.run import Token


def written(*texts: str, terminal: bool, colours: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=20)
    live = LiveText(console, colours=colours)
    for number, text in enumerate(texts):
        live.token(Token(0, text, 0.0, number))
    return file.getvalue()


def test_where_nobody_looks_the_text_is_as_it_is() -> None:
    texts = ("[bold]a\tb\r\n", "\x1b]0;title\x07", "long " * 20, "世界\u202e")
    assert written(*texts, terminal=False) == "".join(texts)


def test_text_commands_no_terminal() -> None:
    shown = written("a\x1b]0;title\x07b\x9bc\u202ed\n", terminal=True, colours=False)
    assert shown == "a�]0;title�b�c�d\n"
    assert escape_controls("a\tb\né 世界 👩\u200d💻") == "a\tb\né 世界 👩\u200d💻"


def test_every_traversal_has_a_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert written("a", "b", terminal=True) == "\x1b[36ma\x1b[0m\x1b[35mb\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert written("a", "b", terminal=True) == "ab"
