"""Token ids to text, as they come, up to where it shall stop."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

# How a token reads may depend on those before it: whether a space stands there, whether bytes become a character.
BEFORE = 8
# No character is so many tokens long: what is no text by then never becomes any.
LONGEST_WAIT = 16


@dataclass(eq=False)
class TextStream:
    """Decodes one token at a time; a token that ends inside a character adds nothing until the next.

    The tokenizers' own `DecodeStream` raises where a byte that is no text changes how those before it read (tokenizers
    that fall back to bytes, as Llama 2's and Gemma's do).
    """

    tokenizer: Tokenizer
    prompt: Sequence[int] = ()
    """The tokens before."""
    _ids: list[int] = field(init=False)
    _shown: int = field(init=False)
    """Of `_ids`, so many are in the text."""

    def __post_init__(self) -> None:
        self._ids = list(self.prompt[-BEFORE:])
        self._shown = len(self._ids)

    def add(self, token: int) -> str:
        """What `token` adds to the text."""
        self._ids.append(token)
        before, now = self._text(self._ids[: self._shown]), self._text(self._ids)
        unfinished = len(now) <= len(before) or now.endswith("\ufffd")
        if unfinished and len(self._ids) - self._shown < LONGEST_WAIT:
            return ""
        # What is shown already stays, also where a later byte makes it read otherwise.
        piece = now[len(before) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return piece

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


@dataclass(eq=False)
class StopText:
    """Text that ends before the first of some stop strings: what may be the beginning of one is held back."""

    stops: tuple[str, ...]
    hit: str | None = None
    """The stop string that was met."""
    _held: str = ""

    def add(self, piece: str) -> str:
        """What may be shown now that `piece` has come."""
        text = self._held + piece
        found = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.hit = min(found)
            self._held = ""
            return text[:at]
        shown = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, where nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
