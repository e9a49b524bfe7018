"""The prefix cache keeps trunks for sessions that begin with the same text.

It is bookkeeping without tensors.  The cache stores units of tokens by digest.  It owns their pages beside the sessions
that read them, so the pages outlive the session that computed them.  Pages that the cache alone owns are idle.  The
least recently used idle pages are evicted as soon as a session needs them.

A unit is always used more recently than the units after it in its text.  The least recently used unit is therefore
the end of some text.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.protocol.spans import Span
from treeswarm_node.kv_cache.page_pool import PAGE, PagePool
from treeswarm_node.kv_cache.replay_log import ReplayChunk, ReplayLogBudget

UNIT_PAGES = PREFIX_TOKENS // PAGE
assert PREFIX_TOKENS == UNIT_PAGES * PAGE, "a unit must be whole pages"
# Largest share of the pool that may be idle.  Kept pages lie between those of sessions: with all of the pool kept,
# every trunk would be fragmented.
MAX_IDLE_SHARE = 0.5

_Key = tuple[Span, bytes]
"""Blocks and digest.  A session may use a part of the blocks; in the other blocks the rows of its pages are unset."""


@dataclass(frozen=True, eq=False)
class PrefixUnit:
    """Holds `PREFIX_TOKENS` rows of a trunk."""

    pages: tuple[int, ...]
    """Pages that hold the rows."""
    chunk: ReplayChunk | None
    """Activations that were sent on for the rows, or None if the session kept no replay log."""
    tokens: tuple[int, ...] = ()
    """Token of each row, which rules at a tail count."""


@dataclass(eq=False)
class PrefixCache:
    """Keeps the prefixes of one loaded span.  It must be used from the event loop only."""

    pool: PagePool
    hits: int = 0
    """Number of sessions that began on units of the cache."""
    hit_tokens: int = 0
    """Number of tokens that those sessions took from the cache."""
    _units: OrderedDict[_Key, PrefixUnit] = field(default_factory=OrderedDict)
    """Units, least recently used first."""

    @property
    def pages(self) -> list[int]:
        """All pages that the cache owns."""
        return [page for unit in self._units.values() for page in unit.pages]

    @property
    def idle_pages(self) -> int:
        """Number of pages that the cache alone owns."""
        return sum(self.pool.reference_count(page) == 1 for page in self.pages)

    def find(self, span: Span, digests: Sequence[bytes]) -> list[PrefixUnit]:
        """Return the units of a text from its beginning, as many as are cached."""
        units: list[PrefixUnit] = []
        for digest in digests:
            unit = self._units.get((span, digest))
            if unit is None:
                break
            units.append(unit)
        self._touch(span, digests[: len(units)])
        return units

    def keep(self, span: Span, digests: Sequence[bytes], units: Sequence[PrefixUnit]) -> None:
        """Keep the last units of the text with these `digests`, except those that are cached already."""
        for digest, unit in zip(digests[len(digests) - len(units) :], units, strict=True):
            if (span, digest) not in self._units:
                self.pool.share(unit.pages)
                if unit.chunk is not None:
                    unit.chunk.share()
                self._units[span, digest] = unit
        self._touch(span, digests)
        self.trim()

    def make_room(self, pages: int) -> None:
        """Evict idle units until `pages` pages are available; evict nothing if all of them would not be enough."""
        if self.pool.available < pages <= self.pool.available + self.idle_pages:
            self._evict(self.idle_pages, lambda: pages <= self.pool.available)

    def make_room_for_log(self, budget: ReplayLogBudget, size: int) -> None:
        """Evict idle units until the budget has `size` bytes free; evict nothing if all would not be enough."""
        idle = sum(unit.chunk.size for unit in self._units.values() if unit.chunk is not None and self._is_idle(unit))
        if budget.free_bytes < size <= budget.free_bytes + idle:
            self._evict(self.idle_pages, lambda: size <= budget.free_bytes)

    def trim(self) -> None:
        """Evict idle units until they are at most `MAX_IDLE_SHARE` of the pool."""
        surplus = self.idle_pages - int(self.pool.pages * MAX_IDLE_SHARE)
        if surplus > 0:
            self._evict(surplus, lambda: False)

    def clear(self) -> None:
        """Release all units."""
        for key in list(self._units):
            self._drop(key)

    def _evict(self, pages: int, is_enough: Callable[[], bool]) -> None:
        """Drop idle units until at least `pages` pages were dropped or `is_enough` returns True."""
        for key in list(self._units):
            if pages <= 0 or is_enough():
                return
            unit = self._units[key]
            if self._is_idle(unit):
                pages -= len(unit.pages)
                self._drop(key)

    def _is_idle(self, unit: PrefixUnit) -> bool:
        return all(self.pool.reference_count(page) == 1 for page in unit.pages)

    def _drop(self, key: _Key) -> None:
        unit = self._units.pop(key)
        self.pool.release(unit.pages)
        if unit.chunk is not None:
            unit.chunk.release()

    def _touch(self, span: Span, digests: Iterable[bytes]) -> None:
        for digest in reversed(list(digests)):
            if (span, digest) in self._units:
                self._units.move_to_end((span, digest))
