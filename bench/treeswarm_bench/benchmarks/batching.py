"""`swarm bench batch`: how fast a swarm serves many clients at once; and the speed of generations."""

import asyncio
import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

from treeswarm_bench.benchmarks.common import BenchSetup, BenchSwarm, bench_swarm, spread
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run

CLIENTS = (1, 4, 16)


def rate(run: Run) -> float:
    """Return the tokens per second of a generation."""
    assert run.stats is not None
    return run.stats.tokens_per_second


def speed(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the figures of some generations together."""
    stats = [run.stats for run in runs if run.stats]
    traversals = sum(s.traversals for s in stats)
    return {
        "tokens_per_traversal": sum(s.committed for s in stats) / traversals,
        "tokens_per_second": spread([s.tokens_per_second for s in stats]),
        "draft_ms_per_traversal": 1e3 * sum(s.time.draft for s in stats) / traversals,
        "compute_ms_per_traversal": 1e3 * sum(s.time.compute for s in stats) / traversals,
    }


async def bench_batch(setup: BenchSetup, *, clients: Sequence[int] = CLIENTS) -> dict[str, Any]:
    """Run many plain clients at once: total tokens per second, and sessions per forward by the nodes' own counters.

    They decode without drafts, because drafting on the same cores would hide the effect of batching.  `decoding` begins
    when every client has its first token, and the clients wait for that: prompts are bound by matrix products, however
    many clients there are.
    """
    async with bench_swarm(setup, draft="none") as bench:
        rows = [await _run_clients(bench, count) for count in clients]
        for row in rows:
            least = rows[0]["decoding"]["tokens_per_second"]
            row["decoding"][f"over_{clients[0]}"] = row["decoding"]["tokens_per_second"] / least
        return {"bench": "batch", "rows": rows, "provenance": await bench.provenance()}


async def _run_clients(bench: BenchSwarm, count: int) -> dict[str, Any]:
    """Run `count` clients of one swarm, each with a prompt of its own."""
    setup, clock = bench.setup, asyncio.get_running_loop().time
    async with contextlib.AsyncExitStack() as stack:
        prompts = held_out_prompts(bench.client, count)
        swarm_clients = [
            await stack.enter_async_context(
                SwarmClient(
                    model=setup.model,
                    peers=bench.swarm.peers,
                    tree_size=0,
                    swarm_key=setup.key,
                    prefix_scope="none",
                )
            )
            for _ in prompts
        ]
        before, start = await _forward_counts(bench), clock()
        runs = [
            client.stream(prompt, max_new_tokens=setup.tokens, ignore_eos=True)
            for client, prompt in zip(swarm_clients, prompts, strict=True)
        ]
        await asyncio.gather(*(anext(run.tokens) for run in runs))
        between, begun = await _forward_counts(bench), clock()
        await asyncio.gather(*(_finish(run) for run in runs))
        after, end = await _forward_counts(bench), clock()
    tokens = sum(len(run.token_ids) for run in runs)
    return {
        "clients": count,
        "tokens_per_second": tokens / (end - start),
        "sessions_per_forward": _sessions_per_forward(before, after),
        "first_tokens_s": begun - start,
        "decoding": {
            "tokens_per_second": (tokens - count) / (end - begun),
            "sessions_per_forward": _sessions_per_forward(between, after),
            "compute_ms_per_traversal": spread(
                [1e3 * traversal.compute_s for run in runs for traversal in run.recorder.traversal_times[1:]]
            ),
        },
    }


async def _finish(run: Run) -> None:
    async for _ in run:
        pass


async def _forward_counts(bench: BenchSwarm) -> list[tuple[int, int]]:
    """Return the number of forwards of each node so far, and of sessions in them."""
    described = await bench.client.describe_nodes(bench.addresses)
    return [(node.forwards, node.forward_sessions) for node in described.values()]


def _sessions_per_forward(before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> float:
    """Return the sessions per forward between two counts, as the mean over the nodes."""
    pairs = zip(before, after, strict=True)
    return statistics.fmean((a[1] - b[1]) / max(1, a[0] - b[0]) for b, a in pairs)
