"""Who owns which page of KV cache.  Pure bookkeeping: no tensors.

Invariant, checked by `check`: every page is free or has as many references as owners hold it; reservations never
exceed what is free.  A session reserves its whole room when it opens, so that an allocation inside it cannot fail.

Sessions open and close in the event loop and grow in the device thread, so every change is made under a lock.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode

PAGE = 64
"""Rows of a page: what is shared is whole ones, a tree's crown fits in few."""


@dataclass(eq=False)
class PagePool:
    """Pages 0 to `pages`, handed out so that a session's pages are one contiguous run where possible."""

    pages: int
    _references: dict[int, int] = field(default_factory=dict)
    _reserved: int = 0
    _lock: Lock = field(default_factory=Lock)

    @property
    def available(self) -> int:
        """Pages neither in use nor promised."""
        return self.pages - len(self._references) - self._reserved

    def reserve(self, count: int) -> None:
        """Promise `count` pages.  Raises Refused (full)."""
        with self._lock:
            if count > self.available:
                raise Refused(
                    f"this node is full: {count * PAGE} KV rows were asked for, {self.available * PAGE} are free",
                    FaultCode.FULL,
                )
            self._reserved += count

    def unreserve(self, count: int) -> None:
        """Take back a promise."""
        with self._lock:
            assert count <= self._reserved
            self._reserved -= count

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Turn `count` reserved pages into real ones, next to page `after` if those are free."""
        with self._lock:
            assert count <= self._reserved
            found = self._run_from(after + 1, count) if after is not None else None
            found = found or self._first_run(count) or self._any(count)
            self._reserved -= count
            for page in found:
                self._references[page] = 1
        return found

    def share(self, pages: Iterable[int]) -> None:
        """One more owner of each page."""
        with self._lock:
            for page in pages:
                assert page in self._references
                self._references[page] += 1

    def reference_count(self, page: int) -> int:
        """How many a page has; with more than one it must not be written."""
        return self._references.get(page, 0)

    def release(self, pages: Iterable[int]) -> None:
        """One owner less of each page; a page without owners is free."""
        with self._lock:
            for page in pages:
                self._references[page] -= 1
                if not self._references[page]:
                    del self._references[page]

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert the invariant against all owners' pages."""
        counted: dict[int, int] = {}
        for pages in owners:
            for page in pages:
                counted[page] = counted.get(page, 0) + 1
        assert counted == self._references, "pages are lost or owned twice"
        assert self.available >= 0, "more pages are promised than there are"

    def _run_from(self, start: int, count: int) -> list[int] | None:
        run = range(start, start + count)
        return list(run) if run.stop <= self.pages and not any(page in self._references for page in run) else None

    def _first_run(self, count: int) -> list[int] | None:
        length = 0
        for page in range(self.pages):
            length = 0 if page in self._references else length + 1
            if length == count:
                return list(range(page - count + 1, page + 1))
        return None

    def _any(self, count: int) -> list[int]:
        free = (page for page in range(self.pages) if page not in self._references)
        return [next(free) for _ in range(count)]


def runs(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Contiguous runs of pages as (first, count), in order."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and found[-1][0] + found[-1][1] == page:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found
