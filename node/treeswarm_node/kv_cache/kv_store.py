"""The KV cache of a span: one pool of rows for all sessions, trunks paged in it, crowns beside them.

    trunk   logical positions 0, 1, 2 … in pages, append-only; read as contiguous runs of rows, never gathered; full
            pages at its beginning may be read by other sessions too
    crown   rows a tree's nodes write to, in pages of the session's own

Moving a committed path is a copy of a handful of rows a block.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.protocol.messages import MAX_CROWN
from treeswarm.session.steps import Step
from treeswarm_node.kv_cache.page_pool import PAGE, PagePool, runs
from treeswarm_node.kv_cache.prefix_cache import PrefixCache


@dataclass(frozen=True)
class KVShape:
    """Of one row in one block."""

    kv_heads: int
    key_dim: int
    value_dim: int


# How many numbers of one session's K and V in a block are worth gathering to attend to many sessions at once, instead
# of reading them in place.  On one core, 16 sessions of one token: 8,000 numbers are 5.7 times as fast gathered, 33,000
# 3.4 times, 131,000 1.0 to 1.4 times, 524,000 5 times as slow.
GATHERED = 1 << 17


class KVStore:
    """K and V of `blocks` blocks, `tokens` rows each."""

    def __init__(self, blocks: int, shape: KVShape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pool = PagePool(max(1, tokens // PAGE))
        rows = self.pool.pages * PAGE
        # Heads first: a head's run of rows is then one strided view that a batched product reads in place.
        self.keys = torch.zeros(blocks, shape.kv_heads, rows, shape.key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(blocks, shape.kv_heads, rows, shape.value_dim, dtype=dtype, device=device)
        self.sessions: set[SessionKV] = set()
        self.prefixes = PrefixCache(self.pool)

    @property
    def max_gathered_rows(self) -> int:
        """The most rows of a session for which it is."""
        return GATHERED // sum(pool.shape[1] * pool.shape[-1] for pool in (self.keys, self.values))

    @property
    def free_tokens(self) -> int:
        """Rows not promised to any session; what is only kept for later sessions counts as free."""
        return (self.pool.available + self.prefixes.idle_pages) * PAGE

    @property
    def shared_pages(self) -> int:
        """Pages that several open sessions read."""
        read = Counter(page for session in self.sessions for page in list(session.trunk_pages))
        return sum(readers > 1 for readers in read.values())

    def open(self, trunk_room: int, crown_room: int, shared: Sequence[int] = ()) -> "SessionKV":
        """Reserve a session's whole room.  Its trunk begins with the `shared` pages, which are full and stay as they
        are.  Raises Refused (full)."""
        assert crown_room <= MAX_CROWN
        crown_pages, own = _pages_for(crown_room), _pages_for(trunk_room) - len(shared)
        self.pool.share(shared)
        try:
            self.reserve(own + crown_pages)
        except Refused:
            self.pool.release(shared)
            raise
        session = SessionKV(self, trunk_room, self.pool.allocate(crown_pages), own, list(shared), len(shared) * PAGE)
        self.sessions.add(session)
        return session

    def reserve(self, pages: int) -> None:
        """Promise pages; what is only kept for later sessions gives way.  Raises Refused (full)."""
        self.prefixes.make_room(pages)
        self.pool.reserve(pages)

    def check(self) -> None:
        """Assert that no page is lost or owned twice."""
        owned = [pages for session in self.sessions for pages in (session.trunk_pages, session.crown_pages)]
        self.pool.check([*owned, self.prefixes.pages])

    def copy_rows(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy rows in every block."""
        source, target = (torch.from_numpy(rows).to(self.keys.device) for rows in (sources, targets))
        for pool in (self.keys, self.values):
            pool[:, :, target] = pool[:, :, source]


