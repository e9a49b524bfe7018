"""The page pool and the KV store: nothing owned twice, nothing lost, forks see what they shared."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from treeswarm.errors import Refused
from treeswarm_node.kv import KVShape, KVStore, SessionKV
from treeswarm_node.pages import PAGE, PagePool, runs

ROWS = 12 * PAGE


class Sessions(RuleBasedStateMachine):
    """Open, write, fork and close sessions at random; every trunk must always read back what was written to it."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.store = KVStore(1, KVShape(1, 1, 1), ROWS, torch.float32, torch.device("cpu"))
        self.written: dict[SessionKV, list[int]] = {}
        self.stamp = 0

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
        rows = session.trunk_rows(np.arange(start, end))
        self.store.keys[0, 0, torch.from_numpy(rows), 0] = torch.tensor(stamps, dtype=torch.float32)
        session.trunk_length = end
        self.written[session] += stamps

    @rule(session=sessions, data=st.data())
    def truncate(self, session: SessionKV | None, data: st.DataObject) -> None:
        """Nothing is given back; what comes next is written over what was forgotten; never in pages a fork reads."""
        if session not in self.written:
            return
        length = data.draw(st.integers(0, session.trunk_length))
        if any(self.store.pool.shared(page) for page in session.trunk_pages[length // PAGE :]):
            with pytest.raises(AssertionError):
                session.truncate(length)
            return
        free, pages = self.store.free_tokens, list(session.trunk_pages)
        session.truncate(length)
        assert (self.store.free_tokens, session.trunk_pages) == (free, pages)
        self.written[session] = self.written[session][:length]

    @rule(target=sessions, session=sessions, data=st.data())
    def fork(self, session: SessionKV | None, data: st.DataObject) -> SessionKV | None:
        if session not in self.written:
            return None
        length = data.draw(st.integers(0, session.trunk_length))
        try:
            child = session.fork(length)
        except Refused:
            return None
        self.written[child] = self.written[session][:length]
        return child

    @rule(session=consumes(sessions))
    def close(self, session: SessionKV | None) -> None:
        if session in self.written:
            session.close()
            session.close()
            del self.written[session]

    @invariant()
    def nothing_lost_or_owned_twice(self) -> None:
        self.store.check()

    @invariant()
    def trunks_read_back(self) -> None:
        for session, stamps in self.written.items():
            read = [
                stamp
                for first, count in session.trunk_runs(session.trunk_length)
                for stamp in self.store.keys[0, 0, first : first + count, 0].tolist()
            ]
            assert read == stamps

    def teardown(self) -> None:
        for session in self.written:
            session.close()
        assert self.store.free_tokens == self.store.pool.pages * PAGE


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def test_a_sessions_pages_are_one_run_while_there_is_room() -> None:
    store = KVStore(1, KVShape(1, 1, 1), ROWS, torch.float32, torch.device("cpu"))
    one, two = store.open(4 * PAGE, 1), store.open(2 * PAGE, 1)
    for length in range(PAGE, 4 * PAGE + 1, PAGE):
        one._grow_to(length)
    two._grow_to(2 * PAGE)
    assert len(runs(one.trunk_pages)) == len(runs(two.trunk_pages)) == 1


def test_an_allocation_beyond_its_reservation_is_our_own_bug() -> None:
    pool = PagePool(4)
    pool.reserve(1)
    with pytest.raises(AssertionError):
        pool.allocate(2)
