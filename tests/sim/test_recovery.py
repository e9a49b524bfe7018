"""Generations that outlive their nodes, on a virtual clock, by seeded schedules of everything that goes wrong."""

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
from treeswarm_client.chain.chain import Chain
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


async def settle(swarm: ToySwarm) -> None:
    """Past every lease; then nothing may be left."""
    await asyncio.sleep(120)
    swarm.check_idle()


def survives(
    harm: Callable[[ToySwarm, Chain], Coroutine[Any, Any, None]],
    *,
    spans: list[Span] = TWICE,
    at: int = 20,
    patience_s: float = 60.0,
    **options: Any,
) -> Chain:
    """One generation that is harmed once, after `at` tokens; it must end with the plain text."""

    async def run() -> Chain:
        network = MemoryNetwork(1)
        slow_links(network)
        async with toy_swarm(network, spans=spans) as swarm:
            generating = asyncio.create_task(swarm.generate(PROMPT, COUNT, patience_s=patience_s, **options))
            await at_token(swarm, at, generating)
            assert swarm.chain is not None
            await harm(swarm, swarm.chain)
            assert await asyncio.wait_for(generating, 600) == plain_text(PROMPT, COUNT)
            chain = swarm.chain
            await settle(swarm)
            return chain

    return run_virtually(run())


# ---------------------------------------------------------------- one thing at a time


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
@pytest.mark.parametrize("at", [1, 20, 45])
def test_a_killed_node_is_replaced(place: int, at: int) -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        await swarm.kill(chain.hops[place].address)

    chain = survives(kill, at=at)
    (repair,) = chain.repairs
    assert [hop.span for hop, _ in repair.lost] == [SPANS[place]]
    assert [hop.span for hop in repair.gained] == [SPANS[place]]
    assert {hop.node for hop in chain.hops} <= chain.router.traversed, "their failures may be forgotten"


@pytest.mark.parametrize("places", [(0, 1), (1, 2), (0, 2), (0, 1, 2)])
def test_nodes_that_die_together_are_replaced_together(places: tuple[int, ...]) -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        for address in [chain.hops[place].address for place in places]:
            await swarm.kill(address)

    survives(kill)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_node_that_hangs_is_found_by_its_silence(place: int) -> None:
    async def freeze(swarm: ToySwarm, chain: Chain) -> None:
        address = chain.hops[place].address
        swarm.network.freeze(address)
        asyncio.get_running_loop().call_later(100, lambda: asyncio.ensure_future(swarm.network.thaw(address)))

    chain = survives(freeze)
    assert "nothing heard" in chain.repairs[0].lost[0][1]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_node_that_wakes_up_again_meanwhile_disturbs_nothing(place: int) -> None:
    async def freeze(swarm: ToySwarm, chain: Chain) -> None:
        address = chain.hops[place].address
        swarm.network.freeze(address)
        asyncio.get_running_loop().call_later(3.1, lambda: asyncio.ensure_future(swarm.network.thaw(address)))

    survives(freeze)


@pytest.mark.parametrize("pair", [(0, 1), (1, 2)])
def test_two_neighbours_that_lose_sight_of_each_other(pair: tuple[int, int]) -> None:
    """Both answer the client all the time; only the frames between them vanish."""

    async def part(swarm: ToySwarm, chain: Chain) -> None:
        swarm.network.partitions.add(frozenset(chain.hops[place].address for place in pair))

    chain = survives(part)
    assert "on its way there" in chain.repairs[0].lost[0][1]


@pytest.mark.parametrize("kind", list(StreamKind))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_cut_connection_costs_no_node(place: int, kind: StreamKind) -> None:
    """The control stream is opened again, the link dialled again; everybody keeps what it has."""

    async def cut(swarm: ToySwarm, chain: Chain) -> None:
        for stream in [s for s in swarm.network.streams if s.host == chain.hops[place].address and s.kind is kind]:
            stream.break_off()

    chain = survives(cut, spans=SPANS)
    assert all(not repair.lost and not repair.gained for repair in chain.repairs)
    assert chain.repairs


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_draining_node_is_left_in_time(place: int) -> None:
    async def drain(swarm: ToySwarm, chain: Chain) -> None:
        node = swarm.nodes[chain.hops[place].address]
        await node.drain(grace_s=30.0)
        assert not node.sessions

    chain = survives(drain)
    assert [why for _, why in chain.repairs[0].lost] == ["it asked to leave"]


def test_a_draining_node_that_nobody_can_replace_stays_until_its_grace_is_over() -> None:
    async def drain(swarm: ToySwarm, chain: Chain) -> None:
        draining = asyncio.create_task(swarm.nodes[chain.hops[1].address].drain(grace_s=1000.0))
        await asyncio.sleep(0)
        swarm.chain = chain
        chain_task.append(draining)

    chain_task: list[asyncio.Task[None]] = []
    chain = survives(drain, spans=SPANS)
    assert chain.hops[1].span == SPANS[1]


@pytest.mark.parametrize("cuts", [[Span(1, 3)], [Span(1, 2), Span(2, 3)], [Span(0, 2), Span(2, 4)], [Span(0, 4)]])
@pytest.mark.parametrize("at", [0, 1, 30])
def test_lost_blocks_are_covered_by_one_node_or_several_with_any_boundaries(cuts: list[Span], at: int) -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        await swarm.kill(chain.hops[1].address)
        for span in cuts:
            await swarm.start(span)

    survives(kill, spans=SPANS, at=at)


@pytest.mark.parametrize("dies", [False, True], ids=["", "and one dies"])
@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("at", [1, 15, 50])
def test_three_lost_blocks_by_one_two_and_three_nodes(at: int, nodes: int, dies: bool) -> None:
    """Trunks of differing lengths; a replacement may die while the trunk is replayed into it."""
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

    chain = survives(kill, spans=SPANS, at=at)
    assert chain.epoch.number >= 1 + dies


def test_three_replacements_one_dies_while_the_trunk_is_replayed() -> None:
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

    chain = survives(kill, spans=SPANS)
    assert chain.epoch.number >= 2


def test_a_client_waits_for_a_node_to_appear_and_tells_of_it() -> None:
    waits: list[ChainWait] = []

    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        chain.waits.notify = waits.append
        await swarm.kill(chain.hops[1].address)
        await asyncio.sleep(20)
        await swarm.start(Span(0, 4))

    survives(kill, spans=SPANS, patience_s=30.0)
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

    survives(freeze, spans=SPANS)


def test_patience_ends_with_an_error_that_names_the_blocks_and_keeps_the_text() -> None:
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
            await settle(swarm)

    run_virtually(run())


def test_a_survivor_without_a_journal_is_replayed_to_from_further_upstream() -> None:
    async def forget(swarm: ToySwarm, chain: Chain) -> None:
        for hosted in swarm.nodes[chain.hops[0].address].sessions.values():
            assert hosted.memory.replay_log is not None
            hosted.memory.replay_log.close()
            hosted.memory.replay_log = None
        await swarm.kill(chain.hops[1].address)

    chain = survives(forget)
    assert len(chain.repairs[0].lost) == 2
