"""Texts in which earlier occurrences of two tokens in a row are found at once."""

from array import array
from collections.abc import Sequence

SEPARATOR = -1
"""Stands between the texts of one index: no match goes across it."""


class IndexedText:
    """Tokens, with a link from each position to the one before where the same two tokens ended.

    Adding a token takes one dictionary lookup.  With a `capacity` the oldest tokens are forgotten once the text has
    twice as many.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._capacity = capacity
        self._clear()

    def _clear(self) -> None:
        self.tokens = array("q")
        self._before = array("q")
        """Position before with the same two tokens, or -1, for each position."""
        self._last: dict[int, int] = {}
        """Last position, by both tokens in one number."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)

    def copy(self) -> "IndexedText":
        """Return a copy of the text as it is now, safe while another thread adds tokens to this one."""
        copied = IndexedText(self._capacity)
        copied.add(self.tokens[:])
        return copied

    def add(self, tokens: Sequence[int]) -> bool:
        """Append tokens.  Returns whether the oldest ones were forgotten, which voids all positions found before."""
        for token in tokens:
            position = len(self.tokens)
            pair = (self.tokens[-1] if position else SEPARATOR) << 32 | token & 0xFFFFFFFF
            self._before.append(self._last.get(pair, -1))
            self._last[pair] = position
            self.tokens.append(token)
        if self._capacity is None or len(self.tokens) <= 2 * self._capacity:
            return False
        kept = self.tokens[-self._capacity :]
        self._clear()
        self.add(kept)
        return True

    def ended_by(self, first: int, second: int, most: int) -> list[int]:
        """Return at most `most` positions of `second` directly after `first`, the latest first."""
        positions: list[int] = []
        position = self._last.get(first << 32 | second & 0xFFFFFFFF, -1)
        while position >= 0 and len(positions) < most:
            positions.append(position)
            position = self._before[position]
        return positions
