"""A text that arrives in pieces, for parsers that wait for more of it."""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A parser: it yields whenever it must wait for more text, and returns what it has read."""
OPENING = {"{": "}", "[": "]"}


class BrokenCall(Exception):
    """The text that was to be a call is none: the model wrote something else."""


class TextReader:
    """Reads a text that arrives in pieces.  The end of the text reads as an empty character."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False
        self._mark: int | None = None

    def feed(self, piece: str) -> None:
        """Add a piece of the text."""
        keep = self._at if self._mark is None else self._mark
        self._text = self._text[keep:] + piece
        self._at -= keep
        if self._mark is not None:
            self._mark = 0

    def end(self) -> None:
        """Note that no more text comes."""
        self._ended = True

    def mark(self) -> None:
        """Remember this place, to return to it with `rewind`."""
        self._mark = self._at

    def rewind(self) -> None:
        """Return to the marked place."""
        assert self._mark is not None
        self._at, self._mark = self._mark, None

    def release(self) -> None:
        """Forget the marked place: nothing returns to it any more."""
        self._mark = None

    def now(self) -> str | None:
        """Read the next character, an empty one at the end, or None if it has not come yet."""
        if self._at < len(self._text):
            self._at += 1
            return self._text[self._at - 1]
        return "" if self._ended else None

    def peek(self) -> Reading[str]:
        """Return the next character without reading it."""
        while self._at == len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def unread(self, text: str) -> None:
        """Put back `text`, which was the last to be read."""
        self._at -= len(text)

    def literal(self, text: str) -> Reading[bool]:
        """Read `text` if it comes next, and return whether it did."""
        while True:
            here = self._text[self._at : self._at + len(text)]
            if here == text:
                self._at += len(text)
                return True
            if not text.startswith(here) or self._ended:
                return False
            yield

    def comes(self, text: str) -> Reading[bool]:
        """Return whether `text` comes next, without reading it."""
        found = yield from self.literal(text)
        if found:
            self._at -= len(text)
        return found

    def ends_within(self, text: str) -> bool:
        """Read what is left if the answer has ended within `text`, and return whether it did."""
        rest = self._text[self._at :]
        if not self._ended or not rest or not text.startswith(rest):
            return False
        self._at = len(self._text)
        return True

    def expect(self, text: str) -> Reading[None]:
        """Read `text`.  Raises BrokenCall if something else comes."""
        if not (yield from self.literal(text)):
            raise BrokenCall

    def spaces(self) -> Reading[None]:
        """Read white space, if there is any."""
        while (yield from self.peek()).isspace():
            self._at += 1

    def until(self, marks: tuple[str, ...], on_text: Callable[[str], None]) -> Reading[str]:
        """Pass text on up to the first of `marks`; read that mark and return it, or an empty text at the end.

        Text that may be the beginning of a mark waits until more has come.
        """
        while True:
            rest = self._text[self._at :]
            found = min(((at, mark) for mark in marks if (at := rest.find(mark)) >= 0), default=None)
            held = len(rest) if self._ended else _first_beginning(rest, marks)
            if found is not None and found[0] <= held:
                self._pass_on(found[0], on_text)
                self._at += len(found[1])
                return found[1]
            self._pass_on(held, on_text)
            if self._ended:
                return ""
            yield

    def text_until(self, marks: tuple[str, ...], limit: int) -> Reading[tuple[str, str]]:
        """Read text up to the first of `marks`, and that mark.

        Raises BrokenCall if the text ends before it, or is longer than `limit` characters.
        """
        found = ""
        while not found.endswith(marks):
            while (character := self.now()) is None:
                yield
            found += character
            if not character or len(found) > limit + max(map(len, marks)):
                raise BrokenCall
        mark = max((mark for mark in marks if found.endswith(mark)), key=len)
        return found[: -len(mark)], mark

    def _pass_on(self, size: int, on_text: Callable[[str], None]) -> None:
        if size:
            on_text(self._text[self._at : self._at + size])
            self._at += size


def _first_beginning(text: str, marks: tuple[str, ...]) -> int:
    """Return where in `text` the first mark may have begun that is not complete, or the text's length."""
    longest = max(map(len, marks))
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if any(len(mark) > len(text) - at and mark.startswith(text[at:]) for mark in marks):
            return at
    return len(text)


def read_json_string(reader: TextReader) -> Reading[str]:
    """Read a JSON string, quotes included, and return it as written.  Raises BrokenCall."""
    yield from reader.expect('"')
    written, escaped = '"', False
    while True:
        while (character := reader.now()) is None:
            yield
        if not character or (character < " " and character not in "\n\t"):
            raise BrokenCall
        written += character
        if character == '"' and not escaped:
            return written
        escaped = character == "\\" and not escaped


def read_json_value(reader: TextReader, on_text: Callable[[str], None]) -> Reading[None]:
    """Read one JSON value and pass it on as it comes.  Raises BrokenCall where brackets do not match."""
    first = yield from reader.peek()
    if first == '"':
        on_text((yield from read_json_string(reader)))
    elif first in OPENING and first:
        yield from _read_brackets(reader, on_text)
    else:
        yield from _read_scalar(reader, on_text)


def _read_brackets(reader: TextReader, on_text: Callable[[str], None]) -> Reading[None]:
    closers: list[str] = []
    in_string = escaped = False
    while True:
        while (character := reader.now()) is None:
            yield
        if not character:
            raise BrokenCall
        on_text(character)
        if in_string:
            in_string = character != '"' or escaped
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in OPENING:
            closers.append(OPENING[character])
        elif character in "]}":
            if character != closers.pop():
                raise BrokenCall
            if not closers:
                return


def _read_scalar(reader: TextReader, on_text: Callable[[str], None]) -> Reading[None]:
    size = 0
    while (character := (yield from reader.peek())) and character not in ",]}" and not character.isspace():
        reader.now()
        on_text(character)
        size += 1
    if not size:
        raise BrokenCall
