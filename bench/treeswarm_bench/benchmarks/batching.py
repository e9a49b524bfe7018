"""How fast generations were, and what many clients at once make of a swarm."""

import asyncio
import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

from treeswarm_bench.benchmarks.common import Bench, BenchSetup, bench_swarm, spread
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run

CLIENTS = (1, 4, 16)


def rate(run: Run) -> float:
    """Tokens a second."""
    assert run.stats is not None
    return run.stats.tokens_per_second


def speed(runs: Sequence[Run]) -> dict[str, Any]:
    """What the generations came to."""
    stats = [run.stats for run in runs if run.stats]
    traversals = sum(s.traversals for s in stats)
    return {
        "tokens_per_traversal": sum(s.committed for s in stats) / traversals,
        "tokens_per_second": spread([s.tokens_per_second for s in stats]),
        "draft_ms_per_traversal": 1e3 * sum(s.time.draft for s in stats) / traversals,
        "compute_ms_per_traversal": 1e3 * sum(s.time.compute for s in stats) / traversals,
    }


async def bench_batch(setup: BenchSetup, *, clients: Sequence[int] = CLIENTS) -> dict[str, Any]:
    """Many plain clients at once: tokens/s in all, and sessions a forward by the nodes' own counters.

    Plain decoding, because drafts on the same cores would hide what batching does.  `decoding` is what comes after all
    have their first token, for which they wait: prompts are bound by products, whoever else is there.
    """
    async with bench_swarm(setup, draft="none") as bench:
        rows = [await _crowd(bench, count) for count in clients]
        for row in rows:
            alone = rows[0]["decoding"]["tokens_per_second"]
            row["decoding"][f"over_{clients[0]}"] = row["decoding"]["tokens_per_second"] / alone
        return {"bench": "batch", "rows": rows, "provenance": await bench.provenance()}


async def _crowd(bench: Bench, count: int) -> dict[str, Any]:
    """`count` clients of one swarm, each with a prompt of its own."""
    setup, clock = bench.setup, asyncio.get_running_loop().time
    async with contextlib.AsyncExitStack() as stack:
        prompts = held_out_prompts(bench.client, count)
        crowd = [
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
        before, start = await _batched(bench), clock()
        runs = [
            client.stream(prompt, max_new_tokens=setup.tokens, ignore_eos=True)
            for client, prompt in zip(crowd, prompts, strict=True)
        ]
        await asyncio.gather(*(anext(run.tokens) for run in runs))
        between, begun = await _batched(bench), clock()
        await asyncio.gather(*(_rest(run) for run in runs))
        after, end = await _batched(bench), clock()
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
                [1e3 * trip.compute_s for run in runs for trip in run.recorder.traversal_times[1:]]
            ),
        },
    }


async def _rest(run: Run) -> None:
    async for _ in run:
        pass


async def _batched(bench: Bench) -> list[tuple[int, int]]:
    """Forwards of each node so far, and the sessions in them."""
    described = await bench.client.describe_nodes(bench.addresses)
    return [(node.forwards, node.forward_sessions) for node in described.values()]


def _sessions_per_forward(before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> float:
    """Mean over the nodes."""
    pairs = zip(before, after, strict=True)
    return statistics.fmean((a[1] - b[1]) / max(1, a[0] - b[0]) for b, a in pairs)
