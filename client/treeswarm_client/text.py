"""Token ids to text, as they come, up to where it shall stop."""

from dataclasses import dataclass, field

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


@dataclass(eq=False)
class TextStream:
    """Decodes one token at a time; a token that ends inside a character adds nothing until the next."""

    tokenizer: Tokenizer
    _stream: DecodeStream = field(default_factory=lambda: DecodeStream(skip_special_tokens=True))

    def add(self, token: int) -> str:
        """What `token` adds to the text."""
        return self._stream.step(self.tokenizer, token) or ""


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

    def rest(self) -> str:
        """What was held back, where nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
