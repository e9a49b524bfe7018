"""Trunks kept for sessions that begin with the same text: units of tokens by digest.  Bookkeeping: no tensors.

The index owns its pages beside the sessions that read them, so they outlive the session that computed them.  Pages that
nobody else owns are idle: they are given up, the longest unused first, as soon as a session needs the room.

An order of use in which a unit is always newer than the units after it makes the oldest unit the end of some text.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.protocol.spans import Span
from treeswarm_node.kv_cache.page_pool import PAGE, PagePool
from treeswarm_node.kv_cache.replay_log import ReplayChunk, ReplayLogBudget

UNIT_PAGES = PREFIX_TOKENS // PAGE
assert PREFIX_TOKENS == UNIT_PAGES * PAGE, "what is shared is whole pages"
# Kept pages lie between those of sessions: with all of the pool kept, every trunk would be in pieces.
MOST_IDLE = 0.5

_Key = tuple[Span, bytes]
"""A session may use a part of the blocks; the other blocks' rows of its pages hold nothing."""


@dataclass(frozen=True, eq=False)
class PrefixUnit:
    """`PREFIX_TOKENS` rows of a trunk."""

    pages: tuple[int, ...]
    chunk: ReplayChunk | None
    """What was sent on for them; None where no journal was kept."""


@dataclass(eq=False)
class PrefixCache:
    """Of one loaded span.  For the event loop alone."""

    pool: PagePool
    hits: int = 0
    """Sessions that began on units of it."""
    hit_tokens: int = 0
    _units: OrderedDict[_Key, PrefixUnit] = field(default_factory=OrderedDict)
    """Oldest use first."""

    @property
    def pages(self) -> list[int]:
        """All that it owns."""
        return [page for unit in self._units.values() for page in unit.pages]

    @property
    def idle_pages(self) -> int:
        """That nobody else owns."""
        return sum(self.pool.reference_count(page) == 1 for page in self.pages)

    def find(self, span: Span, digests: Sequence[bytes]) -> list[PrefixUnit]:
        """The units of a text from its beginning, as many as are here."""
        found: list[PrefixUnit] = []
        for digest in digests:
            unit = self._units.get((span, digest))
            if unit is None:
                break
            found.append(unit)
        self._touch(span, digests[: len(found)])
        return found

    def keep(self, span: Span, digests: Sequence[bytes], units: Sequence[PrefixUnit]) -> None:
        """Keep the last units of the text that `digests` name, those that are not here yet."""
        for digest, unit in zip(digests[len(digests) - len(units) :], units, strict=True):
            if (span, digest) not in self._units:
                self.pool.share(unit.pages)
                if unit.chunk is not None:
                    unit.chunk.share()
                self._units[span, digest] = unit
        self._touch(span, digests)
        self.trim()

    def make_room(self, pages: int) -> None:
        """Give up what is idle until so many pages are available; nothing, if all of it would not be enough."""
        if self.pool.available < pages <= self.pool.available + self.idle_pages:
            self._give_up(self.idle_pages, lambda: pages <= self.pool.available)

    def make_room_for_log(self, budget: ReplayLogBudget, size: int) -> None:
        """The same, for bytes of journals."""
        idle = sum(unit.chunk.size for unit in self._units.values() if unit.chunk is not None and self._idle(unit))
        if budget.free_bytes < size <= budget.free_bytes + idle:
            self._give_up(self.idle_pages, lambda: size <= budget.free_bytes)

    def trim(self) -> None:
        """Not more than a share of the pool stays idle."""
        surplus = self.idle_pages - int(self.pool.pages * MOST_IDLE)
        if surplus > 0:
            self._give_up(surplus, lambda: False)

    def clear(self) -> None:
        """Own nothing."""
        for key in list(self._units):
            self._drop(key)

    def _give_up(self, pages: int, enough: Callable[[], bool]) -> None:
        """Drop idle units, at least so many pages of them, but no more once that is `enough`."""
        for key in list(self._units):
            if pages <= 0 or enough():
                return
            unit = self._units[key]
            if self._idle(unit):
                pages -= len(unit.pages)
                self._drop(key)

    def _idle(self, unit: PrefixUnit) -> bool:
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
