"""Generations survive the loss of nodes, streams and links, on a virtual clock."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from tests.support.toy_swarm import SPANS, ToySwarm, plain_text, toy_swarm

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.spans import Span
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import StreamKind
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.chain.chain import RELIEVED, Chain
from treeswarm_client.chain.wait_events import ChainWait

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 60
LINKS = frozenset({StreamKind.LINK})
TWICE = [*SPANS, *SPANS]


def slow_links(network: MemoryNetwork, delay_s: float = 0.01) -> None:
    original = network.transport
    network.transport = lambda: EmulatedTransport(original(), LinkShape(delay_s))  # type: ignore[method-assign, assignment, return-value]


async def at_token(swarm: ToySwarm, count: int, generating: "asyncio.Task[list[int]]") -> None:
    while (swarm.chain is None or len(swarm.kept) < count) and not generating.done():
        await asyncio.sleep(0.001)


async def check_idle_after_leases(swarm: ToySwarm) -> None:
    """Wait until every lease has ended, and check that nothing is left."""
    await asyncio.sleep(120)
    swarm.check_idle()


def survive(
    do_harm: Callable[[ToySwarm, Chain], Coroutine[Any, Any, None]],
    *,
    spans: list[Span] = TWICE,
    at: int = 20,
    patience_s: float = 60.0,
    **options: Any,
) -> Chain:
    """Disturb one generation after `at` tokens, and return its chain.  It must end with the plain text."""

    async def run() -> Chain:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, spans=spans) as swarm:
            generating = asyncio.create_task(swarm.generate(PROMPT, COUNT, patience_s=patience_s, **options))
            await at_token(swarm, at, generating)
            assert swarm.chain is not None
            await do_harm(swarm, swarm.chain)
            assert await asyncio.wait_for(generating, 600) == plain_text(PROMPT, COUNT)
            chain = swarm.chain
            await check_idle_after_leases(swarm)
            return chain

    return run_virtually(run())


# ---------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
@pytest.mark.parametrize("at", [1, 20, 45])
def test_a_killed_node_is_replaced(place: int, at: int) -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        await swarm.kill(chain.hops[place].address)

    chain = survive(kill, at=at)
    (repair,) = chain.repairs
    assert [hop.span for hop, _ in repair.lost] == [SPANS[place]]
    assert [hop.span for hop in repair.gained] == [SPANS[place]]
    assert {hop.node for hop in chain.hops} <= chain.router.traversed, "their failures may be forgotten"


@pytest.mark.parametrize("places", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_nodes_that_die_together_are_replaced_together(places: tuple[int, ...]) -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        for address in [chain.hops[place].address for place in places]:
            await swarm.kill(address)

    survive(kill)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_node_that_hangs_is_dropped_for_its_silence(place: int) -> None:
    async def freeze(swarm: ToySwarm, chain: Chain) -> None:
        address = chain.hops[place].address
        swarm.network.freeze(address)
        asyncio.get_running_loop().call_later(100, lambda: asyncio.ensure_future(swarm.network.thaw(address)))

    chain = survive(freeze)
    assert "nothing heard" in chain.repairs[0].lost[0][1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_node_that_resumes_during_a_repair_changes_nothing(place: int) -> None:
    async def freeze(swarm: ToySwarm, chain: Chain) -> None:
        address = chain.hops[place].address
        swarm.network.freeze(address)
        asyncio.get_running_loop().call_later(3.1, lambda: asyncio.ensure_future(swarm.network.thaw(address)))

    survive(freeze)


@pytest.mark.parametrize("pair", [(0, 1), (1, 2)])
def test_a_broken_path_between_two_neighbours_is_found(pair: tuple[int, int]) -> None:
    """Both nodes answer the client; only the frames between them are lost."""

    async def part(swarm: ToySwarm, chain: Chain) -> None:
        swarm.network.partitions.add(frozenset(chain.hops[place].address for place in pair))

    chain = survive(part)
    assert "on its way there" in chain.repairs[0].lost[0][1]


@pytest.mark.parametrize("kind", list(StreamKind))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_cut_connection_drops_no_node(place: int, kind: StreamKind) -> None:
    """The control stream or the link is opened again, and every node keeps its session."""

    async def cut(swarm: ToySwarm, chain: Chain) -> None:
        for stream in [s for s in swarm.network.streams if s.host == chain.hops[place].address and s.kind is kind]:
            stream.break_off()

    chain = survive(cut, spans=SPANS)
    assert all(not repair.lost and not repair.gained for repair in chain.repairs)
    assert chain.repairs


@pytest.mark.parametrize("later_s", [0.0, 0.004, 0.012, 0.03])
@pytest.mark.parametrize("first", list(StreamKind))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_stream_cut_during_the_repair_drops_no_node(place: int, first: StreamKind, later_s: float) -> None:
    """One cut connection carries several streams, and the client may notice the second only while it repairs."""

    async def cut(swarm: ToySwarm, chain: Chain) -> None:
        streams = [s for s in swarm.network.streams if s.host == chain.hops[place].address]
        for stream in [s for s in streams if s.kind is first]:
            stream.break_off()
        await asyncio.sleep(later_s)
        for stream in [s for s in streams if s.kind is not first]:
            stream.break_off()

    chain = survive(cut, spans=SPANS)
    assert chain.repairs
    assert all(repair.seconds < 1.0 for repair in chain.repairs), "no node waited for the end of a ban"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_draining_node_is_replaced_in_time(place: int) -> None:
    async def drain(swarm: ToySwarm, chain: Chain) -> None:
        node = swarm.nodes[chain.hops[place].address]
        await node.drain(grace_s=30.0)
        assert not node.sessions

    chain = survive(drain)
    assert [reason for _, reason in chain.repairs[0].lost] == ["it asked to leave"]


def test_a_draining_node_without_replacement_stays_in_use() -> None:
    async def drain(swarm: ToySwarm, chain: Chain) -> None:
        draining = asyncio.create_task(swarm.nodes[chain.hops[1].address].drain(grace_s=1000.0))
        await asyncio.sleep(0)
        swarm.chain = chain
        chain_task.append(draining)

    chain_task: list[asyncio.Task[None]] = []
    chain = survive(drain, spans=SPANS)
    assert chain.hops[1].span == SPANS[1]


@pytest.mark.parametrize("cuts", [[Span(1, 3)], [Span(1, 2), Span(2, 3)], [Span(0, 2), Span(2, 4)], [Span(0, 4)]])
@pytest.mark.parametrize("at", [0, 1, 30])
def test_lost_blocks_are_covered_by_nodes_with_other_spans(cuts: list[Span], at: int) -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        await swarm.kill(chain.hops[1].address)
        for span in cuts:
            await swarm.start(span)

    survive(kill, spans=SPANS, at=at)


@pytest.mark.parametrize("dies", [False, True], ids=["", "and one dies"])
@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("at", [1, 15, 50])
def test_three_lost_blocks_are_covered_by_one_to_three_nodes(at: int, nodes: int, dies: bool) -> None:
    """The trunk has different lengths; a replacement may die while the trunk is replayed into it."""
    cuts = {1: [Span(1, 4)], 2: [Span(1, 2), Span(2, 4)], 3: [Span(1, 2), Span(2, 3), Span(3, 4)]}[nodes]

    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        for address in [hop.address for hop in chain.hops[1:]]:
            await swarm.kill(address)
        first = [await swarm.start(span) for span in cuts]
        if dies:
            while not any(swarm.nodes[address].sessions for address in first):
                await asyncio.sleep(0.0005)
            await swarm.kill(first[-1])
            await swarm.start(cuts[-1])

    chain = survive(kill, spans=SPANS, at=at)
    assert chain.epoch.number >= 1 + dies


def test_one_of_three_replacements_dies_during_the_replay() -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        head = chain.hops[0].address
        await swarm.kill(chain.hops[1].address)
        await swarm.kill(chain.hops[2].address)
        first = [await swarm.start(span) for span in (Span(1, 2), Span(2, 3), Span(3, 4))]
        while not any(swarm.nodes[address].sessions for address in first):
            await asyncio.sleep(0.0005)
        await swarm.kill(first[1])
        await swarm.start(Span(1, 3))
        assert head in swarm.nodes

    chain = survive(kill, spans=SPANS)
    assert chain.epoch.number >= 2


@pytest.mark.parametrize(
    ("hosted", "place", "taker"),
    [
        ([Span(0, 1), Span(1, 3), Span(1, 4)], 1, 2),
        ([Span(0, 3), Span(1, 3), Span(3, 4)], 1, 0),
        ([Span(0, 1), Span(1, 4), Span(3, 4)], 2, 1),
        ([Span(0, 4), Span(1, 3), Span(3, 4)], 2, 0),
        ([Span(0, 1), Span(1, 3), Span(0, 4)], 0, 2),
    ],
)
@pytest.mark.parametrize("harm", ["kill", "freeze", "drain"])
def test_blocks_that_only_a_node_of_the_chain_serves_move_to_it(
    hosted: list[Span], place: int, taker: int, harm: str
) -> None:
    """Two replicas share a span; one is lost, and the other one opens the session again for all of it."""
    started: list[str] = []

    async def disturb(swarm: ToySwarm, chain: Chain) -> None:
        assert chain.hops[taker].address == started[taker]
        swarm.spans[started[taker]] = hosted[taker]
        if harm == "kill":
            await swarm.kill(started[place])
        elif harm == "drain":
            await swarm.nodes[started[place]].drain(grace_s=30.0)
        else:
            swarm.network.freeze(started[place])
            asyncio.get_running_loop().call_later(30, lambda: asyncio.ensure_future(swarm.network.thaw(started[place])))

    async def run() -> Chain:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, spans=hosted) as swarm:
            started.extend(swarm.spans)
            # Until then every node is asked for a part of its span.
            swarm.spans.update(zip(started, SPANS, strict=True))
            generating = asyncio.create_task(swarm.generate(PROMPT, COUNT, patience_s=60.0))
            await at_token(swarm, 20, generating)
            assert swarm.chain is not None
            await disturb(swarm, swarm.chain)
            assert await asyncio.wait_for(generating, 600) == plain_text(PROMPT, COUNT)
            chain = swarm.chain
            await check_idle_after_leases(swarm)
            return chain

    chain = run_virtually(run())
    (repair,) = chain.repairs
    kept = {hop.address for hop in chain.hops}
    reasons = {hop.address: reason for hop, reason in repair.lost}
    assert reasons.keys() == {*started} - kept
    assert reasons.pop(started[place]) != RELIEVED
    assert set(reasons.values()) <= {RELIEVED}
    assert started[taker] in kept
    assert repair.seconds < 5.0, "it waited for the node that was lost"


def test_a_client_waits_for_a_node_and_reports_the_wait() -> None:
    waits: list[ChainWait] = []

    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        chain.waits.notify = waits.append
        await swarm.kill(chain.hops[1].address)
        await asyncio.sleep(20)
        await swarm.start(Span(0, 4))

    survive(kill, spans=SPANS, patience_s=30.0)
    assert str(waits[0].reason) == "no node serves block 1"
    assert 30.0 >= waits[0].remaining_s > waits[-2].remaining_s > 5.0
    assert (waits[-1].reason, waits[-1].succeeded) == (None, True)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_client_waits_for_the_only_node_to_come_back(place: int) -> None:
    """Its ban ends before the client's patience does."""

    async def freeze(swarm: ToySwarm, chain: Chain) -> None:
        address = chain.hops[place].address
        swarm.network.freeze(address)
        asyncio.get_running_loop().call_later(10, lambda: asyncio.ensure_future(swarm.network.thaw(address)))

    survive(freeze, spans=SPANS)


