"""The node's state machine: order, credit, room, hints; slots and masks against first principles."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treeswarm.errors import Refused
from treeswarm.messages import Answers, Append, Hint, Resumption
from treeswarm.replay import replay
from treeswarm.sampling import SamplingSettings
from treeswarm.session import NodeSession, SessionTerms, answered_ids, incoming_rows

TERMS = SessionTerms(epoch=1, trunk_room=100, crown_room=8, credit_rows=32, vocab_size=50, row_bytes=0)
SESSION = b"s" * 16


def append(
    seq: int, first_id: int, parents: list[int], *, commit: list[int] | None = None, **changes: object
) -> Append:
    """A tree append; `changes` override fields."""
    made = Append(
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
    return replace(made, **changes)  # type: ignore[arg-type]


def started(terms: SessionTerms = TERMS) -> NodeSession:
    """Ids 1..4 are the trunk."""
    session = NodeSession(terms)
    (step,) = session.receive(append(0, 1, [0, 1, 2, 3], prefill=True, answers=Answers.LAST))
    session.start(step)
    session.finish(step)
    return session


def test_prefill_is_a_causal_chain_answered_at_its_end() -> None:
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


def test_a_fresh_append_drops_what_descent_would_keep() -> None:
    session = started()
    session.receive(append(1, 5, [4, 5, 5, 6]))
    (step,) = session.receive(append(2, 9, [5] * 8, commit=[5], fresh=True))
    assert step.slots.tolist() == list(range(8))
    assert session.tree.ids.tolist() == list(range(9, 17))
    with pytest.raises(Refused, match="neither the tip nor a live"):
        session.receive(append(3, 17, [6]))


def test_appends_that_overtake_wait_for_their_turn() -> None:
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
def test_what_breaks_the_contract_is_refused(wrong: Append, code: str) -> None:
    session = started()
    before = session.tree
    with pytest.raises(Refused) as refused:
        session.receive(wrong)
    assert refused.value.code == code
    if code == "replayed":
        assert session.tree is before
        assert len(session.receive(append(1, 5, [4]))) == 1


def test_a_text_longer_than_its_room_is_refused() -> None:
    session = started(replace(TERMS, trunk_room=5))
    session.receive(append(1, 5, [4, 5]))
    with pytest.raises(Refused, match="5 were reserved"):
        session.receive(append(2, 7, [6], commit=[5, 6]))


def test_frames_of_an_old_epoch_are_dropped_and_counted() -> None:
    session = started()
    assert session.receive(append(1, 5, [4], epoch=0)) == []
    assert session.late_frames == 1


def test_credit_comes_back_when_rows_are_done() -> None:
    session = started(replace(TERMS, credit_rows=4))
    (step,) = session.receive(append(1, 5, [4, 4, 4]))
    with pytest.raises(Refused, match="4 were granted"):
        session.receive(append(2, 8, [4, 4]))
    session = started(replace(TERMS, credit_rows=4))
    (step,) = session.receive(append(1, 5, [4, 4, 4]))
    session.finish(step)
    assert len(session.receive(append(2, 8, [4, 4]))) == 1


def test_rows_dead_by_a_commit_behind_them_are_not_computed() -> None:
    session = started()
    (tree,) = session.receive(append(1, 5, [4, 5, 5, 6, 7]))
    (after,) = session.receive(append(2, 10, [8], commit=[5, 6]))
    ran = session.start(tree)
    assert (ran.append.first_id + np.flatnonzero(ran.computed)).tolist() == [5, 6, 8]
    assert answered_ids(ran).tolist() == [5, 6, 8]
    assert session.start(after) is after


def test_a_hint_skips_dead_rows_once_and_forwards_that() -> None:
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


def test_incoming_rows_are_those_upstream_sent() -> None:
    session = started()
    (step,) = session.receive(append(1, 5, [4, 4, 4, 4], skipped=np.array([False, True, False, False])))
    session.hint(Hint(SESSION, trunk_length=5, tip=8))
    ran = session.start(step)
    assert answered_ids(ran).tolist() == [8]
    assert incoming_rows(ran).tolist() == [2]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_slots_never_collide_and_masks_follow_parents(data: st.DataObject) -> None:
    """Random rounds; a dictionary of parents says who may see whom."""
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


# ---------------------------------------------------------------- after a loss


def state_of(session: NodeSession) -> tuple[object, ...]:
    """All that a refused resumption must leave alone."""
    tree = session.tree
    return (session.terms, tree.trunk_length, tree.tip, tree.next_id, tree.ids.tolist(), session.received)


def test_a_resumed_session_goes_on_from_the_cut_and_drops_what_is_late() -> None:
    session = started()
    (tree,) = session.receive(append(1, 5, [4, 5]))
    session.receive(append(2, 7, [6], commit=[5, 6]))
    session.resume(3, Resumption(5, 8))
    assert (session.tree.trunk_length, session.tree.tip, len(session.tree)) == (5, 8, 0)
    assert session.received == 0
    session.finish(tree)  # of the old epoch: its credit is forgotten already
    for late in (append(3, 8, [7]), append(0, 9, [8], epoch=2)):
        assert session.receive(late) == []
    assert session.late_frames == 2
    (step,) = session.receive(append(0, 9, [8, 9], epoch=3))
    assert step.positions.tolist() == [5, 6]
    assert step.slots.tolist() == [0, 1]
    with pytest.raises(Refused, match="neither the tip nor a live"):
        session.receive(append(1, 11, [6], epoch=3))  # the old epoch's names mean nothing now


def test_a_resumption_gives_all_credit_back_once() -> None:
    session = started(replace(TERMS, credit_rows=4))
    (old,) = session.receive(append(1, 5, [4, 5, 6]))
    session.resume(2, Resumption(4, 8))
    (new,) = session.receive(append(0, 9, [8, 9, 10], epoch=2))
    session.finish(old)
    with pytest.raises(Refused, match="5 rows in flight, 4 were granted"):
        session.receive(append(1, 12, [11, 12], epoch=2))


def test_what_overtook_before_a_resumption_is_forgotten() -> None:
    session = started()
    assert session.receive(append(2, 6, [5])) == []
    session.resume(2, Resumption(4, 7))
    (step,) = session.receive(append(0, 8, [7], epoch=2))
    assert step.append.seq == 0
    assert len(session.receive(append(1, 9, [8], epoch=2))) == 1


@pytest.mark.parametrize(
    ("epoch", "length", "code"), [(1, 4, "replayed"), (0, 4, "replayed"), (2, 5, "no-journal"), (9, 100, "no-journal")]
)
def test_a_resumption_that_cannot_be_changes_nothing(epoch: int, length: int, code: str) -> None:
    session = started()
    session.receive(append(1, 5, [4, 5]))
    before = state_of(session)
    with pytest.raises(Refused) as refused:
        session.resume(epoch, Resumption(length, 9))
    assert refused.value.code == code
    assert state_of(session) == before
    assert len(session.receive(append(2, 7, [6], commit=[5, 6]))) == 1


def replacement(length: int, **changes: object) -> NodeSession:
    """A node that takes a lost one's place in epoch 3, in a session of so many tokens; the next id is 21."""
    return NodeSession(replace(TERMS, epoch=3, resumption=Resumption(length, 20), **changes))  # type: ignore[arg-type]


