"""A chain with one node that breaks the contract, or is slow, still gives the plain text."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.support.toy_swarm import SPANS, ToyRouter, ToySwarm, plain_text, toy_swarm

from treeswarm.errors import Refused
from treeswarm.protocol.messages import Answer, Append, Fault, FaultCode, Opened
from treeswarm.protocol.spans import Span
from treeswarm.transport.memory import MemoryNetwork, MemoryStream
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.chain.chain import Chain
from treeswarm_client.discovery.route import FORGOTTEN
from treeswarm_node.sessions.server import NodeServer
from treeswarm_node.sessions.server_session import ServerSession

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 30


def generate_after(
    harm: Any, *, spans: list[Span], work_s: float = 0.0, prompt: list[int] = PROMPT, **options: Any
) -> Chain:
    """Generate in a swarm changed by `harm` (called with its addresses), and return the chain.

    The generation must end in time with the plain text.
    """

    async def run() -> Chain:
        async with toy_swarm(MemoryNetwork(), spans=spans) as swarm:
            harm(swarm, list(swarm.nodes))
            text = await asyncio.wait_for(swarm.generate(prompt, COUNT, patience_s=100.0, **options), 30_000)
            assert text == plain_text(prompt, COUNT)
            assert swarm.chain is not None
            return swarm.chain

    return run_virtually(run(), work_s)


def stop_reading_links(swarm: ToySwarm, address: str) -> None:
    """Have a node answer every ping, and read no link."""
    listener = swarm.network.listeners[address]
    honest = listener.accept

    async def accept(kind: StreamKind, stream: Stream) -> None:
        if kind is StreamKind.LINK:
            await asyncio.sleep(1e6)
        await honest(kind, stream)

    listener.accept = accept


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_node_that_takes_no_frames_is_dropped(place: int) -> None:
    """The sender waits for room on the link without end."""

    def harm(swarm: ToySwarm, addresses: list[str]) -> None:
        # The toy router prefers the highest address.
        stop_reading_links(swarm, addresses[len(SPANS) + place])

    chain = generate_after(harm, spans=[*SPANS, *SPANS], prompt=PROMPT * 8, segment_rows=1)
    assert len(chain.repairs) <= 2


def test_a_head_that_takes_no_replay_is_dropped() -> None:
    async def run() -> None:
        async with toy_swarm(MemoryNetwork(), spans=[*SPANS, SPANS[0]]) as swarm:
            generating = asyncio.create_task(swarm.generate(PROMPT * 8, COUNT, patience_s=100.0, tree_size=0))
            while len(swarm.kept) < 10:
                await asyncio.sleep(0)
            assert swarm.chain is not None
            deaf = await swarm.start(SPANS[0])
            stop_reading_links(swarm, deaf)
            await swarm.kill(swarm.chain.hops[0].address)
            assert await asyncio.wait_for(generating, 1000) == plain_text(PROMPT * 8, COUNT)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("treeswarm.session.replay.REPLAY_ROWS", 2)
        run_virtually(run())


def test_a_node_that_grants_no_credit_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ServerSession.send_opened

    async def send_no_credit(self: ServerSession) -> None:
        if self.client.control.peer == "memory" and self.opening.span == SPANS[1]:
            await self.client.control.send(Opened(self.opening.id, self.epoch.number, 0))
        else:
            await honest(self)

    monkeypatch.setattr(ServerSession, "send_opened", send_no_credit)
    generate_after(lambda *_: None, spans=SPANS)


def test_a_node_that_answers_in_place_of_the_tail_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MemoryStream.send
    faulty: list[str] = []

    async def send(self: MemoryStream, message: Any) -> None:
        await honest(self, message)
        if isinstance(message, Opened) and self.host in faulty:
            nothing = np.empty(0, np.uint32)
            await asyncio.sleep(0.1)
            await honest(self, Answer(message.session, message.epoch, 0, nothing, nothing, np.empty(0, np.float32), ()))

    monkeypatch.setattr(MemoryStream, "send", send)
    chain = generate_after(lambda _, addresses: faulty.append(addresses[3]), spans=[*SPANS, SPANS[0]], work_s=0.2)
    (repair,) = chain.repairs
    assert [hop.span for hop, _ in repair.lost] == [SPANS[0]]


def test_a_tail_that_answers_other_rows_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MemoryStream.send
    faulty: list[str] = []

    async def send(self: MemoryStream, message: Any) -> None:
        if isinstance(message, Answer) and self.host in faulty and message.seq > 1:
            message = replace(message, ids=message.ids + 1)
        await honest(self, message)

    monkeypatch.setattr(MemoryStream, "send", send)
    chain = generate_after(lambda _, addresses: faulty.append(addresses[3]), spans=[*SPANS, SPANS[2]])
    assert [hop.span for hop, _ in chain.repairs[0].lost] == [SPANS[2]]


@pytest.mark.parametrize("slow_s", [8.0, 40.0])
def test_a_slow_chain_drops_no_node(slow_s: float) -> None:
    chain = generate_after(lambda *_: None, spans=SPANS, work_s=slow_s, tree_size=2)
    assert not chain.repairs


def test_a_survivor_that_replays_for_minutes_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The link to the new node is slow, and appends wait behind the replay log."""
    monkeypatch.setattr("treeswarm.session.replay.REPLAY_ROWS", 2)
    prompt, honest = PROMPT * 8, MemoryStream.send

    async def send(self: MemoryStream, message: Any) -> None:
        if isinstance(message, Append) and message.replay:
            await asyncio.sleep(4.0)
        await honest(self, message)

    monkeypatch.setattr(MemoryStream, "send", send)

    async def run() -> None:
        async with toy_swarm(MemoryNetwork(), spans=[*SPANS, SPANS[1]]) as swarm:
            generating = asyncio.create_task(swarm.generate(prompt, COUNT, patience_s=100.0))
            while len(swarm.kept) < 3:
                await asyncio.sleep(0)
            assert swarm.chain is not None
            await swarm.kill(swarm.chain.hops[1].address)
            assert await asyncio.wait_for(generating, 10_000) == plain_text(prompt, COUNT)
            (repair,) = swarm.chain.repairs
            assert [hop.span for hop, _ in repair.lost] == [SPANS[1]]

    run_virtually(run())


