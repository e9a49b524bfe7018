"""How fast generations were, and what many clients at once make of a swarm."""

import asyncio
import contextlib
import statistics
from collections.abc import Sequence
from typing import Any

from treeswarm_client.bench.common import BenchSetup, bench_swarm, spread
from treeswarm_client.bench.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.run import Run

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