def test_the_end_of_patience_names_blocks_and_keeps_the_text() -> None:
    async def run() -> None:
        network = MemoryNetwork()
        slow_links(network)
        async with toy_swarm(network) as swarm:
            generating = asyncio.create_task(swarm.generate(PROMPT, COUNT, patience_s=5.0))
            await at_token(swarm, 20, generating)
            assert swarm.chain is not None
            waits: list[ChainWait] = []
            swarm.chain.waits.notify = waits.append
            await swarm.kill(swarm.chain.hops[1].address)
            with pytest.raises(MissingBlocks, match="block 1"):
                await generating
            assert {type(wait.reason) for wait in waits[:-1]} == {MissingBlocks}
            left = [wait.remaining_s for wait in waits[:-1]]
            assert 5.0 >= left[0] > 4.0
            assert left == sorted(left, reverse=True)
            assert waits[-1] == ChainWait(swarm.chain.options.session, None, succeeded=False)
            assert len(swarm.kept) >= 20
            assert swarm.kept == plain_text(PROMPT, COUNT)[: len(swarm.kept)]
            await check_idle_after_leases(swarm)

    run_virtually(run())


def test_a_survivor_without_replay_log_is_replayed_to() -> None:
    async def remove_replay_log(swarm: ToySwarm, chain: Chain) -> None:
        for hosted in swarm.nodes[chain.hops[0].address].sessions.values():
            assert hosted.memory.replay_log is not None
            hosted.memory.replay_log.close()
            hosted.memory.replay_log = None
        await swarm.kill(chain.hops[1].address)

    chain = survive(remove_replay_log)
    assert len(chain.repairs[0].lost) == 2
