"""What a node sent for its trunk, and would send again, is what its KV cache holds, grown and cut as you please."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tests.node.conftest import append_of

from treeswarm.protocol.messages import Append, Resumption
from treeswarm.session.replay import REPLAY_ROWS
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm.session.steps import Step
from treeswarm_node.kv_cache.kv_store import KVShape, KVStore
from treeswarm_node.kv_cache.replay_log import ReplayChunk, ReplayLog, ReplayLogBudget

ROW = 3
TRUNK, CROWN = 400, 12


def activations(tokens: list[int], stamps: list[int]) -> bytes:
    """A row's tell which forward computed it."""
    rows = [[token, stamp % 256, stamp // 256] for token, stamp in zip(tokens, stamps, strict=True)]
    return np.array(rows, np.uint8).reshape(-1, ROW).tobytes()


class Journals(RuleBasedStateMachine):
    """A node's state machine, its KV and its journal on one random session; the KV's keys hold stamps as the journal's
    activations do."""

    @initialize(rows=st.integers(1, 20))
    def begin(self, rows: int) -> None:
        self.store = KVStore(1, KVShape(1, 1, 1), 1024, torch.float32, torch.device("cpu"))
        self.kv = self.store.open(TRUNK, CROWN)
        self.budget = ReplayLogBudget(10 * ROW * (TRUNK + CROWN))
        self.held: list[ReplayChunk] = []
        journal = self.budget.open(ROW, TRUNK, CROWN)
        assert journal is not None
        self.journal: ReplayLog = journal
        self.session = NodeSession(SessionTerms(1, TRUNK, CROWN, 10_000, 50, 0))
        self.epoch, self.seq, self.next_id, self.stamp = 1, 0, 1, 0
        self.prefill(rows)

    @rule(rows=st.integers(1, 20))
    def prefill(self, rows: int) -> None:
        tree = self.session.tree
        if tree.trunk_length + rows > TRUNK:
            return
        parents = [tree.tip, *range(self.next_id, self.next_id + rows - 1)]
        self.receive(parents, [], prefill=True)

    @rule(data=st.data(), fresh=st.booleans(), dead=st.booleans())
    def grow(self, data: st.DataObject, fresh: bool, dead: bool) -> None:
        """Commit a path, perhaps; then a tree, of which upstream may have left rows out."""
        tree = self.session.tree
        usable = [i for i in range(len(tree)) if not set(tree.ids[tree.ancestors[i]]) & self.session._skipped]
        path: list[int] = []
        if usable and tree.trunk_length + len(tree) < TRUNK and data.draw(st.booleans()):
            end = data.draw(st.sampled_from(usable))
            path = tree.ids[np.flatnonzero(tree.ancestors[end])].tolist()
        after = tree.commit_alone(path) if fresh else tree.commit(path)[0]
        above = [after.tip, *after.ids.tolist()]
        parents: list[int] = []
        for i in range(data.draw(st.integers(0, CROWN - len(after)))):
            parents.append(data.draw(st.sampled_from([*above, *range(self.next_id, self.next_id + i)])))
        skipped = np.array([dead and i % 3 == 2 for i in range(len(parents))], np.bool_)
        self.receive(parents, path, fresh=fresh, skipped=skipped)

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """Another node was lost: the trunk is cut back, here and in the KV cache."""
        length = data.draw(st.integers(0, self.session.tree.trunk_length))
        self.epoch, self.seq = self.epoch + 1, 0
        self.session.resume(self.epoch, Resumption(length, self.next_id))
        self.next_id += 1
        self.kv.truncate(length)
        self.journal.truncate(length)

    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        """The first rows after what is sealed become a chunk, which others hold for a while."""
        rows = data.draw(st.integers(0, len(self.journal) - self.journal._frozen_rows))
        chunk = self.journal.freeze(rows)
        if data.draw(st.booleans()):
            self.held.append(chunk.share())

    @rule()
    def let_go(self) -> None:
        while self.held:
            self.held.pop().release()

    @invariant()
    def what_is_taken_is_there(self) -> None:
        """Whoever holds a chunk, it is paid for once."""
        chunks = {id(chunk): chunk.size for chunk in (*self.journal._chunks, *self.held)}
        assert self.budget.used_bytes == self.journal.size + sum(chunks.values())
        assert self.journal.size + self.journal._frozen_rows * ROW == ROW * (TRUNK + CROWN)

    def receive(self, parents: list[int], commit: list[int], **changes: object) -> None:
        tokens = [(self.next_id + i) * 7 % 50 for i in range(len(parents))]
        made = append_of(self.seq, self.next_id, parents, tokens, commit=commit)
        append = Append(**{**vars(made), "epoch": self.epoch, **changes})  # type: ignore[arg-type]
        self.seq, self.next_id = self.seq + 1, self.next_id + len(parents)
        (step,) = self.session.receive(append)
        self.compute(self.session.start(step))
        self.session.finish(step)

    def compute(self, step: Step) -> None:
        """As the device would."""
        self.kv.commit(step)
        stamps = list(range(self.stamp, self.stamp + step.rows))
        self.stamp += step.rows
        if step.rows:
            rows = torch.from_numpy(self.kv.new_rows(step))
            self.store.keys[0, 0, rows, 0] = torch.tensor(stamps, dtype=torch.float32)
            self.store.values[0, 0, rows, 0] = torch.from_numpy(step.tokens).float()
        self.journal.record(step, activations(step.tokens.tolist(), stamps))

    @invariant()
    def a_replay_is_the_trunk(self) -> None:
        length = self.kv.trunk_length
        assert len(self.journal) == length == self.session.tree.trunk_length
        rows = torch.from_numpy(self.kv.trunk_rows(np.arange(length)))
        stamps = [int(stamp) for stamp in self.store.keys[0, 0, rows, 0].tolist()]
        tokens = [int(token) for token in self.store.values[0, 0, rows, 0].tolist()]
        newcomer = NodeSession(SessionTerms(99, TRUNK, CROWN, 10_000, 50, ROW, Resumption(length, 10**6)))
        replayed = list(self.journal.replay(99))
        assert [token for append in replayed for token in append.tokens.tolist()] == tokens
        assert b"".join(append.hidden for append in replayed) == activations(tokens, stamps)
        steps = [step for append in replayed for step in newcomer.receive(append)]
        assert sum(step.rows for step in steps) == newcomer.tree.trunk_length == length
        assert newcomer.tree.tip == 10**6


TestJournals = Journals.TestCase
TestJournals.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_a_long_trunk_is_replayed_in_pieces_in_order() -> None:
    journal = ReplayLogBudget(10**9).open(ROW, 3 * REPLAY_ROWS, 1)
    assert journal is not None
    rows = 2 * REPLAY_ROWS + 7
    session = NodeSession(SessionTerms(1, 3 * REPLAY_ROWS, 1, 10**6, 50, 0))
    (step,) = session.receive(append_of(0, 1, range(rows), [i % 50 for i in range(rows)], prefill=True))
    journal.record(step, b"abc" * rows)
    pieces = list(journal.replay(7))
    assert [(piece.epoch, piece.seq, piece.rows) for piece in pieces] == [
        (7, 0, REPLAY_ROWS),
        (7, 1, REPLAY_ROWS),
        (7, 2, 7),
    ]
    assert all(piece.replay and piece.prefill for piece in pieces)


def test_a_budget_is_never_exceeded_and_comes_back() -> None:
    budget = ReplayLogBudget(1000)
    first = budget.open(10, 50, 10)
    assert first is not None
    assert budget.open(10, 50, 10) is None
    second = budget.open(10, 30, 10)
    assert second is not None
    assert budget.used_bytes == 1000
    first.close()
    first.close()
    assert budget.used_bytes == 400
    second.close()
    assert budget.used_bytes == 0


def test_a_closed_journal_has_nothing_to_replay() -> None:
    journal = ReplayLogBudget(1000).open(ROW, 50, 10)
    assert journal is not None
    session = NodeSession(SessionTerms(1, 50, 10, 100, 50, 0))
    (step,) = session.receive(append_of(0, 1, [0, 1], [5, 6], prefill=True))
    journal.record(step, b"abcdef")
    assert len(journal) == 2
    journal.close()
    assert list(journal.replay(2)) == []


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_forgetting_more_than_there_is_forgets_nothing_else(length: int) -> None:
    journal = ReplayLogBudget(1000).open(ROW, 50, 10)
    assert journal is not None
    session = NodeSession(SessionTerms(1, 50, 10, 100, 50, 0))
    (step,) = session.receive(append_of(0, 1, [0, 1], [5, 6], prefill=True))
    journal.record(step, b"abcdef")
    journal.truncate(length)
    assert len(journal) == min(length, 2)
    assert b"".join(append.hidden for append in journal.replay(2)) == b"abcdef"[: ROW * length]


def test_two_journals_hold_what_they_share_once() -> None:
    budget = ReplayLogBudget(ROW * 120)
    first = budget.open(ROW, 50, 10)
    assert first is not None
    session = NodeSession(SessionTerms(1, 50, 10, 100, 50, 0))
    (step,) = session.receive(append_of(0, 1, range(5), [5, 6, 7, 8, 9], prefill=True))
    first.record(step, b"abcdefghijklmno")
    chunk = first.freeze(4)
    second = budget.open(ROW, 54, 10, [chunk])
    assert second is not None
    assert budget.used_bytes == ROW * 120
    assert [(append.tokens.tolist(), append.hidden) for append in second.replay(2)] == [([5, 6, 7, 8], b"abcdefghijkl")]
    first.close()
    assert budget.used_bytes == ROW * 64
    assert second.truncate(1)
    assert budget.used_bytes == ROW * 64
    assert [(append.tokens.tolist(), append.hidden) for append in second.replay(2)] == [([5], b"abc")]
    second.close()
    assert budget.used_bytes == 0


def test_a_journal_that_cannot_afford_its_own_copy_closes() -> None:
    budget = ReplayLogBudget(ROW * 60)
    journal = budget.open(ROW, 50, 10)
    assert journal is not None
    session = NodeSession(SessionTerms(1, 50, 10, 100, 50, 0))
    (step,) = session.receive(append_of(0, 1, [0, 1], [5, 6], prefill=True))
    journal.record(step, b"abcdef")
    held = journal.freeze(2).share()
    assert not journal.truncate(1)
    assert budget.used_bytes == held.size == 2 * ROW
    held.release()
    assert budget.used_bytes == 0
