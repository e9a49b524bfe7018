"""What one node does when a client's words cross with its own work: nothing leaks, nobody else is harmed."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.support.toy_swarm import NUMERICS, ToySwarm, toy_swarm

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Refused
from treeswarm.protocol.messages import (
    Answer,
    Append,
    Close,
    ControlDown,
    Fault,
    FaultCode,
    LinkHello,
    Open,
    Opened,
    Ping,
    Resume,
    Resumption,
    Watch,
)
from treeswarm.protocol.spans import Span
from treeswarm.session.replay import replay
from treeswarm.transport.memory import MemoryNetwork, MemoryStream
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.config import BatchBudget, NodeLimits

SESSION, OTHER, TICKET = b"s" * 16, b"o" * 16, b"t" * 16
WORK_S = 1.0


def opening(epoch: int = 0, resumption: Resumption | None = None) -> Open:
    return Open(PROTOCOL_VERSION, SESSION, epoch, Span(0, 4), NUMERICS, 100, 8, TICKET, None, resumption)


def resuming(epoch: int, length: int = 0, *, tip: int = 1000, ticket: bytes = TICKET) -> Resume:
    return Resume(PROTOCOL_VERSION, SESSION, epoch, Resumption(length, tip), ticket, None, replays=False)


def prompt(epoch: int = 0, rows: int = 10) -> Append:
    """The first append of a session: a prefill that is answered."""
    (append,) = replay(epoch, [1] * rows)
    return replace(append, replay=False)


class Visitor:
    """A client that says what it likes to one node that serves everything."""

    def __init__(self, swarm: ToySwarm) -> None:
        self.swarm = swarm
        ((self.address, self.node),) = swarm.nodes.items()

    async def control(self) -> Stream:
        return await self.swarm.network.transport().connect(self.address, StreamKind.CONTROL)

    async def link(self, epoch: int = 0, session: bytes = SESSION) -> Stream:
        link = await self.swarm.network.transport().connect(self.address, StreamKind.LINK)
        await link.send(LinkHello(PROTOCOL_VERSION, session, epoch, TICKET))
        return link

    async def opened(self, epoch: int = 0, session: bytes = SESSION) -> Stream:
        control = await self.control()
        await control.send(replace(opening(epoch), session=session))
        assert isinstance(await control.receive(), Opened)
        return control


def visit(
    story: Callable[[Visitor], Coroutine[Any, Any, None]], *, limits: NodeLimits | None = None, work_s: float = WORK_S
) -> None:
    """Live through a story; afterwards nothing is left on the node, and nothing but its own tasks runs."""

    async def run() -> None:
        async with toy_swarm(MemoryNetwork(), limits, spans=[Span(0, 4)]) as swarm:
            async with asyncio.timeout(5000):
                await story(Visitor(swarm))
            await asyncio.sleep(1000)
            swarm.check_idle()
            left = {str(task.get_coro()) for task in asyncio.all_tasks()}
            assert not [
                name for name in left if "ServerSession" in name or "SessionEpoch" in name or "ToNextNode" in name
            ]

    run_virtually(run(), work_s)


@pytest.mark.parametrize("gap_s", [0.0, 0.1])
def test_a_goodbye_in_the_middle_of_a_forward_frees_everything(gap_s: float) -> None:
    """A client closes and hangs up at once, so the errand that frees is cut off where it waits for the device."""

    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        await control.send(Close(SESSION))
        await asyncio.sleep(gap_s)
        await control.end()
        await link.end()
        await asyncio.sleep(2 * WORK_S)
        visitor.swarm.check_idle()

    visit(story)


def test_opens_that_cross_leave_one_session() -> None:
    async def story(visitor: Visitor) -> None:
        first, link = await visitor.opened(0), await visitor.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        second, third = await visitor.control(), await visitor.control()
        await second.send(opening(1))
        await asyncio.sleep(0)
        await third.send(opening(2))
        await asyncio.sleep(2 * WORK_S)
        assert visitor.node.sessions[SESSION].epoch.number == 2
        store = visitor.node.ready_stage().store
        assert len(store.sessions) == 1
        for stream in (first, second, third, link):
            await stream.end()

    visit(story)


def test_a_session_closed_while_it_resumes_is_gone() -> None:
    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        await control.send(resuming(1))
        await control.send(Close(SESSION))
        answer = await control.receive()
        assert isinstance(answer, Fault)
        assert answer.fatal
        await control.end()
        await link.end()

    visit(story)


def test_what_arrives_while_a_resume_waits_for_the_device_is_of_the_old_epoch() -> None:
    """It would run on a trunk that has been cut back, and the forward that fails is everybody's in it."""

    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        busy, other = await visitor.opened(session=OTHER), await visitor.link(session=OTHER)
        first, second = parts(prompt(rows=20), 10)
        await link.send(first)
        await asyncio.sleep(0.2 * WORK_S)
        for append in parts(prompt(rows=30), 10):
            await other.send(append)
        await asyncio.sleep(0.2 * WORK_S)
        await control.send(resuming(1))
        await asyncio.sleep(0.2 * WORK_S)
        await link.send(second)  # to run with the last of the other session
        assert isinstance(await answered(control), Opened)
        async with asyncio.timeout(10 * WORK_S):
            assert [type(await busy.receive()) for _ in range(3)] == [Answer] * 3
        for stream in (control, link, busy, other):
            await stream.end()

    visit(story, limits=NodeLimits(budget=BatchBudget(20, 20)))


