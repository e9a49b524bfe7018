"""More clients than there is room for: is everybody served or clearly refused, and with the right text?"""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

from treeswarm.errors import SwarmError
from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup
from treeswarm_bench.benchmarks.faults import percentiles
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm
from treeswarm_client.provenance import machine_provenance

# Of each node: a quarter of the clients.
ROOM_SHARE = 4
PATIENCE_S = 600.0
HASTE_S = 1.0


async def bench_load(setup: BenchSetup, *, clients: int) -> dict[str, Any]:
    """`clients` at once on three nodes with room for a quarter of them, patient ones and hasty ones."""
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, setup.nodes)
    flags = ("--max-sessions", str(max(1, clients // ROOM_SHARE)))
    async with local_swarm(setup.model, spans, dtype=setup.dtype, flags=flags) as swarm:
        async with SwarmClient(model=setup.model, peers=swarm.peers, tree_size=0) as alone:
            prompts = held_out_prompts(alone, min(clients, setup.prompts))
            expected = [(await _generate(alone, prompt, setup)).token_ids for prompt in prompts]
        before = _memory(swarm)
        rows = []
        for name, patience in (("patient", PATIENCE_S), ("hasty", HASTE_S)):
            start = time.perf_counter()
            asked = [_ask(setup, swarm, prompts[i % len(prompts)], patience) for i in range(clients)]
            answers = await asyncio.gather(*asked)
            right = [text == expected[i % len(expected)] for i, (text, _, _) in enumerate(answers) if text is not None]
            rows.append(
                {
                    "clients": name,
                    "patience_s": patience,
                    "served": len(right),
                    "wrong": right.count(False),
                    "refused": dict(Counter(why for text, why, _ in answers if text is None)),
                    "seconds": time.perf_counter() - start,
                    "waited_s": percentiles([waited for text, _, waited in answers if text is not None]),
                }
            )
        after = _memory(swarm)
        async with SwarmClient(model=setup.model, peers=swarm.peers, tree_size=0) as alone:
            nodes = await alone.describe_nodes()
    return {
        "bench": "load",
        "nodes": setup.nodes,
        "room": int(flags[1]),
        "clients": clients,
        "rounds": rows,
        "memory_mib": {"before": before, "after": after},
        "left_open": sum(node.sessions for node in nodes.values()),
        "refusals": sum(node.refused for node in nodes.values()),
        "well": all(row["wrong"] == 0 for row in rows) and rows[0]["served"] == clients,
        "provenance": machine_provenance() | {"model": setup.model, "dtype": setup.dtype, "link": "loopback"},
    }


async def _ask(
    setup: BenchSetup, swarm: LocalSwarm, prompt: list[int], patience: float
) -> tuple[list[int] | None, str, float]:
    """The text or why there is none, and the seconds until the first token."""
    start = time.perf_counter()
    try:
        async with SwarmClient(model=setup.model, peers=swarm.peers, tree_size=0, patience=patience) as client:
            run = await _generate(client, prompt, setup)
    except SwarmError as error:
        return None, f"{type(error).__name__} ({getattr(error, 'code', 'no code')})", time.perf_counter() - start
    assert run.first_token_s is not None
    return run.token_ids, "", run.first_token_s


async def _generate(client: SwarmClient, prompt: list[int], setup: BenchSetup) -> Any:
    return await client.generate(prompt, max_new_tokens=setup.tokens, ignore_eos=True)


def _memory(swarm: LocalSwarm) -> list[float]:
    """Resident MiB of each node."""
    found = []
    for node in swarm.nodes:
        lines = Path(f"/proc/{node.process.pid}/status").read_text("ascii").splitlines()
        found.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")))
    return found
