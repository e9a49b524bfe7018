"""Messages of a client that cross with a node's own work leak nothing and harm no other session."""

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
    Pong,
    Records,
    Resume,
    Resumption,
    Watch,
)
from treeswarm.protocol.records import NodeRecord
from treeswarm.protocol.spans import Span
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.session.replay import replay
from treeswarm.transport.memory import MemoryNetwork, MemoryStream
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.config import BatchBudget, NodeLimits
from treeswarm_node.membership.announcer import Membership

SESSION, OTHER, TICKET = b"s" * 16, b"o" * 16, b"t" * 16
WORK_S = 1.0


def open_request(epoch: int = 0, resumption: Resumption | None = None) -> Open:
    return Open(PROTOCOL_VERSION, SESSION, epoch, Span(0, 4), NUMERICS, 100, 8, TICKET, None, resumption)


def resume_request(epoch: int, length: int = 0, *, tip: int = 1000, ticket: bytes = TICKET) -> Resume:
    return Resume(PROTOCOL_VERSION, SESSION, epoch, Resumption(length, tip), ticket, None, replays=False)


def prompt(epoch: int = 0, rows: int = 10) -> Append:
    """The first append of a session: a prefill that is answered."""
    (append,) = replay(epoch, [1] * rows)
    return replace(append, replay=False)


class NodeClient:
    """A client that sends arbitrary messages to one node, which serves all blocks."""

    def __init__(self, swarm: ToySwarm) -> None:
        self.swarm = swarm
        ((self.address, self.node),) = swarm.nodes.items()

    async def control(self) -> Stream:
        return await self.swarm.network.transport().connect(self.address, StreamKind.CONTROL)

    async def link(self, epoch: int = 0, session: bytes = SESSION) -> Stream:
        link = await self.swarm.network.transport().connect(self.address, StreamKind.LINK)
        await link.send(LinkHello(PROTOCOL_VERSION, session, epoch, TICKET))
        return link

    async def open_session(self, epoch: int = 0, session: bytes = SESSION) -> Stream:
        control = await self.control()
        await control.send(replace(open_request(epoch), session=session))
        assert isinstance(await control.receive(), Opened)
        return control


def run_on_node(
    scenario: Callable[[NodeClient], Coroutine[Any, Any, None]],
    *,
    limits: NodeLimits | None = None,
    work_s: float = WORK_S,
) -> None:
    """Run a scenario.  Afterwards no session is left on the node, and only its own tasks run."""

    async def run() -> None:
        async with toy_swarm(MemoryNetwork(), limits, spans=[Span(0, 4)]) as swarm:
            async with asyncio.timeout(5000):
                await scenario(NodeClient(swarm))
            await asyncio.sleep(1000)
            swarm.check_idle()
            left = {str(task.get_coro()) for task in asyncio.all_tasks()}
            assert not [
                name for name in left if "ServerSession" in name or "SessionEpoch" in name or "ToNextNode" in name
            ]

    run_virtually(run(), work_s)


@pytest.mark.parametrize("gap_s", [0.0, 0.1])
def test_closing_during_a_forward_frees_everything(gap_s: float) -> None:
    """A client closes and ends its stream at once: the task that frees is cancelled while it waits for the device."""

    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        await control.send(Close(SESSION))
        await asyncio.sleep(gap_s)
        await control.end()
        await link.end()
        await asyncio.sleep(2 * WORK_S)
        client.swarm.check_idle()

    run_on_node(scenario)


def test_concurrent_opens_leave_one_session() -> None:
    async def scenario(client: NodeClient) -> None:
        first, link = await client.open_session(0), await client.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        second, third = await client.control(), await client.control()
        await second.send(open_request(1))
        await asyncio.sleep(0)
        await third.send(open_request(2))
        await asyncio.sleep(2 * WORK_S)
        assert client.node.sessions[SESSION].epoch.number == 2
        store = client.node.ready_stage().store
        assert len(store.sessions) == 1
        for stream in (first, second, third, link):
            await stream.end()

    run_on_node(scenario)