@dataclass(eq=False)
class SessionKV:
    """One session's rows."""

    store: KVStore
    trunk_room: int
    crown_pages: list[int]
    reserved: int
    """Pages promised and not yet allocated."""
    trunk_pages: list[int] = field(default_factory=list)
    trunk_length: int = 0
    crown_positions: NDArray[np.int64] = field(init=False)
    """Of the row last written to each crown slot."""
    invalid: bool = False
    """A step of this session was not computed: those after it cannot be."""

    def __post_init__(self) -> None:
        self.crown_positions = np.zeros(len(self.crown_pages) * PAGE, np.int64)

    def commit(self, step: Step) -> None:
        """Move the step's committed crown rows to the end of the trunk, and make room for a prefill's rows."""
        count = len(step.commit_slots)
        length = self.trunk_length + count
        assert length == step.trunk_length
        self._grow_to(length + (step.rows if step.append.prefill else 0))
        if count:
            self.store.copy_rows(
                self.crown_rows(step.commit_slots), self.trunk_rows(np.arange(self.trunk_length, length))
            )
        self.trunk_length = length + (step.rows if step.append.prefill else 0)
        self.crown_positions[step.slots] = step.positions[: len(step.slots)]

    def truncate(self, length: int) -> None:
        """Forget trunk rows from `length` on.  Their pages stay the session's, and what follows is written into them;
        in place of those that others read it gets new ones.  Raises Refused (full), and then nothing has changed."""
        assert length <= self.trunk_length
        pool, rest = self.store.pool, self.trunk_pages[length // PAGE :]
        if theirs := [page for page in rest if pool.reference_count(page) > 1]:
            # Pages that only the index keeps beside us can make room for their own successors, once we let them go.
            early = theirs[1:] if length % PAGE else theirs
            pool.release(early)
            try:
                self.store.reserve(len(theirs))
            except Refused:
                pool.share(early)
                raise
            self.reserved += len(theirs)
            self._leave(theirs, set(early), length)
        self.trunk_length, self.invalid = length, False

    def _leave(self, theirs: list[int], left: set[int], length: int) -> None:
        """Give up the pages from `length` on, but for those that were `left` before; the rows before it in a page that
        others read are copied."""
        pool, whole = self.store.pool, length // PAGE
        partial = np.arange(whole * PAGE, length)
        copied = len(partial) > 0 and self.trunk_pages[whole] in theirs
        kept = whole + (len(partial) > 0 and not copied)
        sources = self.trunk_rows(partial)
        given, self.trunk_pages = self.trunk_pages[kept:], self.trunk_pages[:kept]
        if copied:
            self._grow_to(length)
            self.store.copy_rows(sources, self.trunk_rows(partial))
        pool.release([page for page in given if page not in left])
        pool.reserve(len(given) - len(theirs))
        self.reserved += len(given) - len(theirs)

    def new_rows(self, step: Step) -> NDArray[np.int64]:
        """Where the step's new rows are written, int64 [rows]."""
        return self.trunk_rows(step.positions) if step.append.prefill else self.crown_rows(step.slots)

    def trunk_runs(self, length: int) -> list[tuple[int, int]]:
        """The first `length` trunk rows as contiguous (first row, rows) runs, in order."""
        found = []
        for page, count in runs(self.trunk_pages):
            rows = min(count * PAGE, length)
            if rows <= 0:
                break
            found.append((page * PAGE, rows))
            length -= rows
        return found

    def trunk_rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return _rows(self.trunk_pages, positions)

    def crown_rows(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        return _rows(self.crown_pages, slots)

    def close(self) -> None:
        """Give everything back."""
        if self not in self.store.sessions:
            return
        self.store.sessions.discard(self)
        self.store.pool.release(self.trunk_pages)
        self.store.pool.release(self.crown_pages)
        self.store.pool.unreserve(self.reserved)
        self.trunk_pages, self.crown_pages, self.reserved = [], [], 0
        self.store.prefixes.trim()

    def _grow_to(self, length: int) -> None:
        missing = _pages_for(length) - len(self.trunk_pages)
        if missing > 0:
            last = self.trunk_pages[-1] if self.trunk_pages else None
            self.trunk_pages += self.store.pool.allocate(missing, after=last)
            self.reserved -= missing


def _pages_for(rows: int) -> int:
    return -(-rows // PAGE)


def _rows(pages: list[int], logical: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray(pages, np.int64)[logical // PAGE] * PAGE + logical % PAGE
