"""What a traversal costs: overhead on loopback, speed over emulated links, and batching of many clients."""

import asyncio
import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

from treeswarm_client.bench.common import BenchSetup, bench_swarm, spread
from treeswarm_client.bench.texts import held_out_prompts
from treeswarm_client.client import Run, SwarmClient

DELAYS_MS = (0, 25, 50)
CLIENTS = (1, 4, 16)
# Seven drafted nodes and the mandatory one.
OVERHEAD_DRAFTED = 7


async def bench_overhead(setup: BenchSetup) -> dict[str, Any]:
    """Milliseconds of an 8-token traversal that are not spent inside torch, per hop."""
    async with bench_swarm(setup) as bench:
        hops = len(bench.addresses)
        overheads: list[float] = []
        computes: list[float] = []
        for prompt in held_out_prompts(bench.client, setup.prompts):
            run = await bench.run(prompt, tree_size=OVERHEAD_DRAFTED)
            for trip in run.meter.trips[1:]:
                if trip.rows == OVERHEAD_DRAFTED + 1:
                    overheads.append(1e3 * (trip.seconds - trip.compute_s) / hops)
                    computes.append(1e3 * trip.compute_s / hops)
        return {
            "bench": "overhead",
            "traversals": len(overheads),
            "overhead_ms_per_hop": spread(overheads),
            "torch_ms_per_hop": spread(computes),
            "provenance": await bench.provenance(),
        }


async def bench_wan(setup: BenchSetup, *, tree_size: int, delays_ms: Sequence[int] = DELAYS_MS) -> dict[str, Any]:
    """Plain decoding against trees over links of each delay, in interleaved pairs on the same prompts."""
    rows = []
    for delay in delays_ms:
        link = f"delay={delay}ms" if delay else None
        async with bench_swarm(setup, link=link) as bench:
            prompts = held_out_prompts(bench.client, setup.prompts)
            await bench.run(prompts[0], tree_size=tree_size)  # connections, caches and τ warm up once
            pairs = [
                (await bench.run(prompt, tree_size=0), await bench.run(prompt, tree_size=tree_size))
                for prompt in prompts
            ]
            ring_s = (len(bench.addresses) + 1) * delay / 1e3
            rows.append(
                {
                    "delay_ms": delay,
                    "identical": all(plain.token_ids == tree.token_ids for plain, tree in pairs),
                    "plain": _against_bound([plain for plain, _ in pairs], ring_s),
                    "tree": _against_bound([tree for _, tree in pairs], ring_s),
                    "ratio": spread([rate(tree) / rate(plain) for plain, tree in pairs]),
                    "provenance": await bench.provenance(),
                }
            )
    return {"bench": "wan", "tree_size": tree_size, "rows": rows}


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


def _against_bound(runs: Sequence[Run], ring_s: float) -> dict[str, Any]:
    """`bound` is tokens a traversal / (ring + compute): what a client could reach that drafts in no time."""
    stats = [run.stats for run in runs if run.stats]
    committed, traversals = sum(s.committed for s in stats), sum(s.traversals for s in stats)
    seconds, draft = sum(s.seconds for s in stats), sum(s.time.draft for s in stats)
    bound = committed / (traversals * ring_s + sum(s.time.compute for s in stats))
    return speed(runs) | {
        "bound_tokens_per_second": bound,
        "share_of_bound": committed / (seconds - draft) / bound,
        "share_of_bound_with_drafting": committed / seconds / bound,
    }


async def bench_batch(setup: BenchSetup, *, clients: Sequence[int] = CLIENTS) -> dict[str, Any]:
    """Many plain clients at once: tokens/s in all, and sessions a forward by the nodes' own counters.

    Plain decoding, because drafts on the same cores would hide what batching does.
    """
    rows = []
    for count in clients:
        async with bench_swarm(setup, draft="none") as bench, contextlib.AsyncExitStack() as stack:
            prompts = held_out_prompts(bench.client, count)
            crowd = [
                await stack.enter_async_context(
                    SwarmClient(model=setup.model, peers=bench.swarm.peers, tree_size=0, swarm_key=setup.key)
                )
                for _ in prompts
            ]
            start = asyncio.get_running_loop().time()
            runs = await asyncio.gather(
                *(
                    client.generate(prompt, max_new_tokens=setup.tokens, ignore_eos=True)
                    for client, prompt in zip(crowd, prompts, strict=True)
                )
            )
            seconds = asyncio.get_running_loop().time() - start
            provenance = await bench.provenance()
            rows.append(
                {
                    "clients": count,
                    "tokens_per_second": sum(len(run.token_ids) for run in runs) / seconds,
                    "sessions_per_forward": statistics.fmean(n["sessions_per_forward"] for n in provenance["nodes"]),
                    "provenance": provenance,
                }
            )
    return {"bench": "batch", "rows": rows}