def test_a_session_closed_while_it_resumes_is_gone() -> None:
    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        await control.send(resume_request(1))
        await control.send(Close(SESSION))
        answer = await control.receive()
        assert isinstance(answer, Fault)
        assert answer.fatal
        await control.end()
        await link.end()

    run_on_node(scenario)


def test_appends_during_a_resume_belong_to_the_old_epoch() -> None:
    """They would run on a trunk that was cut back, and a forward that fails ends every session in it."""

    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        busy, other = await client.open_session(session=OTHER), await client.link(session=OTHER)
        first, second = parts(prompt(rows=20), 10)
        await link.send(first)
        await asyncio.sleep(0.2 * WORK_S)
        for append in parts(prompt(rows=30), 10):
            await other.send(append)
        await asyncio.sleep(0.2 * WORK_S)
        await control.send(resume_request(1))
        await asyncio.sleep(0.2 * WORK_S)
        await link.send(second)  # to run with the last of the other session
        assert isinstance(await next_event(control), Opened)
        async with asyncio.timeout(10 * WORK_S):
            assert [type(await busy.receive()) for _ in range(3)] == [Answer] * 3
        for stream in (control, link, busy, other):
            await stream.end()

    run_on_node(scenario, limits=NodeLimits(budget=BatchBudget(20, 20)))


@pytest.mark.parametrize("cut", [False, True])
def test_work_that_follows_withdrawn_work_does_not_run(cut: bool) -> None:
    """The rows before it are missing, and a forward that fails ends every session in it.

    This also holds if the stream that requested the resumption breaks, and the session is not resumed.
    """

    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        first, second, third = parts(prompt(rows=30), 10)
        await link.send(first)
        await asyncio.sleep(0.2 * WORK_S)
        await link.send(second)
        asker = await client.control()
        await asker.send(resume_request(1))
        await asyncio.sleep(0.2 * WORK_S)
        if cut:
            await asker.end()
            await asyncio.sleep(0.1 * WORK_S)
            asker = await client.control()
        await link.send(third)
        await asyncio.sleep(3 * WORK_S)
        if cut:
            await asker.send(resume_request(2))
        assert isinstance(await next_event(asker), Opened)
        for stream in (control, asker, link):
            await stream.end()

    run_on_node(scenario)


async def next_event(control: Stream) -> ControlDown:
    """Return the next message that is not an Answer."""
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
    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        first, second = list(parts(prompt(rows=20), 10))
        await link.send(first)
        await asyncio.sleep(WORK_S / 2)
        await link.send(second)
        await asyncio.sleep(0)
        await control.send(resume_request(0))
        assert isinstance(await control.receive(), Fault)
        async with asyncio.timeout(10):
            seqs = [(await control.receive()).seq for _ in range(2)]  # type: ignore[union-attr]
        assert seqs == [0, 1]
        await control.end()
        await link.end()

    run_on_node(scenario)


def test_a_long_replay_takes_none_of_the_clients_credit() -> None:
    """The node still computes the rows replayed when the first append of the epoch comes."""

    async def scenario(client: NodeClient) -> None:
        control = await client.control()
        await control.send(open_request(1, Resumption(60, 1000)))
        assert isinstance(await control.receive(), Opened)
        link = await client.link(1)
        for append in replay(1, [1] * 60):
            await link.send(append)
        append = prompt(1, 2)
        await link.send(replace(append, first_id=1001, parents=append.parents + 1000, tokens=append.tokens))
        async with asyncio.timeout(30):
            assert isinstance(await control.receive(), Answer)
        await control.end()
        await link.end()

    run_on_node(scenario, limits=NodeLimits(credit_rows=4))


def test_a_waiting_replay_is_dropped_with_its_session() -> None:
    """If it were computed, it would take pages that were promised to others, and never free them."""

    async def scenario(client: NodeClient) -> None:
        control = await client.control()
        await control.send(open_request(1, Resumption(60, 1000)))
        assert isinstance(await control.receive(), Opened)
        link = await client.link(1)
        for append in parts(next(replay(1, [1] * 60)), 12):
            await link.send(append)
        busy, other = await client.open_session(session=OTHER), await client.link(session=OTHER)
        for append in parts(prompt(rows=9), 3):
            await other.send(append)
        await asyncio.sleep(WORK_S / 2)
        await control.send(Close(SESSION))
        await asyncio.sleep(10 * WORK_S)
        client.node.ready_stage().store.check()
        for stream in (control, link, busy, other):
            await stream.end()

    run_on_node(scenario, limits=NodeLimits(credit_rows=4, budget=BatchBudget(8, 4)))