def test_only_a_tail_that_computes_for_ever_is_dropped() -> None:
    def harm(swarm: ToySwarm, addresses: list[str]) -> None:
        stage = swarm.nodes[addresses[3]].ready_stage()
        stage.engine.submit = lambda work: None  # type: ignore[method-assign]

    chain = generate_after(harm, spans=[*SPANS, SPANS[2]])
    (repair,) = chain.repairs
    assert [hop.span for hop, _ in repair.lost] == [SPANS[2]]


def report_fault_after_grant(patched: pytest.MonkeyPatch, faulty: list[str], code: FaultCode, *, fatal: bool) -> None:
    """Have nodes report a fault as soon as they have agreed to an epoch."""
    honest = MemoryStream.send

    async def send(self: MemoryStream, message: Any) -> None:
        await honest(self, message)
        if isinstance(message, Opened) and self.host in faulty:
            await asyncio.sleep(0.01)
            await honest(self, Fault(message.session, code, "a fault", fatal))

    patched.setattr(MemoryStream, "send", send)


def test_a_head_that_complains_about_every_node_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """One faulty node must not make the client drop every node behind it, one after another."""
    faulty: list[str] = []
    report_fault_after_grant(monkeypatch, faulty, FaultCode.DOWNSTREAM, fatal=False)
    chain = generate_after(
        lambda _, addresses: faulty.append(addresses[3]), spans=[*SPANS, SPANS[0], SPANS[1], SPANS[1]], work_s=0.2
    )
    assert len(chain.repairs) <= 4


def ban_like_the_product(router: type[ToyRouter], patched: pytest.MonkeyPatch) -> None:
    """Like the product's router, do not ban nodes that have forgotten a session or let it expire."""
    honest = router.report_failure

    def report_failure(self: ToyRouter, node: str, error: Any) -> None:
        if not isinstance(error, Refused) or error.code not in FORGOTTEN:
            honest(self, node, error)

    patched.setattr(router, "report_failure", report_failure)


@pytest.mark.parametrize("code", [FaultCode.EXPIRED, FaultCode.UNKNOWN_SESSION])
def test_a_new_node_that_forgets_the_session_is_banned(code: FaultCode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be asked again at once, without end, and no patience would stop that."""
    ban_like_the_product(ToyRouter, monkeypatch)
    faulty: list[str] = []
    report_fault_after_grant(monkeypatch, faulty, code, fatal=True)
    chain = generate_after(lambda _, addresses: faulty.append(addresses[3]), spans=[*SPANS, SPANS[0]], work_s=0.2)
    assert len(chain.repairs) <= 2


def test_a_new_node_that_refuses_is_not_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ban_like_the_product(ToyRouter, monkeypatch)

    async def refuse(self: NodeServer, request: Any, control: Any) -> Any:
        if self is faulty[0]:
            raise Refused("unknown session", FaultCode.UNKNOWN_SESSION)
        return await honest(self, request, control)

    faulty: list[NodeServer] = []
    honest = NodeServer.open
    monkeypatch.setattr(NodeServer, "open", refuse)
    generate_after(lambda swarm, addresses: faulty.append(swarm.nodes[addresses[3]]), spans=[*SPANS, SPANS[0]])


@pytest.mark.parametrize("first", [0, 1])
def test_a_node_whose_streams_always_break_is_dropped(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams break from epoch `first` on.  A proven node and a new one are both tolerated a few times."""
    honest = MemoryStream.send
    faulty: list[str] = []
    ready: list[float] = []

    async def send(self: MemoryStream, message: Any) -> None:
        await honest(self, message)
        if isinstance(message, Opened) and self.host in faulty and message.epoch >= first:
            asyncio.get_running_loop().call_later(0.01, self.break_off)
        elif isinstance(message, Answer) and not ready and message.seq == 5:
            ready.append(1.0)
            for stream in [s for s in self.network.streams if s.host in faulty and s.kind is StreamKind.CONTROL]:
                stream.break_off()

    monkeypatch.setattr(MemoryStream, "send", send)
    chain = generate_after(lambda _, addresses: faulty.append(addresses[3]), spans=[*SPANS, SPANS[0]], work_s=0.2)
    assert ready
    assert any(hop.span == SPANS[0] for repair in chain.repairs for hop, _ in repair.lost)
    assert len(chain.repairs) < 10


def test_answers_before_any_append_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain is being opened, and has no tail yet."""
    honest = MemoryStream.send

    async def send(self: MemoryStream, message: Any) -> None:
        if isinstance(message, Opened):
            nothing = np.empty(0, np.uint32)
            await honest(self, Answer(message.session, message.epoch, 0, nothing, nothing, np.empty(0, np.float32), ()))
        await honest(self, message)

    monkeypatch.setattr(MemoryStream, "send", send)
    assert not generate_after(lambda *_: None, spans=SPANS).repairs
