"""A node that is late lives: on a loaded machine, or stopped for a moment.  On a virtual clock."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.support.toy_swarm import SPANS, ToySwarm, plain_text, toy_swarm

from treeswarm.errors import MissingBlocks
from treeswarm.protocol.spans import Span
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.chain.chain import Chain
from treeswarm_client.chain.supervisor import ONLY_HOLDER_SILENCE_S
from treeswarm_client.chain.wait_events import ChainWait

PROMPT = [1, 2, 3, 4, 0, 1, 2]
COUNT = 90
TWICE = [*SPANS, *SPANS]
# How long a machine answers nothing while its load rises, stays and falls.
RISING_LOAD_S = (0.3, 0.8, 1.5, 3.0, 5.0, 6.0, 3.0, 4.0, 6.0, 5.0, 2.0, 0.5)


def generate(
    disturb: Callable[[ToySwarm, Chain], Awaitable[None]], spans: list[Span], *, patience_s: float = 0.0
) -> tuple[Chain, list[ChainWait]]:
    """Disturb one generation, which must end with the plain text; return its chain and its waits."""

    async def run() -> tuple[Chain, list[ChainWait]]:
        network, waits = MemoryNetwork(1), list[ChainWait]()
        original = network.transport
        network.transport = lambda: EmulatedTransport(original(), LinkShape(0.01))  # type: ignore[method-assign, assignment, return-value]
        async with toy_swarm(network, spans=spans) as swarm:
            options = {"patience_s": patience_s, "on_wait": waits.append, "tree_size": 0}
            generating = asyncio.create_task(swarm.generate(PROMPT, COUNT, **options))  # type: ignore[arg-type]
            while (swarm.chain is None or len(swarm.kept) < 20) and not generating.done():
                await asyncio.sleep(0.001)
            assert swarm.chain is not None
            await disturb(swarm, swarm.chain)
            assert await generating == plain_text(PROMPT, COUNT)
            return swarm.chain, waits

    return run_virtually(run())


async def freeze(swarm: ToySwarm, address: str, seconds: float) -> None:
    swarm.network.freeze(address)
    await asyncio.sleep(seconds)
    await swarm.network.thaw(address)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
def test_a_node_of_a_loaded_machine_is_kept(place: int) -> None:
    async def load(swarm: ToySwarm, chain: Chain) -> None:
        for seconds in RISING_LOAD_S:
            await freeze(swarm, chain.hops[place].address, seconds)
            await asyncio.sleep(0.2)

    chain, _ = generate(load, TWICE)
    assert chain.repairs == []


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
def test_a_dead_node_is_replaced_as_soon_as_on_a_quiet_machine(place: int) -> None:
    stopped_at, noticed_at = [0.0], [0.0]

    async def stop(swarm: ToySwarm, chain: Chain) -> None:
        loop = asyncio.get_running_loop()
        stopped_at[0] = loop.time()
        swarm.network.freeze(chain.hops[place].address)
        while not chain.repairs:
            await asyncio.sleep(0.01)
        noticed_at[0] = loop.time()
        await swarm.network.thaw(chain.repairs[0].lost[0][0].address)

    chain, _ = generate(stop, TWICE)
    assert "nothing heard" in chain.repairs[0].lost[0][1]
    assert noticed_at[0] - stopped_at[0] < 4.0


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
def test_the_only_holder_goes_on_at_once_after_a_stop(place: int) -> None:
    resumed_at, ended_at = [0.0], [0.0]

    async def stop(swarm: ToySwarm, chain: Chain) -> None:
        kept = len(swarm.kept)
        await freeze(swarm, chain.hops[place].address, 6.0)
        resumed_at[0] = asyncio.get_running_loop().time()
        while len(swarm.kept) <= kept + 1:
            await asyncio.sleep(0.01)
        ended_at[0] = asyncio.get_running_loop().time()

    chain, waits = generate(stop, SPANS)
    assert chain.repairs == []
    assert ended_at[0] - resumed_at[0] < 1.0
    reasons = [str(wait.reason) for wait in waits if wait.reason is not None]
    assert "nothing heard from" in reasons[0]
    assert "no other node serves these blocks" in reasons[0]
    assert waits[-1].succeeded
    assert waits[-1].reason is None


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
def test_the_last_holder_is_kept_while_it_opens_the_session_late(place: int) -> None:
    """The other one hangs, so the node that is left is not given up because its machine is loaded."""

    async def stop(swarm: ToySwarm, chain: Chain) -> None:
        lost = chain.hops[place]
        last = next(a for a, span in swarm.spans.items() if span == lost.span and a != lost.address)
        swarm.network.freeze(lost.address)
        while not any(stream.host == last for stream in swarm.network.streams):
            await asyncio.sleep(0.001)
        for _ in range(3):
            await freeze(swarm, last, 4.0)
            await asyncio.sleep(0.2)
        await asyncio.sleep(20.0)
        await swarm.network.thaw(lost.address)

    chain, _ = generate(stop, TWICE, patience_s=60.0)
    (repair,) = chain.repairs
    assert len(repair.lost) == 1
    assert repair.seconds < 15.0


def test_the_only_holder_is_given_up_in_the_end() -> None:
    async def stop(swarm: ToySwarm, chain: Chain) -> None:
        swarm.network.freeze(chain.hops[1].address)
        began = asyncio.get_running_loop().time()
        while not chain.epoch.lost:
            await asyncio.sleep(0.1)
        assert ONLY_HOLDER_SILENCE_S <= asyncio.get_running_loop().time() - began < ONLY_HOLDER_SILENCE_S + 5.0

    with pytest.raises(MissingBlocks):
        generate(stop, SPANS)
