"""A node's state machine: order, credit, room and hints; slots and masks follow from the parents."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.errors import Refused
from treeswarm.protocol.messages import Answers, Append, Hint
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.session import NodeSession, SessionTerms, answered_ids, incoming_rows

TERMS = SessionTerms(epoch=1, trunk_room=100, crown_room=8, credit_rows=32, vocab_size=50, row_bytes=0)
SESSION = b"s" * 16


def append(
    seq: int, first_id: int, parents: list[int], *, commit: list[int] | None = None, **changes: object
) -> Append:
    """Return a tree append whose fields `changes` override."""
    tree_append = Append(
        epoch=1,
        seq=seq,
        commit=np.array(commit or [], np.uint32),
        first_id=first_id,
        parents=np.array(parents, np.uint32),
        tokens=np.arange(first_id, first_id + len(parents)).astype(np.uint32) % 50,
        prefill=False,
        answers=Answers.ALL,
        settings=SamplingSettings(),
        skipped=np.zeros(len(parents), np.bool_),
    )
    return replace(tree_append, **changes)  # type: ignore[arg-type]


def started(terms: SessionTerms = TERMS) -> NodeSession:
    """Return a session whose trunk is the ids 1 to 4."""
    session = NodeSession(terms)
    (step,) = session.receive(append(0, 1, [0, 1, 2, 3], prefill=True, answers=Answers.LAST))
    session.start(step)
    session.finish(step)
    return session


def test_a_prefill_is_a_causal_chain_answered_at_its_end() -> None:
    (step,) = NodeSession(TERMS).receive(append(0, 1, [0, 1, 2], prefill=True, answers=Answers.LAST))
    assert step.positions.tolist() == [0, 1, 2]
    assert step.visible.tolist() == np.tri(3, dtype=bool).tolist()
    assert answered_ids(step).tolist() == [3]


def test_a_tree_sees_its_ancestors_and_commits_by_slots() -> None:
    session = started()
    (step,) = session.receive(append(1, 5, [4, 5, 5, 6]))
    assert step.positions.tolist() == [4, 5, 5, 6]
    assert step.slots.tolist() == [0, 1, 2, 3]
    assert step.visible.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    (after,) = session.receive(append(2, 9, [8], commit=[5, 6, 8]))
    assert after.commit_slots.tolist() == [0, 1, 3]
    assert after.trunk_length == 7
    assert after.positions.tolist() == [7]
    assert after.slots.tolist() == [0]


def test_a_tree_in_flight_can_be_extended() -> None:
    session = started()
    session.receive(append(1, 5, [4, 5]))
    (step,) = session.receive(append(2, 7, [6, 4]))
    assert step.slots.tolist() == [2, 3]
    assert step.visible.astype(int).tolist() == [[1, 1, 1, 0], [0, 0, 0, 1]]


def test_a_fresh_append_drops_nodes_below_the_new_tip() -> None:
    session = started()
    session.receive(append(1, 5, [4, 5, 5, 6]))
    (step,) = session.receive(append(2, 9, [5] * 8, commit=[5], fresh=True))
    assert step.slots.tolist() == list(range(8))
    assert session.tree.ids.tolist() == list(range(9, 17))
    with pytest.raises(Refused, match="neither the tip nor a live"):
        session.receive(append(3, 17, [6]))


def test_appends_that_overtake_another_wait_for_it() -> None:
    session = started()
    assert session.receive(append(2, 6, [5])) == []
    assert [s.append.seq for s in session.receive(append(1, 5, [4]))] == [1, 2]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (append(0, 5, [4]), "replayed"),
        (append(90, 5, [4]), "malformed"),
        (append(1, 4, [4]), "bad-tree"),
        (append(1, 5, [3]), "bad-tree"),
        (append(1, 5, [4], commit=[5]), "bad-tree"),
        (append(1, 5, [4], epoch=2), "malformed"),
        (append(1, 5, [4], tokens=np.array([50], np.uint32)), "malformed"),
        (append(1, 5, [4], hidden=b"xx"), "malformed"),
        (append(1, 5, [4] * 9), "out-of-room"),
        (append(1, 5, [4] * 33), "out-of-credit"),
        (append(1, 5, [4, 5], prefill=True, skipped=np.array([True, False])), "bad-tree"),
        (append(1, 5, [4, 4], prefill=True), "bad-tree"),
    ],
    ids=str,
)
def test_an_append_that_breaks_the_contract_is_refused(wrong: Append, code: str) -> None:
    session = started()
    before = session.tree
    with pytest.raises(Refused) as refused:
        session.receive(wrong)
    assert refused.value.code == code
    if code == "replayed":
        assert session.tree is before
        assert len(session.receive(append(1, 5, [4]))) == 1


def test_a_text_longer_than_the_reserved_room_is_refused() -> None:
    session = started(replace(TERMS, trunk_room=5))
    session.receive(append(1, 5, [4, 5]))
    with pytest.raises(Refused, match="5 were reserved"):
        session.receive(append(2, 7, [6], commit=[5, 6]))


def test_frames_of_an_old_epoch_are_dropped_and_counted() -> None:
    session = started()
    assert session.receive(append(1, 5, [4], epoch=0)) == []
    assert session.late_frames == 1


def test_credit_returns_when_rows_are_finished() -> None:
    session = started(replace(TERMS, credit_rows=4))
    (step,) = session.receive(append(1, 5, [4, 4, 4]))
    with pytest.raises(Refused, match="4 were granted"):
        session.receive(append(2, 8, [4, 4]))
    session = started(replace(TERMS, credit_rows=4))
    (step,) = session.receive(append(1, 5, [4, 4, 4]))
    session.finish(step)
    assert len(session.receive(append(2, 8, [4, 4]))) == 1


def test_rows_killed_by_a_later_commit_are_not_computed() -> None:
    session = started()
    (tree,) = session.receive(append(1, 5, [4, 5, 5, 6, 7]))
    (after,) = session.receive(append(2, 10, [8], commit=[5, 6]))
    ran = session.start(tree)
    assert (ran.append.first_id + np.flatnonzero(ran.computed)).tolist() == [5, 6, 8]
    assert answered_ids(ran).tolist() == [5, 6, 8]
    assert session.start(after) is after


def test_rows_killed_by_a_hint_are_skipped_downstream_too() -> None:
    session = started()
    (tree,) = session.receive(append(1, 5, [4, 5, 5, 6]))
    session.hint(Hint(SESSION, trunk_length=6, tip=7))
    session.hint(Hint(SESSION, trunk_length=5, tip=6))
    ran = session.start(tree)
    assert answered_ids(ran).tolist() == [5, 7]
    downstream = started()
    (below,) = downstream.receive(replace(ran.append, skipped=~ran.computed))
    assert answered_ids(below).tolist() == [5, 7]
    assert below.visible[:, below.slots].astype(int).tolist() == [[1, 0], [1, 1]]
    with pytest.raises(Refused, match="declared dead"):
        downstream.receive(append(2, 9, [6], commit=[5, 6]))


def test_children_of_skipped_rows_are_skipped() -> None:
    session = started()
    session.receive(append(1, 5, [4, 4], skipped=np.array([True, False])))
    (step,) = session.receive(append(2, 7, [5, 6, 7]))
    assert answered_ids(step).tolist() == [8]


def test_incoming_rows_are_those_that_upstream_sent() -> None:
    session = started()
    (step,) = session.receive(append(1, 5, [4, 4, 4, 4], skipped=np.array([False, True, False, False])))
    session.hint(Hint(SESSION, trunk_length=5, tip=8))
    ran = session.start(step)
    assert answered_ids(ran).tolist() == [8]
    assert incoming_rows(ran).tolist() == [2]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_slots_never_collide_and_masks_follow_parents(data: st.DataObject) -> None:
    """In random rounds a dictionary of parents says which row may see which."""
    session = started(replace(TERMS, crown_room=24, credit_rows=1000, trunk_room=1000))
    parent_of: dict[int, int] = {}
    where: dict[int, int] = {}
    next_id, tip, trunk = 5, 4, 4
    alive: set[int] = set()

    def above(node: int) -> list[int]:
        line = []
        while node in parent_of and node in alive:
            line.append(node)
            node = parent_of[node]
        return line

    for seq in range(1, data.draw(st.integers(2, 6))):
        path: list[int] = []
        if alive and data.draw(st.booleans()):
            path = above(data.draw(st.sampled_from(sorted(alive))))[::-1]
        if path:
            tip = path[-1]
            trunk += len(path)
            alive = {n for n in alive if tip in above(n) and n != tip}
        count = data.draw(st.integers(1, 24 - len(alive))) if len(alive) < 24 else 0
        parents = []
        for i in range(count):
            parents.append(data.draw(st.sampled_from([tip, *sorted(alive)])))
            parent_of[next_id + i] = parents[-1]
            alive.add(next_id + i)
        (step,) = session.receive(append(seq, next_id, parents, commit=path))
        assert step.commit_slots.tolist() == [where[n] for n in path]
        assert step.trunk_length == trunk
        for row, node in enumerate(range(next_id, next_id + count)):
            where[node] = int(step.slots[row])
            line = above(node)
            assert step.positions[row] == trunk + len(line) - 1
            assert sorted(np.flatnonzero(step.visible[row])) == sorted(where[n] for n in line)
        assert len({where[n] for n in alive}) == len(alive)
        next_id += count
