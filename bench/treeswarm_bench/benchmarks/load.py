"""`swarm bench load`: more clients than there is room for.

Each client must either be served, with the right text, or be refused with a clear error.
"""

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

from treeswarm.errors import SwarmError
from treeswarm.model_files import read_shape, resolve_model
from treeswarm_bench.benchmarks.common import BenchSetup, percentiles
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm
from treeswarm_client.provenance import machine_provenance

# Each node has room for a quarter of the clients.
ROOM_SHARE = 4
PATIENCE_S = 600.0
HASTE_S = 1.0


async def bench_load(setup: BenchSetup, *, clients: int) -> dict[str, Any]:
    """Run `clients` at once, first patient ones and then hasty ones, on three nodes with room for a quarter of them."""
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, setup.nodes)
    flags = ("--max-sessions", str(max(1, clients // ROOM_SHARE)))
    async with local_swarm(setup.model, spans, dtype=setup.dtype, flags=flags) as swarm:
        async with SwarmClient(model=setup.model, peers=swarm.peers, tree_size=0) as client:
            prompts = held_out_prompts(client, min(clients, setup.prompts))
            expected = [(await _generate(client, prompt, setup)).token_ids for prompt in prompts]
        before = _memory_mib(swarm)
        rows = []
        for name, patience in (("patient", PATIENCE_S), ("hasty", HASTE_S)):
            start = time.perf_counter()
            requests = [_request(setup, swarm, prompts[i % len(prompts)], patience) for i in range(clients)]
            answers = await asyncio.gather(*requests)
            right = [text == expected[i % len(expected)] for i, (text, _, _) in enumerate(answers) if text is not None]
            rows.append(
                {
                    "clients": name,
                    "patience_s": patience,
                    "served": len(right),
                    "wrong": right.count(False),
                    "refused": dict(Counter(error for text, error, _ in answers if text is None)),
                    "seconds": time.perf_counter() - start,
                    "waited_s": percentiles([waited for text, _, waited in answers if text is not None]),
                }
            )
        after = _memory_mib(swarm)
        async with SwarmClient(model=setup.model, peers=swarm.peers, tree_size=0) as client:
            nodes = await client.describe_nodes()
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


async def _request(
    setup: BenchSetup, swarm: LocalSwarm, prompt: list[int], patience: float
) -> tuple[list[int] | None, str, float]:
    """Generate with a client of its own.

    Returns the text, or None and the error; and the seconds until the first token or the error.
    """
    start = time.perf_counter()
    try:
        async with SwarmClient(model=setup.model, peers=swarm.peers, tree_size=0, patience=patience) as client:
            run = await _generate(client, prompt, setup)
    except SwarmError as error:
        return None, f"{type(error).__name__} ({getattr(error, 'code', 'no code')})", time.perf_counter() - start
    assert run.first_token_s is not None
    return run.token_ids, "", run.first_token_s


async def _generate(client: SwarmClient, prompt: list[int], setup: BenchSetup) -> Run:
    return await client.generate(prompt, max_new_tokens=setup.tokens, ignore_eos=True)


def _memory_mib(swarm: LocalSwarm) -> list[float]:
    """Return the resident MiB of each node."""
    resident = []
    for node in swarm.nodes:
        lines = Path(f"/proc/{node.process.pid}/status").read_text("ascii").splitlines()
        resident.append(next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")))
    return resident