@pytest.mark.parametrize("cut", [False, True])
def test_what_follows_on_withdrawn_work_does_not_run(cut: bool) -> None:
    """The rows before it are missing, and a forward that fails ends every session in it.  Also where the stream breaks
    that asked for the resumption, and it never comes about."""

    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        first, second, third = parts(prompt(rows=30), 10)
        await link.send(first)
        await asyncio.sleep(0.2 * WORK_S)
        await link.send(second)
        asker = await visitor.control()
        await asker.send(resuming(1))
        await asyncio.sleep(0.2 * WORK_S)
        if cut:
            await asker.end()
            await asyncio.sleep(0.1 * WORK_S)
            asker = await visitor.control()
        await link.send(third)
        await asyncio.sleep(3 * WORK_S)
        if cut:
            await asker.send(resuming(2))
        assert isinstance(await answered(asker), Opened)
        for stream in (control, asker, link):
            await stream.end()

    visit(story)


async def answered(control: Stream) -> ControlDown:
    """The next message that is no Answer."""
    while isinstance(message := await control.receive(), Answer):
        pass
    assert message is not None
    return message  # type: ignore[return-value]


def parts(append: Append, rows: int) -> Iterator[Append]:
    for seq, start in enumerate(range(0, append.rows, rows)):
        part = slice(start, start + rows)
        yield replace(
            append,
            seq=seq,
            first_id=append.first_id + start,
            parents=append.parents[part],
            tokens=append.tokens[part],
            skipped=append.skipped[part],
        )


def test_a_refused_resume_changes_nothing() -> None:
    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        first, second = list(parts(prompt(rows=20), 10))
        await link.send(first)
        await asyncio.sleep(WORK_S / 2)
        await link.send(second)
        await asyncio.sleep(0)
        await control.send(resuming(0))
        assert isinstance(await control.receive(), Fault)
        async with asyncio.timeout(10):
            seqs = [(await control.receive()).seq for _ in range(2)]  # type: ignore[union-attr]
        assert seqs == [0, 1]
        await control.end()
        await link.end()

    visit(story)


def test_a_long_replay_takes_none_of_the_clients_credit() -> None:
    """The node still computes the rows replayed when the first append of the epoch comes."""

    async def story(visitor: Visitor) -> None:
        control = await visitor.control()
        await control.send(opening(1, Resumption(60, 1000)))
        assert isinstance(await control.receive(), Opened)
        link = await visitor.link(1)
        for append in replay(1, [1] * 60):
            await link.send(append)
        append = prompt(1, 2)
        await link.send(replace(append, first_id=1001, parents=append.parents + 1000, tokens=append.tokens))
        async with asyncio.timeout(30):
            assert isinstance(await control.receive(), Answer)
        await control.end()
        await link.end()

    visit(story, limits=NodeLimits(credit_rows=4))


