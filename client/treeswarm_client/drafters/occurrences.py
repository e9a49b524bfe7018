"""Texts in which earlier occurrences of two tokens are found at once."""

from array import array
from collections.abc import Iterator, Sequence

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

    def add(self, tokens: Sequence[int]) -> None:
        """At the end.  Places found before are void where that forgets the oldest."""
        for token in tokens:
            place = len(self.tokens)
            pair = (self.tokens[-1] if place else SEPARATOR) << 32 | token & 0xFFFFFFFF
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = place
            self.tokens.append(token)
        if self._capacity is not None and len(self.tokens) > 2 * self._capacity:
            kept = self.tokens[-self._capacity :]
            self._clear()
            self.add(kept)

    def ended_by(self, first: int, second: int, most: int) -> Iterator[int]:
        """Places of `second` just after `first`, the latest first, at most so many."""
        place = self._last.get(first << 32 | second & 0xFFFFFFFF, -1)
        while place >= 0 and most:
            yield place
            place, most = self._before[place], most - 1
