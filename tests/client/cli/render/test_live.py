"""Text is coloured and made harmless on terminals, and unchanged elsewhere."""

import io

import pytest
from rich.console import Console

from treeswarm_client.cli.render.live import LiveText, escape_controls
from treeswarm_client.generation.run import Token


def write(*texts: str, terminal: bool, colours: bool = True) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, color_system="standard" if terminal else None, width=20)
    live = LiveText(console, colours=colours)
    for number, text in enumerate(texts):
        live.token(Token(0, text, 0.0, number))
    return file.getvalue()


def test_without_a_terminal_text_is_unchanged() -> None:
    texts = ("[bold]a\tb\r\n", "\x1b]0;title\x07", "long " * 20, "世界\u202e")
    assert write(*texts, terminal=False) == "".join(texts)


def test_text_cannot_control_the_terminal() -> None:
    shown = write("a\x1b]0;title\x07b\x9bc\u202ed\n", terminal=True, colours=False)
    assert shown == "a�]0;title�b�c�d\n"
    assert escape_controls("a\tb\né 世界 👩\u200d💻") == "a\tb\né 世界 👩\u200d💻"


def test_each_traversal_has_a_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert write("a", "b", terminal=True) == "\x1b[36ma\x1b[0m\x1b[35mb\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert write("a", "b", terminal=True) == "ab"
