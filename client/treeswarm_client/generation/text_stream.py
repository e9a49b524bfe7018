"""Turn token ids into text as they come, up to a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

# Number of tokens before the first one that are decoded with it.  How a token reads may depend on them: whether a space
# stands there, whether bytes become a character.
BEFORE = 8
# Number of tokens after which bytes that form no character are shown anyway: no character has so many tokens.
LONGEST_WAIT = 16


@dataclass(eq=False)
class TextStream:
    """Decodes one token at a time; a token that ends inside a character adds nothing until the next.

    The tokenizers' own `DecodeStream` raises where a byte that is no text changes how those before it read.  That
    happens with tokenizers that fall back to bytes, as Llama 2's and Gemma's do.
    """

    tokenizer: Tokenizer
    prompt: Sequence[int] = ()
    """Ids of the tokens before the first one."""
    hidden: frozenset[int] | None = None
    """Special tokens that are left out of the text, or None for all of them."""
    _ids: list[int] = field(init=False)
    """Ids of the last tokens that added text, then of those that have not added any yet."""
    _shown: int = field(init=False)
    """Number of `_ids` that are in the text."""

    def __post_init__(self) -> None:
        self._ids = list(self.prompt[-BEFORE:])
        self._shown = len(self._ids)

    def add(self, token: int) -> str:
        """Return the text that `token` adds, which may be empty."""
        self._ids.append(token)
        before, now = self._text(self._ids[: self._shown]), self._text(self._ids)
        is_unfinished = len(now) <= len(before) or now.endswith("\ufffd")
        if is_unfinished and len(self._ids) - self._shown < LONGEST_WAIT:
            return ""
        # Text that is shown stays, even where a later byte makes it read otherwise.
        piece = now[len(before) :]
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return piece

    def _text(self, ids: Sequence[int]) -> str:
        if self.hidden is None:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        shown = [token for token in ids if token not in self.hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False))


def hidden_tokens(tokenizer: Tokenizer, shown: Sequence[str]) -> frozenset[int] | None:
    """Return the special tokens that are part of none of the texts `shown`, or None if that is true of all of them."""
    if not shown:
        return None
    special = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    hidden = {token for token, content in special.items() if not any(content in text for text in shown)}
    return frozenset(hidden) if len(hidden) < len(special) else None


@dataclass(eq=False)
class StopText:
    """Ends a text before the first of its stop strings, and holds back what may be the beginning of one."""

    stops: tuple[str, ...]
    """Stop strings, none of them empty."""
    hit: str | None = None
    """The stop string that was met, or None."""
    _held: str = ""

    def add(self, piece: str) -> str:
        """Return the text that may be shown after `piece` has come."""
        text = self._held + piece
        hits = [(at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.hit = min(hits)
            self._held = ""
            return text[:at]
        shown = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text held back, at the end of a generation."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
