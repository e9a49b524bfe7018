"""The replay log always holds the activations of exactly the rows in the KV cache's trunk."""

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
from treeswarm_node.kv_cache.kv_store import KVStore
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.kv_cache.replay_log import ReplayChunk, ReplayLog, ReplayLogBudget

ROW = 3
TRUNK, CROWN = 400, 12


def activations(tokens: list[int], stamps: list[int]) -> bytes:
    """Return activations of which each row holds its token and the stamp of the forward that computed it."""
    rows = [[token, stamp % 256, stamp // 256] for token, stamp in zip(tokens, stamps, strict=True)]
    return np.array(rows, np.uint8).reshape(-1, ROW).tobytes()


class ReplayLogMachine(RuleBasedStateMachine):
    """A node's state machine, KV cache and replay log run one random session.

    The KV cache's keys hold the same stamps as the log's activations.
    """

    @initialize(rows=st.integers(1, 20))
    def begin(self, rows: int) -> None:
        self.store = KVStore({0: KVShape(1, 1, 1)}, 1024, torch.float32, torch.device("cpu"))
        self.kv = self.store.open(TRUNK, CROWN)
        self.budget = ReplayLogBudget(10 * ROW * (TRUNK + CROWN))
        self.held: list[ReplayChunk] = []
        replay_log = self.budget.open(ROW, TRUNK, CROWN)
        assert replay_log is not None
        self.replay_log: ReplayLog = replay_log
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
        """Commit a path or nothing, then add a tree, of which the upstream node may have left out rows."""
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
        """Another node was lost: truncate the trunk in the session, the log and the KV cache."""
        length = data.draw(st.integers(0, self.session.tree.trunk_length))
        self.epoch, self.seq = self.epoch + 1, 0
        self.session.resume(self.epoch, Resumption(length, self.next_id))
        self.next_id += 1
        self.kv.truncate(length)
        self.replay_log.truncate(length)

    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        """Make a chunk of the first rows that are in none, and let another owner hold it for a while."""
        rows = data.draw(st.integers(0, len(self.replay_log) - self.replay_log._frozen_rows))
        chunk = self.replay_log.freeze(rows)
        if data.draw(st.booleans()):
            self.held.append(chunk.share())

    @rule()
    def release_chunks(self) -> None:
        while self.held:
            self.held.pop().release()

    @invariant()
    def budget_matches_what_is_held(self) -> None:
        """A chunk counts once, however many owners hold it."""
        chunks = {id(chunk): chunk.size for chunk in (*self.replay_log._chunks, *self.held)}
        assert self.budget.used_bytes == self.replay_log.size + sum(chunks.values())
        assert self.replay_log.size + self.replay_log._frozen_rows * ROW == ROW * (TRUNK + CROWN)

    def receive(self, parents: list[int], commit: list[int], **changes: object) -> None:
        tokens = [(self.next_id + i) * 7 % 50 for i in range(len(parents))]
        append = append_of(self.seq, self.next_id, parents, tokens, commit=commit)
        append = Append(**{**vars(append), "epoch": self.epoch, **changes})  # type: ignore[arg-type]
        self.seq, self.next_id = self.seq + 1, self.next_id + len(parents)
        (step,) = self.session.receive(append)
        self.compute(self.session.start(step))
        self.session.finish(step)

    def compute(self, step: Step) -> None:
        """Write the step's rows to the KV cache and the log, as a forward would."""
        self.kv.commit(step)
        stamps = list(range(self.stamp, self.stamp + step.rows))
        self.stamp += step.rows
        if step.rows:
            rows = torch.from_numpy(self.kv.new_rows(step))
            self.store.layers[0].keys[0, rows, 0] = torch.tensor(stamps, dtype=torch.float32)
            self.store.layers[0].values[0, rows, 0] = torch.from_numpy(step.tokens).float()
        self.replay_log.record(step, activations(step.tokens.tolist(), stamps))

    @invariant()
    def replay_equals_the_trunk(self) -> None:
        length = self.kv.trunk_length
        assert len(self.replay_log) == length == self.session.tree.trunk_length
        rows = torch.from_numpy(self.kv.trunk_rows(np.arange(length)))
        stamps = [int(stamp) for stamp in self.store.layers[0].keys[0, rows, 0].tolist()]
        tokens = [int(token) for token in self.store.layers[0].values[0, rows, 0].tolist()]
        replacement = NodeSession(SessionTerms(99, TRUNK, CROWN, 10_000, 50, ROW, Resumption(length, 10**6)))
        replayed = list(self.replay_log.replay(99))
        assert [token for append in replayed for token in append.tokens.tolist()] == tokens
        assert b"".join(append.hidden for append in replayed) == activations(tokens, stamps)
        steps = [step for append in replayed for step in replacement.receive(append)]
        assert sum(step.rows for step in steps) == replacement.tree.trunk_length == length
        assert replacement.tree.tip == 10**6


TestReplayLog = ReplayLogMachine.TestCase
TestReplayLog.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_long_trunk_is_replayed_in_pieces_in_order() -> None:
    replay_log = ReplayLogBudget(10**9).open(ROW, 3 * REPLAY_ROWS, 1)
    assert replay_log is not None
    rows = 2 * REPLAY_ROWS + 7
    session = NodeSession(SessionTerms(1, 3 * REPLAY_ROWS, 1, 10**6, 50, 0))
    (step,) = session.receive(append_of(0, 1, range(rows), [i % 50 for i in range(rows)], prefill=True))
    replay_log.record(step, b"abc" * rows)
    pieces = list(replay_log.replay(7))
    assert [(piece.epoch, piece.seq, piece.rows) for piece in pieces] == [
        (7, 0, REPLAY_ROWS),
        (7, 1, REPLAY_ROWS),
        (7, 2, 7),
    ]
    assert all(piece.replay and piece.prefill for piece in pieces)


def test_budget_is_never_exceeded_and_is_returned() -> None:
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


def test_closed_log_replays_nothing() -> None:
    replay_log = ReplayLogBudget(1000).open(ROW, 50, 10)
    assert replay_log is not None
    session = NodeSession(SessionTerms(1, 50, 10, 100, 50, 0))
    (step,) = session.receive(append_of(0, 1, [0, 1], [5, 6], prefill=True))
    replay_log.record(step, b"abcdef")
    assert len(replay_log) == 2
    replay_log.close()
    assert list(replay_log.replay(2)) == []


@pytest.mark.parametrize("length", [0, 1, 2, 5])
def test_truncating_beyond_the_end_changes_nothing(length: int) -> None:
    replay_log = ReplayLogBudget(1000).open(ROW, 50, 10)
    assert replay_log is not None
    session = NodeSession(SessionTerms(1, 50, 10, 100, 50, 0))
    (step,) = session.receive(append_of(0, 1, [0, 1], [5, 6], prefill=True))
    replay_log.record(step, b"abcdef")
    replay_log.truncate(length)
    assert len(replay_log) == min(length, 2)
    assert b"".join(append.hidden for append in replay_log.replay(2)) == b"abcdef"[: ROW * length]


def test_shared_chunks_count_once_in_the_budget() -> None:
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


def test_log_without_memory_for_its_copy_is_closed() -> None:
    budget = ReplayLogBudget(ROW * 60)
    replay_log = budget.open(ROW, 50, 10)
    assert replay_log is not None
    session = NodeSession(SessionTerms(1, 50, 10, 100, 50, 0))
    (step,) = session.receive(append_of(0, 1, [0, 1], [5, 6], prefill=True))
    replay_log.record(step, b"abcdef")
    held = replay_log.freeze(2).share()
    assert not replay_log.truncate(1)
    assert budget.used_bytes == held.size == 2 * ROW
    held.release()
    assert budget.used_bytes == 0