def replayed(length: int, pieces: int) -> list[Append]:
    """The trunk in so many appends."""
    (whole,) = replay(3, [i % 50 for i in range(length)])
    edges = np.linspace(0, length, pieces + 1).astype(int)
    return [
        replace(
            whole,
            seq=seq,
            first_id=int(start) + 1,
            parents=whole.parents[start:end],
            tokens=whole.tokens[start:end],
            skipped=whole.skipped[start:end],
        )
        for seq, (start, end) in enumerate(itertools.pairwise(edges.tolist()))
    ]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_appends_wait_for_the_whole_replay_in_any_order(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 16))
    replays = replayed(length, data.draw(st.integers(1, length)))
    appends = [append(0, 21, [20, 21], epoch=3), append(1, 23, [22], commit=[21, 22], epoch=3)]
    session = replacement(length, credit_rows=1000)
    steps = []
    given_replays = 0
    for one in data.draw(st.permutations([*replays, *appends])):
        steps += session.receive(one)
        given_replays += one.replay
        assert given_replays == len(replays) or not any(not step.append.replay for step in steps)
    assert [(step.append.replay, step.append.seq) for step in steps] == [
        *((True, i) for i in range(len(replays))),
        (False, 0),
        (False, 1),
    ]
    assert np.concatenate([step.positions for step in steps if step.append.replay]).tolist() == list(range(length))
    assert steps[-1].trunk_length == length + 2
    assert session.tree.trunk_length == length + 2


