"""Texts in which earlier occurrences of two tokens are found at once."""

from array import array
from collections.abc import Sequence

SEPARATOR = -1
"""Between texts of one index: nothing matches across it."""


class IndexedText:
    """Tokens, and for each place the one before it where the same two tokens ended.

    Adding a token is one look into a dictionary.  With a `capacity` the oldest are forgotten once twice as many are
    there.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._clear()

    def _clear(self) -> None:
        self.tokens = array("q")
        self._before = array("q")
        """The place before, or -1."""
        self._last: dict[int, int] = {}
        """The last place by both tokens in one number."""

    def __len__(self) -> int:
        return len(self.tokens)

    def copy(self) -> "IndexedText":
        """As it is now; whoever adds to this one meanwhile does no harm."""
        copied = IndexedText(self._capacity)
        copied.add(self.tokens[:])
        return copied

    def add(self, tokens: Sequence[int]) -> bool:
        """At the end.  Returns whether the oldest were forgotten: places found before are void then."""
        for token in tokens:
            place = len(self.tokens)
            pair = (self.tokens[-1] if place else SEPARATOR) << 32 | token & 0xFFFFFFFF
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = place
            self.tokens.append(token)
        if self._capacity is None or len(self.tokens) <= 2 * self._capacity:
            return False
        kept = self.tokens[-self._capacity :]
        self._clear()
        self.add(kept)
        return True

    def ended_by(self, first: int, second: int, most: int) -> list[int]:
        """Places of `second` just after `first`, the latest first, at most so many."""
        found: list[int] = []
        place = self._last.get(first << 32 | second & 0xFFFFFFFF, -1)
        while place >= 0 and len(found) < most:
            found.append(place)
            place = self._before[place]
        return found
