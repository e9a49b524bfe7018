"""Count the references to KV cache pages: bookkeeping without tensors.

Invariant, asserted by `check`: every page is free or has as many references as owners hold it, and the pages that are
reserved never exceed those that are free.  A session reserves all its pages when it opens, so that an allocation
within the reservation cannot fail.

Sessions open and close in the event loop and grow in the device thread, so every change is made under a lock.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import Lock

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode

PAGE = 64
"""Number of rows in a page.  Sharing is by whole pages, and a tree's crown fits in few of them."""


@dataclass(eq=False)
class PagePool:
    """Allocates the pages 0 to `pages` - 1, so that a session's pages are one contiguous run where possible."""

    pages: int
    """Number of pages."""
    _references: dict[int, int] = field(default_factory=dict)
    """Number of owners by page, for pages in use."""
    _reserved: int = 0
    """Number of pages that are promised and not yet allocated."""
    _lock: Lock = field(default_factory=Lock)

    @property
    def available(self) -> int:
        """Number of pages that are neither in use nor reserved."""
        return self.pages - len(self._references) - self._reserved

    def reserve(self, count: int) -> None:
        """Reserve `count` pages.  Raises Refused (full)."""
        with self._lock:
            if count > self.available:
                raise Refused(
                    f"this node is full: {count * PAGE} KV rows were requested, {self.available * PAGE} are free",
                    FaultCode.FULL,
                )
            self._reserved += count

    def unreserve(self, count: int) -> None:
        """Cancel the reservation of `count` pages."""
        with self._lock:
            assert count <= self._reserved
            self._reserved -= count

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Allocate `count` reserved pages, directly behind page `after` if those are free."""
        with self._lock:
            assert count <= self._reserved
            pages = self._run_from(after + 1, count) if after is not None else None
            pages = pages or self._first_run(count) or self._first_free(count)
            self._reserved -= count
            for page in pages:
                self._references[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page."""
        with self._lock:
            for page in pages:
                assert page in self._references
                self._references[page] += 1

    def reference_count(self, page: int) -> int:
        """Return the number of owners of a page; a page with more than one must not be written."""
        return self._references.get(page, 0)

    def release(self, pages: Iterable[int]) -> None:
        """Remove one reference from each page; a page without references is free."""
        with self._lock:
            for page in pages:
                self._references[page] -= 1
                if not self._references[page]:
                    del self._references[page]

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Assert the invariant, given the pages of every owner."""
        counted: dict[int, int] = {}
        for pages in owners:
            for page in pages:
                counted[page] = counted.get(page, 0) + 1
        assert counted == self._references, "pages are lost or owned twice"
        assert self.available >= 0, "more pages are reserved than there are"

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

    def _first_free(self, count: int) -> list[int]:
        free = (page for page in range(self.pages) if page not in self._references)
        return [next(free) for _ in range(count)]


def contiguous_runs(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Return the contiguous runs of pages as (first, count), in order."""
    runs: list[tuple[int, int]] = []
    for page in pages:
        if runs and runs[-1][0] + runs[-1][1] == page:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((page, 1))
    return runs
