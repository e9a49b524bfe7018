"""The text and the bytes of single tokens.  Pure."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""A function that turns token ids into text."""


def token_text(token: int, decode: Decode) -> str:
    """Return what a token adds to a text.

    Decoded alone, a token may lack the space before it, so it is decoded after a copy of itself.
    """
    return decode([token, token])[len(decode([token])) :]


def bytes_of(text: str) -> list[int] | None:
    """Return the UTF-8 bytes of a token's text, or None if the token is part of a character and has no text."""
    return None if "\ufffd" in text else list(text.encode())
