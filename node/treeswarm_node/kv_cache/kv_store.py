"""Store what a span's layers keep in one pool of rows for all sessions, which holds paged trunks and crowns.

    trunk   rows of the positions 0, 1, 2 … in pages, append-only.  Attention reads them in place as contiguous runs; it
            gathers only short ones (`MAX_GATHERED`).  Other sessions may read full pages at the beginning too.
    crown   the rows that a tree's nodes are written to, in pages of the session's own.

A slot is a place in the crown's pages; a row without more is a row of the pool.  Committing a path copies a handful of
rows per block.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.protocol.messages import MAX_CROWN
from treeswarm.session.steps import Step
from treeswarm_node.kv_cache.layer_state import KVRows, KVShape, LayerState
from treeswarm_node.kv_cache.page_pool import PAGE, PagePool, contiguous_runs
from treeswarm_node.kv_cache.prefix_cache import PrefixCache

# Largest number of values in one session's K and V of a block for which gathering is worth it.  Short sessions of
# similar size are gathered and computed together (`attention/padded.py`); others are read in place, session by session.
# Measured on one core with 16 sessions of one token: gathering 8,000 values is 5.7 times as fast, 33,000 values 3.4
# times, 131,000 values 1.0 to 1.4 times; 524,000 values are 5 times as slow.
MAX_GATHERED = 1 << 17


class KVStore:
    """Stores the K and V of attention layers in a pool of `tokens` rows each, rounded down to whole pages.

    `shapes` gives the KV rows of each layer, by the layer's index in the model.  A layer in `givers` keeps none and
    reads those of another layer.
    """

    def __init__(
        self,
        shapes: Mapping[int, KVShape],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        givers: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.pool = PagePool(max(1, tokens // PAGE))
        rows = self.pool.pages * PAGE
        self._own = {index: KVRows(shape, rows, dtype, device) for index, shape in shapes.items()}
        self.layers = self._own | {taker: self._own[giver] for taker, giver in givers.items()}
        self.sessions: set[SessionKV] = set()
        self.prefixes = PrefixCache(self.pool)

    @property
    def states(self) -> Collection[LayerState]:
        """What each layer keeps."""
        return self._own.values()

    def keeps_rows_of(self, layer: int) -> bool:
        """Return whether the layer with this index keeps rows of its own."""
        return layer in self._own

    @property
    def row_bytes(self) -> int:
        """Number of bytes that all layers together keep per token."""
        return sum(state.row_bytes for state in self.states)

    @property
    def max_gathered_rows(self) -> int:
        """Largest number of rows of a session for which gathering is worth it; see `MAX_GATHERED`."""
        return MAX_GATHERED // max(layer.shape.numbers for layer in self._own.values())

    @property
    def free_tokens(self) -> int:
        """Number of rows that a new session could reserve; rows that only the prefix cache holds count as free."""
        return (self.pool.available + self.prefixes.idle_pages) * PAGE

    @property
    def shared_pages(self) -> int:
        """Number of pages that several open sessions read."""
        readers_of = Counter(page for session in self.sessions for page in list(session.trunk_pages))
        return sum(readers > 1 for readers in readers_of.values())

    def open(self, trunk_room: int, crown_room: int, shared: Sequence[int] = ()) -> "SessionKV":
        """Reserve all rows of a session, whose trunk begins with the pages `shared`.

        Those pages are full and are never written.  Raises Refused (full).
        """
        assert crown_room <= MAX_CROWN
        crown_pages, own_pages = _pages_for(crown_room), _pages_for(trunk_room) - len(shared)
        self.pool.share(shared)
        try:
            self.reserve(own_pages + crown_pages)
        except Refused:
            self.pool.release(shared)
            raise
        crown = self.pool.allocate(crown_pages)
        session = SessionKV(self, trunk_room, crown, own_pages, list(shared), len(shared) * PAGE)
        self.sessions.add(session)
        return session

    def reserve(self, pages: int) -> None:
        """Reserve pages, evicting idle pages of the prefix cache if necessary.  Raises Refused (full)."""
        self.prefixes.make_room(pages)
        self.pool.reserve(pages)

    def check(self) -> None:
        """Assert that no page is lost or owned twice."""
        owned = [pages for session in self.sessions for pages in (session.trunk_pages, session.crown_pages)]
        self.pool.check([*owned, self.prefixes.pages])

    def copy_rows(self, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        """Copy rows of the pool in every layer; both arguments are int64 [n]."""
        for state in self.states:
            state.copy_rows(sources, targets)


@dataclass(eq=False)
class SessionKV:
    """Manages one session's rows of the KV cache."""

    store: KVStore
    trunk_room: int
    """Largest number of rows that the trunk may have."""
    crown_pages: list[int]
    """Pages of the crown."""
    reserved: int
    """Number of pages that are reserved and not yet allocated."""
    trunk_pages: list[int] = field(default_factory=list)
    """Pages of the trunk, in order of position."""
    trunk_length: int = 0
    """Number of rows in the trunk."""
    crown_positions: NDArray[np.int64] = field(init=False)
    """Position in the text of the row last written to each crown slot, int64 [slots]."""
    invalid: bool = False
    """Whether a step of this session was not computed, so that later steps cannot be computed either."""

    def __post_init__(self) -> None:
        self.crown_positions = np.zeros(len(self.crown_pages) * PAGE, np.int64)

    def commit(self, step: Step) -> None:
        """Move the step's committed crown rows to the end of the trunk, and allocate pages for a prefill's rows."""
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
        """Drop the trunk rows from `length` on.

        The session keeps their pages and writes later rows into them; pages that others read are replaced by new ones.
        Raises Refused (full), and then nothing has changed.
        """
        assert length <= self.trunk_length
        pool, rest = self.store.pool, self.trunk_pages[length // PAGE :]
        if shared := [page for page in rest if pool.reference_count(page) > 1]:
            # Pages whose only other owner is the prefix cache can be evicted for their replacements once released.
            released = shared[1:] if length % PAGE else shared
            pool.release(released)
            try:
                self.store.reserve(len(shared))
            except Refused:
                pool.share(released)
                raise
            self.reserved += len(shared)
            self._replace_pages(shared, set(released), length)
        self.trunk_length, self.invalid = length, False

    def _replace_pages(self, shared: list[int], released: set[int], length: int) -> None:
        """Release the pages from `length` on, except those that are `released` already.

        `shared` are the pages among them that others read too.  If the page that contains `length` is shared, the rows
        before `length` in it are copied to a new page.
        """
        pool, whole = self.store.pool, length // PAGE
        partial = np.arange(whole * PAGE, length)
        copied = len(partial) > 0 and self.trunk_pages[whole] in shared
        kept = whole + (len(partial) > 0 and not copied)
        sources = self.trunk_rows(partial)
        dropped, self.trunk_pages = self.trunk_pages[kept:], self.trunk_pages[:kept]
        if copied:
            self._grow_to(length)
            self.store.copy_rows(sources, self.trunk_rows(partial))
        pool.release([page for page in dropped if page not in released])
        pool.reserve(len(dropped) - len(shared))
        self.reserved += len(dropped) - len(shared)

    def new_rows(self, step: Step) -> NDArray[np.int64]:
        """Return the pool rows that the step's new rows are written to, int64 [rows]."""
        return self.trunk_rows(step.positions) if step.append.prefill else self.crown_rows(step.slots)

    def trunk_runs(self, length: int) -> list[tuple[int, int]]:
        """Return the first `length` trunk rows as contiguous runs (first pool row, rows), in order."""
        trunk_runs = []
        for page, count in contiguous_runs(self.trunk_pages):
            rows = min(count * PAGE, length)
            if rows <= 0:
                break
            trunk_runs.append((page * PAGE, rows))
            length -= rows
        return trunk_runs

    def trunk_rows(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pool rows of trunk positions, both int64 [n]."""
        return _pool_rows(self.trunk_pages, positions)

    def crown_rows(self, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the pool rows of crown slots, both int64 [n]."""
        return _pool_rows(self.crown_pages, slots)

    def close(self) -> None:
        """Release all pages and reservations.  Closing again does nothing."""
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


def _pool_rows(pages: list[int], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pool rows of these places within the pages, both int64 [n]."""
    return np.asarray(pages, np.int64)[places // PAGE] * PAGE + places % PAGE
