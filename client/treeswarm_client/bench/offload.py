"""What it costs to stream a node's weights from disk at every forward, and how trees spread that over their tokens."""

from collections.abc import Sequence
from typing import Any

from treeswarm.model_files import read_shape, resolve_model
from treeswarm_client.bench.common import BenchSetup, provenance_of_machine, spread
from treeswarm_client.bench.links import rate
from treeswarm_client.bench.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.local_swarm import LocalSwarm, even_cuts, local_swarm
from treeswarm_client.run import Run

SIZES = (0, 8, 64)


async def bench_offload(setup: BenchSetup, *, sizes: Sequence[int]) -> dict[str, Any]:
    """The same prompts on nodes with `--offload disk` and on plain ones, one after the other.  The operating system may
    keep the file in memory: then this is what copying costs, and a disk's own time comes on top."""
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, setup.nodes)
    runs: dict[str, dict[int, list[Run]]] = {}
    for offload in ("none", "disk"):
        flags = ("--offload", offload)
        async with local_swarm(setup.model, spans, dtype=setup.dtype, swarm_key=setup.swarm_key, flags=flags) as swarm:
            runs[offload] = {size: await _runs(setup, swarm, size) for size in sizes}
    return {
        "bench": "offload",
        "sizes": [
            {"tree_size": size} | {where: _speed(runs[where][size]) for where in runs} | _beside(runs, size)
            for size in sizes
        ],
        "mismatches": sum(
            plain.token_ids != streamed.token_ids
            for size in sizes
            for plain, streamed in zip(runs["none"][size], runs["disk"][size], strict=True)
        ),
        "provenance": provenance_of_machine() | {"model": setup.model, "dtype": setup.dtype, "nodes": setup.nodes},
    }


async def _runs(setup: BenchSetup, swarm: LocalSwarm, size: int) -> list[Run]:
    async with SwarmClient(model=setup.model, peers=swarm.peers, draft=setup.draft, swarm_key=setup.key) as client:
        return [
            await client.generate(prompt, max_new_tokens=setup.tokens, tree_size=size, ignore_eos=True)
            for prompt in held_out_prompts(client, setup.prompts)
        ]


def _speed(runs: Sequence[Run]) -> dict[str, Any]:
    trips = [trip for run in runs for trip in run.meter.trips[1:]]
    return {
        "tokens_per_s": spread([rate(run) for run in runs]),
        "compute_ms": spread([1e3 * trip.compute_s for trip in trips]),
    }


def _beside(runs: dict[str, dict[int, list[Run]]], size: int) -> dict[str, Any]:
    pairs = zip(runs["none"][size], runs["disk"][size], strict=True)
    return {"ratio": spread([rate(streamed) / rate(plain) for plain, streamed in pairs])}
