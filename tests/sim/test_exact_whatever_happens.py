"""Every drafter, driver and loss together, on toy nodes: the text is the plain one."""

import asyncio
import itertools

import pytest
from tests.sim.test_recovery import check_idle_after_leases, slow_links
from tests.support.driven_swarm import DrivenSwarm, finish
from tests.support.toy_swarm import SPANS, ToySpeculator, plain_text, toy_swarm

from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.virtual_clock import run_virtually

VICTIMS = ("none", "tail", "middle", "driver")
PROMPT, COUNT = [1, 2, 3, 4, 0, 1, 2], 30


def combinations() -> list[tuple[str, bool, str]]:
    """Return all combinations of toy drafters, places of the loop and losses; a loop at the client has no driver."""
    drafts = ("guessing", "ngram", "tail", "tail+ngram")
    cases = itertools.product(drafts, (False, True), VICTIMS)
    return [case for case in cases if case[1] or case[2] != "driver"]


@pytest.mark.parametrize(("draft", "by_node", "victim"), combinations())
def test_the_text_is_plain_whatever_happens(draft: str, by_node: bool, victim: str) -> None:
    """Two nodes of each span, and a model that is a hash; the loop, the sessions and the driver are the product's."""
    speculator = ToySpeculator(luck=0.7)

    async def run() -> None:
        network = MemoryNetwork(1)
        slow_links(network, 0.01)
        async with toy_swarm(network, spans=[*SPANS, *SPANS], speculator=speculator) as toys:
            swarm = DrivenSwarm(toys)
            driver = next(iter(toys.spans))
            swarm.offer(driver, draft=draft)
            client = swarm.client(driver, draft="guessing") if by_node else swarm.client("self", draft=draft)
            text = client.stream(PROMPT, max_new_tokens=COUNT)
            async for _ in text:
                if victim != "none" and len(text.token_ids) >= COUNT // 3:
                    hops = text.chain.hops if text.chain is not None else text.drivers[0].hops
                    lost = driver if victim == "driver" else hops[-1 if victim == "tail" else 1].address
                    await toys.kill(lost)
                    if lost == driver:
                        del swarm.drivers[driver]
                    break
            assert await asyncio.wait_for(finish(text), 600) == plain_text(PROMPT, COUNT)
            assert len(text.recorder.recoveries) == (victim != "none")
            assert len(text.drivers) == by_node
            assert (len(speculator.roots) > 0) == draft.startswith("tail")
            await check_idle_after_leases(toys)
            assert not any(driver.hosts for driver in swarm.drivers.values())

    run_virtually(run())
