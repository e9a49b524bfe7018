"""The owner of a node is told when other nodes have another swarm key, and how often."""

import pytest

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode
from treeswarm_bench.benchmarks.parts.fake_node import FakeNode
from treeswarm_node.membership.key_watch import REMIND_S, STRANGER_S, KeyWatch

REFUSED = Refused("this is a private swarm, and the caller has no swarm key", FaultCode.WRONG_SWARM_KEY)


def test_a_node_that_all_others_refuse_tells_its_owner_every_hour(caplog: pytest.LogCaptureFixture) -> None:
    watch, others = KeyWatch(), [FakeNode().record().record for _ in range(3)]
    for seconds in range(0, int(REMIND_S) + 60, 30):
        watch.note_refusal(others[seconds // 30 % 3], REFUSED, float(seconds))
    texts = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert texts == [f"no node of this swarm talks to this one, so no client uses it: {REFUSED}"] * 2
    assert watch.strangers(REMIND_S) == {record.node for record in others}


def test_one_stranger_among_others_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    watch, friend, stranger = KeyWatch(), FakeNode(), FakeNode().record().record
    for seconds in range(0, 300, 30):
        watch.note_answer(friend.id, float(seconds))
        watch.note_refusal(stranger, REFUSED, float(seconds))
    (text,) = [record.getMessage() for record in caplog.records]
    assert text == f"blocks 0:4 of the node at {stranger.address} do not count here: {REFUSED}"
    watch.note_answer(stranger.node, 300.0)
    assert watch.strangers(300.0) == frozenset()


def test_other_refusals_and_old_ones_say_nothing_of_the_key() -> None:
    watch, record = KeyWatch(), FakeNode().record().record
    watch.note_refusal(record, Refused("too many streams", FaultCode.TOO_MANY), 0.0)
    assert watch.strangers(0.0) == frozenset()
    watch.note_refusal(record, REFUSED, 0.0)
    assert watch.strangers(STRANGER_S - 1) == {record.node}
    assert watch.strangers(STRANGER_S) == frozenset()