def test_a_client_that_reads_nothing_delays_no_sweep() -> None:
    """Its stream is full; reporting that its session has expired must not delay the sweep of other sessions."""

    async def scenario(client: NodeClient) -> None:
        control = await client.open_session()
        for stamp in range(16):
            await control.send(Ping(stamp))
        await asyncio.sleep(0.1)
        assert isinstance(control, MemoryStream)
        await asyncio.sleep(700)
        assert not client.node.sessions
        await control.end()

    run_on_node(scenario)


def test_a_client_that_reads_nothing_delays_no_drain() -> None:
    async def scenario(client: NodeClient) -> None:
        control = await client.open_session()
        for stamp in range(16):
            await control.send(Ping(stamp))
        await asyncio.sleep(0.1)
        async with asyncio.timeout(60):
            await client.node.drain(grace_s=5.0)
        await control.end()

    run_on_node(scenario)


def test_empty_appends_cost_credit_too() -> None:
    """Otherwise a queue of empty appends could grow without end."""

    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        (empty,) = parts(prompt(rows=1), 1)
        nothing = {name: getattr(empty, name)[:0] for name in ("parents", "tokens", "skipped")}
        for seq in range(20):
            await link.send(replace(empty, seq=seq, **nothing))
        fault = await next_event(control)
        assert isinstance(fault, Fault)
        assert fault.code == FaultCode.OUT_OF_CREDIT
        await control.end()

    run_on_node(scenario, limits=NodeLimits(credit_rows=4))


def test_a_link_with_an_outdated_ticket_is_cut() -> None:
    """A node that was dropped must not send into the session any more."""

    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        await control.send(resume_request(1, ticket=b"u" * 16))
        assert isinstance(await control.receive(), Opened)
        append = prompt(1, 2)
        with contextlib.suppress(LinkBroken, Refused):
            await link.send(replace(append, first_id=1001, parents=append.parents + 1000))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await control.receive()
        assert client.node.streams == 1
        await control.end()

    run_on_node(scenario)


def test_a_second_watch_on_one_stream_is_refused() -> None:
    async def scenario(client: NodeClient) -> None:
        control = await client.control()
        for _ in range(3):
            await control.send(Watch(PROTOCOL_VERSION, True))
        with pytest.raises(Refused, match="once"):
            while await control.receive() is not None:
                pass

    run_on_node(scenario)


def test_a_stream_opened_before_the_registry_can_watch() -> None:
    """A node listens before it has a registry, and clients dial it meanwhile."""
    fake, book = FakeNode(), MemoryRegistry(MODEL)

    def make_record(generation: int, expires: int) -> NodeRecord:
        return fake.record(4001, generation=generation, expires=expires).record

    async def scenario(client: NodeClient) -> None:
        control = await client.control()
        await control.send(Ping(1))
        assert isinstance(await control.receive(), Pong)
        client.node.membership = Membership(fake, make_record, book, book)
        await client.node.membership.announce()
        await control.send(Watch(PROTOCOL_VERSION, True))
        async with asyncio.timeout(5):
            assert isinstance(await control.receive(), Records)
        await control.end()

    run_on_node(scenario)


def test_an_engine_that_stops_during_a_forward_blocks_nothing() -> None:
    async def scenario(client: NodeClient) -> None:
        control, link = await client.open_session(), await client.link()
        await link.send(prompt())
        await asyncio.sleep(WORK_S / 2)
        (hosted,) = client.node.sessions.values()
        (running,) = [task for task in asyncio.all_tasks() if "Engine.run" in str(task.get_coro())]
        running.cancel()
        async with asyncio.timeout(5):
            await hosted.free()
        await control.end()
        await link.end()

    run_on_node(scenario)
