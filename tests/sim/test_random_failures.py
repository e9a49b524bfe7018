"""Generations survive random failures of all kinds at once, and planted mistakes in the program are noticed."""

import asyncio
import dataclasses
import random

import pytest
from tests.sim.test_recovery import at_token, slow_links
from tests.support.toy_swarm import SPANS, ToySwarm, plain_text, toy_swarm

from treeswarm.errors import MissingBlocks, Refused, SwarmError
from treeswarm.protocol.messages import Append, FaultCode
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession
from treeswarm.session.steps import Step
from treeswarm.transport.memory import Faults, MemoryNetwork
from treeswarm.transport.seam import StreamKind
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.sessions.server_session import ServerSession
from treeswarm_node.sessions.session_parts import SessionEpoch

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 60
LINKS = frozenset({StreamKind.LINK})
TWICE = [*SPANS, *SPANS]


async def cause_failures(swarm: ToySwarm, random_: random.Random, generating: "asyncio.Task[list[int]]") -> None:
    """Kill, freeze, partition, cut and drain nodes at random moments.  No block is without nodes for long."""
    while not generating.done():
        await asyncio.sleep(random_.uniform(0.0, 0.6))
        chain = swarm.chain
        if chain is None or not chain.epoch.members or generating.done():
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
                for span in SPANS:  # whatever else was started, the model stays whole
                    if not any(span in served for served in swarm.spans.values()):
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


# Faults that no network can cause, only a program that breaks the contract.
BREACHES = {FaultCode.BAD_TREE, FaultCode.MALFORMED, FaultCode.OUT_OF_CREDIT, FaultCode.OUT_OF_ROOM}


def run_schedule(seed: int, faults: Faults | None = None) -> list[int] | None:
    """Generate through a seeded schedule, and return the text, or None after an error with a message.

    A hang, a leak or a breach of the contract fails.
    """
    breaches: list[str] = []
    fail = ServerSession.fail

    async def recorded_fail(self: ServerSession, error: SwarmError) -> None:
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
            harming = asyncio.create_task(cause_failures(swarm, random_, generating))
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
            assert not [name for name in names if "_forward_results" in name or "_ping" in name or "_listen" in name]
            return text

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ServerSession, "fail", recorded_fail)
        text = run_virtually(run())
    assert not breaches
    return text


TERRIBLE = Faults(drop=0.002, double=0.1, delay=0.1, max_delay_s=0.3, cut=0.002, kinds=LINKS)


@pytest.mark.parametrize("seed", range(40))
def test_random_failures_change_no_token(seed: int) -> None:
    assert run_schedule(seed) == plain_text(PROMPT, COUNT)


@pytest.mark.parametrize("seed", range(20))
def test_random_failures_on_a_terrible_network(seed: int) -> None:
    assert run_schedule(1000 + seed, TERRIBLE) in (plain_text(PROMPT, COUNT), None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_schedules_rarely_end_in_an_error() -> None:
    failed = 0
    for seed in range(1000):
        failed += run_schedule(10_000 + seed, TERRIBLE if seed % 2 else None) is None
    assert failed < 20


# ---------------------------------------------------------------- planted mistakes


class TestPlantedMistakes:
    """Each mistake must be noticed by another text, an error, a leak or a hang."""

    late = Faults(double=0.5, delay=0.5, max_delay_s=5.0, kinds=LINKS)

    def noticed(self, seeds: range = range(12), faults: Faults | None = None) -> bool:
        for seed in seeds:
            try:
                if run_schedule(seed, faults) != plain_text(PROMPT, COUNT):
                    return True
            except (SwarmError, AssertionError, TimeoutError):
                return True
        return False

    def test_nothing_is_noticed_without_a_mistake(self) -> None:
        assert not self.noticed()
        assert not self.noticed(faults=self.late)

    def test_applying_frames_of_an_old_epoch_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = NodeSession.receive

        def careless(self: NodeSession, append: Append) -> list[Step]:
            return honest(self, dataclasses.replace(append, epoch=max(append.epoch, self.terms.epoch)))

        monkeypatch.setattr(NodeSession, "receive", careless)
        assert self.noticed(faults=self.late)

    def test_a_router_without_bans_ends_in_an_error(self) -> None:
        """Hanging nodes are asked again, with pauses, until an error ends the generation."""

        async def run() -> None:
            network = MemoryNetwork()
            slow_links(network)
            async with toy_swarm(network, spans=TWICE) as swarm:
                generating = asyncio.create_task(swarm.generate(PROMPT, COUNT, patience_s=30.0, forgetful=True))
                await at_token(swarm, 10, generating)
                assert swarm.chain is not None
                for address in [address for address, span in swarm.spans.items() if span == SPANS[1]]:
                    network.freeze(address)
                with pytest.raises(MissingBlocks, match="no chain held"):
                    await generating
                assert swarm.chain.epoch.number < 100
                for address in list(network.frozen):
                    await network.thaw(address)

        run_virtually(run())

    def test_forwarding_a_replay_past_its_end_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SessionEpoch, "forwards_replay", property(lambda self: True))
        assert self.noticed()
