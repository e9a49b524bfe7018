"""A node obeys its owner's orders only, each once and none that is old; it announces and passes on records."""

import logging
import time
from dataclasses import dataclass
from typing import Any

import pytest

from treeswarm.errors import Refused, Unreachable
from treeswarm.keys import Identity
from treeswarm.protocol.node_messages import Manage
from treeswarm.protocol.records import NodeRecord, NodeState, SealedRecord
from treeswarm.registry.memory import MemoryRegistry
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_node.membership.announcer import ACTIONS, ORDER_AGE_S, Membership, order_bytes

OWNER, OTHER = Identity.ephemeral(), Identity.ephemeral()


def unused_make_record(generation: int, expires: int) -> NodeRecord:
    raise AssertionError("no record is announced in these tests")


@pytest.fixture
def membership() -> Membership:
    return Membership(OWNER, unused_make_record, MemoryRegistry(MODEL))


def stamp(age_s: float = 0.0) -> int:
    return int((time.time() - age_s) * 1e6)


def order(action: str, at: int, signer: Identity = OWNER, **changes: Any) -> Manage:
    signed = order_bytes(changes.get("signed_action", action), changes.get("signed_at", at))
    return Manage(action, at, signer.sign(signed))


@pytest.mark.parametrize("action", ACTIONS)
def test_the_owners_order_is_taken(membership: Membership, action: str) -> None:
    assert membership.manage(order(action, stamp())) == ACTIONS[action]
    assert membership.orders.get_nowait() == action


def test_an_order_is_taken_once_and_no_older_one_after_it(membership: Membership) -> None:
    now = stamp()
    membership.manage(order("pause", now))
    for again in (order("pause", now), order("pause", now - 1), order("resume", now - 1)):
        with pytest.raises(Refused, match="the order is old") as refused:
            membership.manage(again)
        assert refused.value.code == "refused"
    assert membership.manage(order("resume", now + 1))
    assert [membership.orders.get_nowait() for _ in range(2)] == ["pause", "resume"]
    assert membership.orders.empty()


@pytest.mark.parametrize("age_s", [ORDER_AGE_S + 5, -ORDER_AGE_S - 5], ids=["old", "from the future"])
def test_an_order_from_another_time_is_refused(membership: Membership, age_s: float) -> None:
    with pytest.raises(Refused, match="check this machine's clock"):
        membership.manage(order("drain", stamp(age_s)))
    assert membership.orders.empty()
    assert membership.manage(order("drain", stamp()))  # The refused order changed nothing.


@pytest.mark.parametrize(
    "forged",
    [
        order("drain", stamp(), OTHER),
        order("drain", stamp(), signed_action="pause"),
        order("drain", stamp(), signed_at=1),
        Manage("drain", stamp(), bytes(64)),
        Manage("drain", stamp(), b""),
    ],
    ids=["other signer", "other action", "other time", "no signature", "empty"],
)
def test_an_order_without_the_owners_signature_is_refused(membership: Membership, forged: Manage) -> None:
    with pytest.raises(Refused, match="not signed by this node's identity"):
        membership.manage(forged)
    assert membership.orders.empty()


def test_a_forged_order_does_not_outdate_the_owners_next_one(membership: Membership) -> None:
    later = stamp(-30)
    with pytest.raises(Refused):
        membership.manage(order("drain", later, OTHER))
    assert membership.manage(order("pause", stamp()))


@pytest.mark.parametrize("action", ["", "dance", "Pause", "pause\n1"])
def test_an_unknown_order_is_refused(membership: Membership, action: str) -> None:
    with pytest.raises(Refused, match=r"give one of pause, resume, drain") as refused:
        membership.manage(order(action, stamp()))
    assert refused.value.code == "malformed"


def test_orders_that_pile_up_are_refused(membership: Membership) -> None:
    now = stamp()
    for i in range(4):
        membership.manage(order("pause", now + i))
    with pytest.raises(Refused, match="still busy") as refused:
        membership.manage(order("pause", now + 4))
    assert refused.value.code == "too-many"


async def test_watchers_get_own_or_all_records_and_those_that_leave() -> None:
    me, other = FakeNode(), FakeNode()
    book = MemoryRegistry(MODEL)
    state = NodeState.ONLINE

    def make_record(generation: int, expires: int) -> NodeRecord:
        sealed = me.record(4001, generation=generation, expires=expires, state=state)
        return sealed.record

    membership = Membership(me, make_record, book, book)
    await membership.announce()
    await book.announce(other.record(4002))
    assert [sealed.record.node for sealed in await membership.other_nodes()] == [other.id]
    own, everyone = membership.watch_records(everyone=False), membership.watch_records(everyone=True)
    assert len(await anext(own)) == 1
    assert len(await anext(everyone)) == 2
    state = NodeState.GONE
    await membership.leave()
    (gone,) = await anext(everyone)
    assert (await anext(own)) == (gone,)
    assert [sealed.record.node for sealed in await book.snapshot()] == [other.id]


@dataclass(eq=False)
class LonelyRegistry(MemoryRegistry):
    """A registry in which no other node receives the records."""

    async def announce(self, sealed: SealedRecord) -> None:
        await super().announce(sealed)
        raise Unreachable("no other node has received the record")

    async def withdraw(self, sealed: SealedRecord) -> None:
        await self.announce(sealed)


@pytest.mark.parametrize("accompanied", [False, True])
async def test_a_failed_withdrawal_is_a_warning_unless_alone(
    caplog: pytest.LogCaptureFixture, accompanied: bool
) -> None:
    me, book = FakeNode(), LonelyRegistry(MODEL)
    if accompanied:
        await book.add_records([FakeNode().record(4002).sealed])
    state = NodeState.ONLINE

    def make_record(generation: int, expires: int) -> NodeRecord:
        sealed = me.record(4001, generation=generation, expires=expires, state=state)
        return sealed.record

    membership = Membership(me, make_record, book, book)
    warned = []
    for state in (NodeState.ONLINE, NodeState.DRAINING, NodeState.PAUSED):  # noqa: B007  # `make_record` reads it
        caplog.clear()
        await membership.announce()
        warned.append(bool(caplog.records))
    assert warned == [True, accompanied, accompanied]
    state = NodeState.GONE
    caplog.clear()
    with caplog.at_level(logging.INFO):
        await membership.leave()
    assert [record.levelno for record in caplog.records] == [logging.WARNING if accompanied else logging.INFO]
