"""`swarm bench offload`: what it costs to stream a node's weights from disk at every forward.

Trees spread that cost over their tokens.
"""

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from treeswarm.model_files import read_shape, resolve_model
from treeswarm.protocol.spans import Span
from treeswarm_bench.benchmarks.common import BenchSetup, spread
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_bench.benchmarks.wan.statistics import Sample, paired, rate
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run
from treeswarm_client.local_swarm import even_cuts, local_swarm
from treeswarm_client.provenance import machine_provenance

SIZES = (0, 8, 64)
PLACEMENTS = ("none", "disk")

Runs = Mapping[str, Mapping[int, Sequence[Run]]]
"""Generations by placement and tree size, in the order of the prompts."""


async def bench_offload(setup: BenchSetup, *, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Run the same prompts on nodes with `--offload disk` and on plain ones, in turn.

    Both swarms run throughout.  For each prompt and tree size, one generates right after the other, and they alternate
    in going first.  The operating system may keep the file in memory: then the figures are the cost of copying, and a
    disk's own time is not in them.  A node of two blocks or fewer keeps them in its two slots and streams nothing, so
    the default is one node.
    """
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, setup.nodes)
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(_clients(setup, spans, where, sizes)) for where in PLACEMENTS]
        runs = await _in_turn(setup, dict(zip(PLACEMENTS, clients, strict=True)), sizes)
    return {
        "bench": "offload",
        "sizes": [_row(runs, size) for size in sizes],
        "mismatches": sum(
            plain.token_ids != streamed.token_ids
            for size in sizes
            for plain, streamed in zip(runs["none"][size], runs["disk"][size], strict=True)
        ),
        "provenance": machine_provenance()
        | setup.model_provenance()
        | {"draft": setup.draft, "dtype": setup.dtype, "nodes": [str(span) for span in spans]},
    }


@contextlib.asynccontextmanager
async def _clients(
    setup: BenchSetup, spans: Sequence[Span], where: str, sizes: Sequence[int]
) -> AsyncIterator[dict[int, SwarmClient]]:
    """Run a swarm with one placement, and yield one client per tree size.

    Drafters remember texts, so each client sees a prompt once.  Clients share no prefixes: every generation computes
    its prompt, although an earlier one with another tree size sent the same.
    """
    flags = ("--offload", where)
    async with (
        local_swarm(setup.model, spans, dtype=setup.dtype, swarm_key=setup.swarm_key, flags=flags) as swarm,
        contextlib.AsyncExitStack() as stack,
    ):
        yield {
            size: await stack.enter_async_context(
                SwarmClient(
                    model=setup.model, peers=swarm.peers, draft=setup.draft, swarm_key=setup.key, prefix_scope="none"
                )
            )
            for size in sizes
        }


async def _in_turn(
    setup: BenchSetup, clients: Mapping[str, Mapping[int, SwarmClient]], sizes: Sequence[int]
) -> dict[str, dict[int, list[Run]]]:
    runs: dict[str, dict[int, list[Run]]] = {where: {size: [] for size in sizes} for where in clients}
    order = list(clients)
    for prompt in held_out_prompts(clients["none"][sizes[0]], setup.prompts):
        for size in sizes:
            for where in order:
                run = await clients[where][size].generate(
                    prompt, max_new_tokens=setup.tokens, tree_size=size, ignore_eos=True
                )
                runs[where][size].append(run)
            order.reverse()
    return runs


def _row(runs: Runs, size: int) -> dict[str, Any]:
    by_placement = {where: _speed(runs[where], size) for where in PLACEMENTS}
    return {"tree_size": size, **by_placement, "disk_over_none": _over(runs["disk"][size], runs["none"][size])}


def _speed(by_size: Mapping[int, Sequence[Run]], size: int) -> dict[str, Any]:
    """Return the figures of one placement; `over_plain` is relative to plain decoding at the same placement."""
    samples = _samples(by_size[size])
    times = [time for run in by_size[size] for time in run.recorder.traversal_times[1:]]
    figures = {
        "tokens_per_second": rate(samples),
        "tokens_per_traversal": sum(s.tokens for s in samples) / sum(s.rounds for s in samples),
        "compute_ms_per_traversal": spread([1e3 * time.compute_s for time in times]),
    }
    return figures | ({"over_plain": _over(by_size[size], by_size[0])} if 0 in by_size else {})


def _over(runs: Sequence[Run], others: Sequence[Run]) -> dict[str, float | None]:
    return paired(_samples(runs), _samples(others)).as_dict()


def _samples(runs: Sequence[Run]) -> list[Sample]:
    """Return figures from the first token to the last: a prompt costs one streamed forward, whatever follows it."""
    return [Sample.of(run.stats, run.first_token_s) for run in runs if run.stats and run.first_token_s]