def test_a_replay_that_waits_for_room_is_forgotten_with_its_session() -> None:
    """Computed all the same, it would take its pages from what was promised to others, and never give them back."""

    async def story(visitor: Visitor) -> None:
        control = await visitor.control()
        await control.send(opening(1, Resumption(60, 1000)))
        assert isinstance(await control.receive(), Opened)
        link = await visitor.link(1)
        for append in parts(next(replay(1, [1] * 60)), 12):
            await link.send(append)
        busy, other = await visitor.opened(session=OTHER), await visitor.link(session=OTHER)
        for append in parts(prompt(rows=9), 3):
            await other.send(append)
        await asyncio.sleep(WORK_S / 2)
        await control.send(Close(SESSION))
        await asyncio.sleep(10 * WORK_S)
        visitor.node.ready_stage().store.check()
        for stream in (control, link, busy, other):
            await stream.end()

    visit(story, limits=NodeLimits(credit_rows=4, budget=BatchBudget(8, 4)))


def test_a_client_that_does_not_listen_keeps_nobody_waiting() -> None:
    """It fills its own stream; telling it that its session has expired must not hold up the sweeping of others."""

    async def story(visitor: Visitor) -> None:
        control = await visitor.opened()
        for stamp in range(16):
            await control.send(Ping(stamp))
        await asyncio.sleep(0.1)
        assert isinstance(control, MemoryStream)
        await asyncio.sleep(700)
        assert not visitor.node.sessions
        await control.end()

    visit(story)


def test_a_drain_ends_though_a_client_does_not_listen() -> None:
    async def story(visitor: Visitor) -> None:
        control = await visitor.opened()
        for stamp in range(16):
            await control.send(Ping(stamp))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            await visitor.node.drain(grace_s=5.0)
        await control.end()

    visit(story)


def test_rows_that_are_none_cost_credit_too() -> None:
    """Else a queue of empty appends grows without end."""

    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        (empty,) = parts(prompt(rows=1), 1)
        nothing = {name: getattr(empty, name)[:0] for name in ("parents", "tokens", "skipped")}
        for seq in range(20):
            await link.send(replace(empty, seq=seq, **nothing))
        fault = await answered(control)
        assert isinstance(fault, Fault)
        assert fault.code == FaultCode.OUT_OF_CREDIT
        await control.end()

    visit(story, limits=NodeLimits(credit_rows=4))


def test_a_link_whose_ticket_is_no_longer_valid_is_cut() -> None:
    """A node that was let go must not go on speaking into the session."""

    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        await control.send(resuming(1, ticket=b"u" * 16))
        assert isinstance(await control.receive(), Opened)
        append = prompt(1, 2)
        with contextlib.suppress(LinkBroken, Refused):
            await link.send(replace(append, first_id=1001, parents=append.parents + 1000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await control.receive()
        assert visitor.node.streams == 1
        await control.end()

    visit(story)


def test_a_stream_watches_once() -> None:
    async def story(visitor: Visitor) -> None:
        control = await visitor.control()
        for _ in range(3):
            await control.send(Watch(PROTOCOL_VERSION, True))
        with pytest.raises(Refused, match="once"):
            while await control.receive() is not None:
                pass

    visit(story)


def test_an_engine_that_stops_in_the_middle_of_a_forward_keeps_nobody_waiting() -> None:
    async def story(visitor: Visitor) -> None:
        control, link = await visitor.opened(), await visitor.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        (hosted,) = visitor.node.sessions.values()
        (running,) = [task for task in asyncio.all_tasks() if "Engine.run" in str(task.get_coro())]
        running.cancel()
        async with asyncio.timeout(5):
            await hosted.free()
        await control.end()
        await link.end()

    visit(story)
