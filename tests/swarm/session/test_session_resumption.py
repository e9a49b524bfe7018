"""A node's state machine after a loss: survivors cut back, replacements wait until they have the whole text."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.swarm.session.test_session import TERMS, append, started

from treeswarm.errors import Refused
from treeswarm.protocol.messages import Answers, Append, Resumption
from treeswarm.session.replay import replay
from treeswarm.session.session import NodeSession


def state_of(session: NodeSession) -> tuple[object, ...]:
    """Return all that a refused resumption must not change."""
    tree = session.tree
    return (session.terms, tree.trunk_length, tree.tip, tree.next_id, tree.ids.tolist(), session.received)


def test_a_resumed_session_goes_on_and_drops_late_appends() -> None:
    session = started()
    (tree,) = session.receive(append(1, 5, [4, 5]))
    session.receive(append(2, 7, [6], commit=[5, 6]))
    session.resume(3, Resumption(5, 8))
    assert (session.tree.trunk_length, session.tree.tip, len(session.tree)) == (5, 8, 0)
    assert session.received == 0
    session.finish(tree)  # The step is of the old epoch, whose credit was returned already.
    for late in (append(3, 8, [7]), append(0, 9, [8], epoch=2)):
        assert session.receive(late) == []
    assert session.late_frames == 2
    (step,) = session.receive(append(0, 9, [8, 9], epoch=3))
    assert step.positions.tolist() == [5, 6]
    assert step.slots.tolist() == [0, 1]
    with pytest.raises(Refused, match="neither the tip nor a live"):
        session.receive(append(1, 11, [6], epoch=3))  # Ids of the old epoch's crown are dead.


def test_a_resumption_returns_all_credit_once() -> None:
    session = started(replace(TERMS, credit_rows=4))
    (old,) = session.receive(append(1, 5, [4, 5, 6]))
    session.resume(2, Resumption(4, 8))
    assert session.receive(append(0, 9, [8, 9, 10], epoch=2))
    session.finish(old)
    with pytest.raises(Refused, match="5 rows in flight, but only 4 were granted"):
        session.receive(append(1, 12, [11, 12], epoch=2))


def test_a_resumption_forgets_appends_that_overtook_another() -> None:
    session = started()
    assert session.receive(append(2, 6, [5])) == []
    session.resume(2, Resumption(4, 7))
    (step,) = session.receive(append(0, 8, [7], epoch=2))
    assert step.append.seq == 0
    assert len(session.receive(append(1, 9, [8], epoch=2))) == 1


@pytest.mark.parametrize(
    ("epoch", "length", "code"), [(1, 4, "replayed"), (0, 4, "replayed"), (2, 5, "no-journal"), (9, 100, "no-journal")]
)
def test_an_impossible_resumption_changes_nothing(epoch: int, length: int, code: str) -> None:
    session = started()
    session.receive(append(1, 5, [4, 5]))
    before = state_of(session)
    with pytest.raises(Refused) as refused:
        session.resume(epoch, Resumption(length, 9))
    assert refused.value.code == code
    assert state_of(session) == before
    assert len(session.receive(append(2, 7, [6], commit=[5, 6]))) == 1


def replacement(length: int, **changes: object) -> NodeSession:
    """Return the session of a replacement node in epoch 3; the text has `length` tokens, and the next id is 21."""
    return NodeSession(replace(TERMS, epoch=3, resumption=Resumption(length, 20), **changes))  # type: ignore[arg-type]


def replayed(length: int, pieces: int) -> list[Append]:
    """Return the replay of a trunk of `length` tokens in `pieces` appends."""
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
    for received in data.draw(st.permutations([*replays, *appends])):
        steps += session.receive(received)
        given_replays += received.replay
        assert given_replays == len(replays) or not any(not step.append.replay for step in steps)
    assert [(step.append.replay, step.append.seq) for step in steps] == [
        *((True, i) for i in range(len(replays))),
        (False, 0),
        (False, 1),
    ]
    assert np.concatenate([step.positions for step in steps if step.append.replay]).tolist() == list(range(length))
    assert steps[-1].trunk_length == length + 2
    assert session.tree.trunk_length == length + 2


def test_a_replay_of_no_rows_is_complete_at_once() -> None:
    session = replacement(0)
    assert session.tree.tip == 20
    assert len(session.receive(append(0, 21, [20], epoch=3))) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefill": False}, "a replay must be a prefill"),
        ({"answers": Answers.LAST}, "without commits and answers"),
        ({"commit": np.array([1], np.uint32)}, "a replay must be a prefill"),
        ({"tokens": np.array([1, 2, 50], np.uint32)}, "outside the vocabulary"),
        ({"parents": np.array([0, 1, 1], np.uint32)}, "must be a chain"),
    ],
    ids=["a tree", "answered", "commits", "vocabulary", "not a chain"],
)
def test_an_append_that_is_not_a_replay_is_refused(changes: dict[str, object], words: str) -> None:
    (whole,) = replayed(3, 1)
    with pytest.raises(Refused, match=words):
        replacement(3).receive(replace(whole, **changes))  # type: ignore[arg-type]


def test_a_replay_longer_than_announced_is_refused() -> None:
    (whole,) = replayed(5, 1)
    with pytest.raises(Refused, match="more rows than were announced"):
        replacement(4).receive(whole)
    session = replacement(5)
    session.receive(whole)
    more = replace(replayed(6, 6)[5], seq=1)
    with pytest.raises(Refused, match="more rows than were announced"):
        session.receive(more)
    with pytest.raises(Refused, match="more rows than were announced"):
        started(replace(TERMS, epoch=1)).receive(replace(more, epoch=1, seq=0))  # no node was lost in this session


def test_a_resumption_during_a_replay_is_refused() -> None:
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


def test_a_replay_is_not_limited_by_the_credit() -> None:
    session = replacement(40, credit_rows=8)
    for piece in replayed(40, 4):
        assert len(session.receive(piece)) == 1
    assert session.replayed_rows == 40
    assert len(session.receive(append(0, 21, [20] * 8, epoch=3))) == 1
    with pytest.raises(Refused, match="9 rows in flight, but only 8 were granted"):
        session.receive(append(1, 29, [28], epoch=3))


def test_replayed_rows_count_until_they_are_sent_on() -> None:
    session = replacement(40)
    first, *others = replayed(40, 4)
    (step,) = session.receive(first)
    assert session.replayed_rows == 10
    session.finish(step)
    assert session.replayed_rows == 0
    for piece in others:
        session.receive(piece)
    session.resume(4, Resumption(40, 30))
    assert session.replayed_rows == 0
    session.finish(step)
    assert session.replayed_rows == 0