def test_a_replay_of_nothing_is_over_at_once() -> None:
    session = replacement(0)
    assert session.tree.tip == 20
    assert len(session.receive(append(0, 21, [20], epoch=3))) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefill": False}, "a replay is a prefill"),
        ({"answers": Answers.LAST}, "that nobody answers"),
        ({"commit": np.array([1], np.uint32)}, "a replay is a prefill"),
        ({"tokens": np.array([1, 2, 50], np.uint32)}, "outside the vocabulary"),
        ({"parents": np.array([0, 1, 1], np.uint32)}, "no chain"),
    ],
    ids=["a tree", "answered", "commits", "vocabulary", "no chain"],
)
def test_what_is_no_replay_is_refused(changes: dict[str, object], words: str) -> None:
    (whole,) = replayed(3, 1)
    with pytest.raises(Refused, match=words):
        replacement(3).receive(replace(whole, **changes))  # type: ignore[arg-type]


def test_a_replay_past_its_end_is_refused() -> None:
    (whole,) = replayed(5, 1)
    with pytest.raises(Refused, match="past its end"):
        replacement(4).receive(whole)
    session = replacement(5)
    session.receive(whole)
    more = replace(replayed(6, 6)[5], seq=1)
    with pytest.raises(Refused, match="past its end"):
        session.receive(more)
    with pytest.raises(Refused, match="past its end"):
        started(replace(TERMS, epoch=1)).receive(replace(more, epoch=1, seq=0))  # nobody was lost here


def test_half_a_replay_is_nothing_to_resume_from() -> None:
    session = replacement(6)
    session.receive(replayed(6, 2)[0])
    before = state_of(session)
    with pytest.raises(Refused, match="3 tokens are here") as refused:
        session.resume(4, Resumption(2, 30))
    assert refused.value.code == "no-journal"
    assert state_of(session) == before
    session.receive(replayed(6, 2)[1])
    session.resume(4, Resumption(2, 30))
    assert session.tree.trunk_length == 2


def test_a_replay_is_not_bound_by_the_clients_credit() -> None:
    session = replacement(40, credit_rows=8)
    for one in replayed(40, 4):
        assert len(session.receive(one)) == 1
    assert session.replayed_rows == 40
    assert len(session.receive(append(0, 21, [20] * 8, epoch=3))) == 1
    with pytest.raises(Refused, match="9 rows in flight, 8 were granted"):
        session.receive(append(1, 29, [28], epoch=3))


def test_a_replays_room_comes_back_when_it_was_passed_on() -> None:
    session = replacement(40)
    first, *others = replayed(40, 4)
    (step,) = session.receive(first)
    assert session.replayed_rows == 10
    session.finish(step)
    assert session.replayed_rows == 0
    for one in others:
        session.receive(one)
    session.resume(4, Resumption(40, 30))
    assert session.replayed_rows == 0
    session.finish(step)
    assert session.replayed_rows == 0
