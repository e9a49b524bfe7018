"""Real nodes: a spare takes over from a killed only holder; an only holder that was stopped serves again at once."""

import asyncio
import signal

import pytest

from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.heal import RegistryKind, bench_heal
from treeswarm_bench.benchmarks.parts.brokers import MOSQUITTO
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import even_cuts, local_swarm

# The old rule took 374 and 473 s in the two runs measured; this bound holds on a machine with a load of 20 too.
SOON_S = 120.0
STOPPED_S = 6.0


@pytest.mark.slow  # four processes load torch; test_hole_watch.py covers the rule on a virtual clock
@pytest.mark.parametrize("kind", ["dht", "mqtt"])
async def test_a_spare_takes_over_from_a_killed_only_holder(kind: RegistryKind) -> None:
    if kind == "mqtt" and MOSQUITTO is None:
        pytest.skip("needs the broker mosquitto")
    result = await bench_heal(BenchSetup(), kills=1, registry_kind=kind, seed=0)
    assert result["well"], result["errors"]
    assert result["beyond_load_s"]["max"] < SOON_S


@pytest.mark.slow  # the same on a virtual clock: test_late_nodes.py
async def test_an_only_holder_that_was_stopped_serves_again_at_once() -> None:
    async with (
        local_swarm("demo", even_cuts(8, 2)) as swarm,
        SwarmClient("demo", peers=swarm.peers, draft="none", tree_size=0) as client,
    ):
        expected = await client.generate("def main():", max_new_tokens=64, ignore_eos=True)
        stopped = swarm.nodes[1].process

        async def stop() -> None:
            stopped.send_signal(signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            stopped.send_signal(signal.SIGCONT)

        run, stopping = client.stream("def main():", max_new_tokens=64, ignore_eos=True), None
        async for _ in run:
            if stopping is None and len(run.token_ids) >= 8:
                stopping = asyncio.create_task(stop())
        assert stopping is not None
        assert stopping.done(), "the text waited for the node"
        assert run.token_ids == expected.token_ids
        assert run.chain is not None
        assert run.chain.repairs == [], "the node kept its session"
        again = await client.generate("def main():", max_new_tokens=8, ignore_eos=True)
        assert again.token_ids == expected.token_ids[:8]
