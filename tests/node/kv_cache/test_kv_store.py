"""The KV cache never owns a page twice, loses a page, or writes to a shared one."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from treeswarm.errors import Refused
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.protocol.spans import Span
from treeswarm_node.kv_cache.kv_store import KVStore, SessionKV
from treeswarm_node.kv_cache.layer_state import KVShape, zeros_on_demand
from treeswarm_node.kv_cache.page_pool import PAGE, PagePool, contiguous_runs
from treeswarm_node.kv_cache.prefix_cache import MAX_IDLE_SHARE, UNIT_PAGES, PrefixUnit
from treeswarm_node.kv_cache.replay_log import ReplayChunk, ReplayLogBudget

ROWS = 12 * PAGE
SPAN = Span(0, 1)


def digest_of(stamps: list[int]) -> bytes:
    return blake2b(str(stamps).encode()).digest()


class SessionsMachine(RuleBasedStateMachine):
    """Open, write, keep, share and close sessions at random.

    Every trunk must always read back what was written to it.  A session that fits beside the open ones is not refused.
    """

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.store = KVStore({0: KVShape(1, 1, 1)}, ROWS, torch.float32, torch.device("cpu"))
        self.written: dict[SessionKV, list[int]] = {}
        self.stamp = 0
        self.budget = ReplayLogBudget(10**6)
        self.kept: dict[bytes, list[int]] = {}
        """Stamps of every text that was ever kept, by the digest of its end."""

    @rule(target=sessions, room=st.integers(1, 4 * PAGE), crown=st.integers(1, PAGE))
    def open(self, room: int, crown: int) -> SessionKV | None:
        free = self.store.free_tokens
        try:
            session = self.store.open(room, crown)
        except Refused as refused:
            assert refused.code == "full"
            assert -(-room // PAGE) * PAGE + -(-crown // PAGE) * PAGE > free
            assert self.store.free_tokens == free
            return None
        self.written[session] = []
        return session

    @rule(session=sessions, count=st.integers(1, 2 * PAGE))
    def write(self, session: SessionKV | None, count: int) -> None:
        if session not in self.written:
            return
        start = session.trunk_length
        end = min(start + count, session.trunk_room)
        session._grow_to(end)
        stamps = list(range(self.stamp, self.stamp + end - start))
        self.stamp += len(stamps)
        new_pages = session.trunk_pages[start // PAGE :]
        assert all(self.store.pool.reference_count(page) == 1 for page in new_pages)
        rows = session.trunk_rows(np.arange(start, end))
        self.store.layers[0].keys[0, torch.from_numpy(rows), 0] = torch.tensor(stamps, dtype=torch.float32)
        session.trunk_length = end
        self.written[session] += stamps

    @rule(session=sessions, data=st.data())
    def truncate(self, session: SessionKV | None, data: st.DataObject) -> None:
        """The session's room stays the same, and later rows are never written to pages that others read."""
        if session not in self.written:
            return
        length = data.draw(st.integers(0, session.trunk_length))
        pages, reserved = list(session.trunk_pages), session.reserved
        try:
            session.truncate(length)
        except Refused:
            assert (session.trunk_pages, session.reserved) == (pages, reserved)
            return
        assert len(session.trunk_pages) + session.reserved == len(pages) + reserved
        self.written[session] = self.written[session][:length]

    @rule(session=sessions)
    def keep(self, session: SessionKV | None) -> None:
        """Keep all whole units of the session, by digests of their stamps."""
        if session not in self.written:
            return
        stamps = self.written[session]
        ends = range(PREFIX_TOKENS, len(stamps) + 1, PREFIX_TOKENS)
        texts = {digest_of(stamps[:end]): stamps[:end] for end in ends}
        units = [
            PrefixUnit(tuple(session.trunk_pages[end // PAGE - UNIT_PAGES : end // PAGE]), self.make_chunk(text))
            for end, text in zip(ends, texts.values(), strict=True)
        ]
        self.store.prefixes.keep(SPAN, list(texts), units)
        for unit in units:
            assert unit.chunk is not None
            unit.chunk.release()
        self.kept |= texts

    def make_chunk(self, text: list[int]) -> ReplayChunk:
        self.budget.used_bytes += 7
        return ReplayChunk(self.budget, text[-PREFIX_TOKENS:], bytes(7))

    @rule(target=sessions, data=st.data(), room=st.integers(1, 4 * PAGE), crown=st.integers(1, PAGE))
    def share(self, data: st.DataObject, room: int, crown: int) -> SessionKV | None:
        """Open a session that begins with a kept text, as far as it is still cached."""
        if not self.kept:
            return None
        text = self.kept[data.draw(st.sampled_from(sorted(self.kept)))]
        ends = range(PREFIX_TOKENS, len(text) + 1, PREFIX_TOKENS)
        units = self.store.prefixes.find(SPAN, [digest_of(text[:end]) for end in ends])
        assert not self.store.prefixes.find(Span(0, 2), [digest_of(text[:end]) for end in ends])
        for unit, end in zip(units, ends, strict=False):
            assert unit.chunk is not None
            assert unit.chunk.references == 1
            assert unit.chunk.tokens == text[end - PREFIX_TOKENS : end]
        pages = [page for unit in units for page in unit.pages]
        rows = len(pages) * PAGE
        idle = sum(self.store.pool.reference_count(page) == 1 for page in pages)
        free = self.store.free_tokens - idle * PAGE  # the idle pages that it shares are in use from now on
        needed = -(-room // PAGE) * PAGE + -(-crown // PAGE) * PAGE
        try:
            session = self.store.open(rows + room, crown, pages)
        except Refused:
            assert needed > free
            return None
        assert needed <= free
        self.written[session] = text[:rows]
        return session

    @invariant()
    def idle_pages_are_limited(self) -> None:
        assert self.store.prefixes.idle_pages <= self.store.pool.pages * MAX_IDLE_SHARE
        assert self.budget.used_bytes == 7 * len(self.store.prefixes._units)

    @rule(session=consumes(sessions))
    def close(self, session: SessionKV | None) -> None:
        if session in self.written:
            session.close()
            session.close()
            del self.written[session]

    @invariant()
    def no_page_is_lost_or_owned_twice(self) -> None:
        self.store.check()

    @invariant()
    def trunks_read_back_what_was_written(self) -> None:
        for session, stamps in self.written.items():
            read = [
                stamp
                for first, count in session.trunk_runs(session.trunk_length)
                for stamp in self.store.layers[0].keys[0, first : first + count, 0].tolist()
            ]
            assert read == stamps

    def teardown(self) -> None:
        for session in self.written:
            session.close()
        assert self.store.free_tokens == self.store.pool.pages * PAGE
        self.store.prefixes.clear()
        assert self.store.pool.available == self.store.pool.pages
        assert self.budget.used_bytes == 0


TestSessions = SessionsMachine.TestCase
TestSessions.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_pages_of_a_session_are_one_run_if_possible() -> None:
    store = KVStore({0: KVShape(1, 1, 1)}, ROWS, torch.float32, torch.device("cpu"))
    first, second = store.open(4 * PAGE, 1), store.open(2 * PAGE, 1)
    for length in range(PAGE, 4 * PAGE + 1, PAGE):
        first._grow_to(length)
    second._grow_to(2 * PAGE)
    assert len(contiguous_runs(first.trunk_pages)) == len(contiguous_runs(second.trunk_pages)) == 1


def test_allocation_beyond_the_reservation_is_an_error() -> None:
    pool = PagePool(4)
    pool.reserve(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)


@dataclass(eq=False)
class PausingPool(PagePool):
    """Pauses between finding free pages and taking them."""

    has_found: threading.Event = field(default_factory=threading.Event)

    def _first_run(self, count: int) -> list[int] | None:
        run = super()._first_run(count)
        if not self.has_found.is_set():
            self.has_found.set()
            time.sleep(0.1)
        return run


def test_two_threads_never_own_the_same_page() -> None:
    """The device thread allocates pages while the event loop opens and closes sessions."""
    pool = PausingPool(8)
    pool.reserve(4)
    with ThreadPoolExecutor(1) as thread:
        grown = thread.submit(pool.allocate, 2)
        assert pool.has_found.wait(10)
        opened = pool.allocate(2)
        pool.check([opened, grown.result(10)])


def test_session_that_fills_the_pool_can_drop_shared_pages() -> None:
    """The prefix cache owns its shared pages as well, and evicts them for their replacements."""
    store = KVStore({0: KVShape(1, 1, 1)}, ROWS, torch.float32, torch.device("cpu"))
    first = store.open(PREFIX_TOKENS, 1)
    first._grow_to(PREFIX_TOKENS)
    pages = tuple(first.trunk_pages)
    store.prefixes.keep(SPAN, [digest_of([1])], [PrefixUnit(pages, None)])
    first.close()
    second = store.open(ROWS - PAGE, 1, list(pages))
    assert store.free_tokens == 0
    second.truncate(0)
    store.check()
    second._grow_to(ROWS - PAGE)
    second.close()
    store.prefixes.clear()
    assert store.pool.available == ROWS // PAGE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_take_memory_only_when_they_are_written(dtype: torch.dtype) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    pool = zeros_on_demand((4, 1 << 16, 256), dtype, torch.device("cpu"))
    assert pool.nbytes >= 128 << 20
    assert resident_bytes() - before < pool.nbytes / 4
    assert (pool.dtype, pool.shape) == (dtype, (4, 1 << 16, 256))
    assert pool.data_ptr() % 64 == 0
    pool[:, 7] = 1.0
    assert float(pool[:, :9].float().sum()) == 4 * 256
