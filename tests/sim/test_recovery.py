"""Generations that outlive their nodes, on a virtual clock, by seeded schedules of everything that goes wrong."""

import asyncio
import dataclasses
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from treeswarm.errors import MissingBlocks, Refused, SwarmError
from treeswarm.messages import Append, FaultCode
from treeswarm.session import NodeSession
from treeswarm.spans import Span
from treeswarm.steps import Step
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import Faults, MemoryNetwork
from treeswarm.transport.seam import StreamKind
from treeswarm_client.chain import Chain
from treeswarm_node.hosted import HostedSession

from ..virtual_clock import run_virtually
from .toy import SPANS, ToySwarm, plain_text, toy_swarm

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
    assert chain.epoch >= 2


def test_a_client_waits_for_a_node_to_appear() -> None:
    async def kill(swarm: ToySwarm, chain: Chain) -> None:
        await swarm.kill(chain.hops[1].address)
        await asyncio.sleep(20)
        await swarm.start(Span(0, 4))

    survives(kill, spans=SPANS, patience_s=30.0)


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
            await swarm.kill(swarm.chain.hops[1].address)
            with pytest.raises(MissingBlocks, match="block 1"):
                await generating
            assert len(swarm.kept) >= 20
            assert swarm.kept == plain_text(PROMPT, COUNT)[: len(swarm.kept)]
            await settle(swarm)

    run_virtually(run())


def test_a_survivor_without_a_journal_is_replayed_to_from_further_upstream() -> None:
    async def forget(swarm: ToySwarm, chain: Chain) -> None:
        for hosted in swarm.nodes[chain.hops[0].address].sessions.values():
            assert hosted.journal is not None
            hosted.journal.close()
            hosted.journal = None
        await swarm.kill(chain.hops[1].address)

    chain = survives(forget)
    assert len(chain.repairs[0].lost) == 2


# ---------------------------------------------------------------- everything at once


async def calamities(swarm: ToySwarm, random_: random.Random, generating: "asyncio.Task[list[int]]") -> None:
    """Kill, hang, part, cut and drain nodes at random moments, never the last server of a block for long."""
    while not generating.done():
        await asyncio.sleep(random_.uniform(0.0, 0.6))
        chain = swarm.chain
        if chain is None or not chain.members or generating.done():
            continue
        place = random_.randrange(len(chain.hops))
        address = chain.hops[place].address
        if address not in swarm.nodes:
            continue
        match random_.randrange(5):
            case 0:
                await swarm.kill(address)
                await asyncio.sleep(random_.uniform(0.0, 3.0))
                await swarm.start(random_.choice([*SPANS, Span(0, 2), Span(1, 4), Span(0, 4)]))
                for span in SPANS:  # whatever else came, the model stays whole
                    if not any(span in known for known in swarm.spans.values()):
                        await swarm.start(span)
            case 1:
                swarm.network.freeze(address)
                await asyncio.sleep(random_.uniform(0.1, 8.0))
                await swarm.network.thaw(address)
            case 2:
                pair = frozenset((address, random_.choice(list(swarm.nodes))))
                swarm.network.partitions.add(pair)
                await asyncio.sleep(random_.uniform(0.1, 12.0))
                swarm.network.partitions.discard(pair)
            case 3:
                streams = [stream for stream in swarm.network.streams if stream.host == address]
                random_.choice(streams).break_off()
            case 4:
                spare = await swarm.start(swarm.spans[address])
                assert spare != address
                swarm.spans.pop(address)
                await swarm.nodes[address].drain(grace_s=random_.uniform(0.0, 2.0))
                await swarm.stop_drained(address)


# What no network can cause, only a program that breaks the contract.
BREACHES = {FaultCode.BAD_TREE, FaultCode.MALFORMED, FaultCode.OUT_OF_CREDIT, FaultCode.OUT_OF_ROOM}


def live_through(seed: int, faults: Faults | None = None) -> list[int] | None:
    """A generation through a seeded schedule: its text, or None after a clear error; never a hang, a leak or a breach
    of the contract."""
    breaches: list[str] = []
    fail = HostedSession.fail

    async def noted(self: HostedSession, error: SwarmError) -> None:
        if isinstance(error, Refused) and error.code in BREACHES:
            breaches.append(str(error))
        await fail(self, error)

    async def run() -> list[int] | None:
        random_ = random.Random(seed)
        network = MemoryNetwork(seed, faults or Faults())
        slow_links(network, random_.choice([0.001, 0.01, 0.05]))
        async with toy_swarm(network, spans=TWICE) as swarm:
            generating = asyncio.create_task(
                swarm.generate(
                    PROMPT,
                    COUNT,
                    seed=seed,
                    tree_size=random_.choice([0, 1, 5, 12]),
                    segment_rows=random_.choice([2, 4, 64]),
                    patience_s=120.0,
                )
            )
            harming = asyncio.create_task(calamities(swarm, random_, generating))
            text: list[int] | None = None
            try:
                async with asyncio.timeout(3000):
                    text = await generating
            except TimeoutError:
                raise AssertionError("the generation hangs") from None
            except SwarmError as error:
                assert str(error)
            assert swarm.kept == plain_text(PROMPT, COUNT)[: len(swarm.kept)]
            await harming
            network.partitions.clear()
            for address in list(network.frozen):
                await network.thaw(address)
            await asyncio.sleep(800)
            swarm.check_idle()
            names = {str(task.get_coro()) for task in asyncio.all_tasks()}
            assert not [name for name in names if "_pass_on" in name or "_ping" in name or "_listen" in name]
            return text

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(HostedSession, "fail", noted)
        text = run_virtually(run())
    assert not breaches
    return text


TERRIBLE = Faults(drop=0.002, double=0.1, delay=0.1, longest_s=0.3, cut=0.002, kinds=LINKS)


@pytest.mark.parametrize("seed", range(40))
def test_seeded_calamities_change_no_token(seed: int) -> None:
    assert live_through(seed) == plain_text(PROMPT, COUNT)


@pytest.mark.parametrize("seed", range(20))
def test_calamities_on_a_terrible_network(seed: int) -> None:
    assert live_through(1000 + seed, TERRIBLE) in (plain_text(PROMPT, COUNT), None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_schedules() -> None:
    failed = 0
    for seed in range(1000):
        failed += live_through(10_000 + seed, TERRIBLE if seed % 2 else None) is None
    assert failed < 20


# ---------------------------------------------------------------- planted mistakes


class TestPlantedMistakes:
    """Each must be noticed: another text, an error, a leak or a hang."""

    late = Faults(double=0.5, delay=0.5, longest_s=5.0, kinds=LINKS)

    def noticed(self, seeds: range = range(12), faults: Faults | None = None) -> bool:
        for seed in seeds:
            try:
                if live_through(seed, faults) != plain_text(PROMPT, COUNT):
                    return True
            except (SwarmError, AssertionError, TimeoutError):
                return True
        return False

    def test_without_them_all_is_well(self) -> None:
        assert not self.noticed()
        assert not self.noticed(faults=self.late)

    def test_applying_a_late_epoch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = NodeSession.receive

        def careless(self: NodeSession, append: Append) -> list[Step]:
            return honest(self, dataclasses.replace(append, epoch=max(append.epoch, self.terms.epoch)))

        monkeypatch.setattr(NodeSession, "receive", careless)
        assert self.noticed(faults=self.late)

    def test_forwarding_a_replay_past_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(HostedSession, "forwards_replay", property(lambda self: True, lambda self, value: None))
        assert self.noticed()
