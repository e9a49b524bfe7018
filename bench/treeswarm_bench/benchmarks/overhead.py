"""`swarm bench overhead`: what a hop costs besides the model."""

import contextlib
import statistics
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

from treeswarm.transport.seam import StreamKind
from treeswarm_bench.benchmarks.common import BenchSetup, BenchSwarm, bench_swarm, spread
from treeswarm_bench.benchmarks.parts.echo import TLS, echo_process, echo_s, transport_of
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_client.generation.loop import Generation

# Seven draft nodes, beside the row of the last token.
DRAFTED = 7
# Bytes of a message to or from the client: tokens, parents and answers, no activations.
SMALL_BYTES = 512
ECHOES = 40


async def bench_overhead(setup: BenchSetup) -> dict[str, Any]:
    """Measure the milliseconds per hop of an 8-token traversal that no device thread spent.

    They include the client but not its drafting.  Nothing is drafted while a tree travels: here that would take the
    cores of the nodes that it waits for.  A part of them is the wire's: the time of messages of that size over the same
    transport between two processes that do nothing else, measured in turn with the generations.  Where nodes run
    elsewhere (`--peers`, `--lab`), no process echoes beside them, and only the whole is reported.
    """
    async with bench_swarm(setup) as bench, contextlib.AsyncExitStack() as stack:
        hops = len(bench.addresses)
        rows_bytes = (DRAFTED + 1) * bench.client.target.row_bytes
        wire_s = await stack.enter_async_context(_wire(hops, rows_bytes)) if setup.peers is None else None
        outside: list[float] = []
        computes: list[float] = []
        wires: list[float] = []
        for prompt in held_out_prompts(bench.client, setup.prompts):
            for seconds, compute_s in await _traversals(bench, prompt):
                outside.append(1e3 * (seconds - compute_s) / hops)
                computes.append(1e3 * compute_s / hops)
            if wire_s is not None:
                wires.append(1e3 * await wire_s() / hops)
        return {
            "bench": "overhead",
            "traversals": len(outside),
            "overhead_ms_per_hop": spread(outside),
            **_beside_wire(outside, wires),
            "torch_ms_per_hop": spread(computes),
            "provenance": await bench.provenance(),
        }


def _beside_wire(outside: list[float], wires: list[float]) -> dict[str, Any]:
    """Return the wire's milliseconds, and those outside torch without them; nothing if no echoes were measured."""
    if not wires:
        return {}
    wire_ms = statistics.median(wires)
    return {
        "wire_ms_per_hop": spread(wires),
        "beyond_wire_ms_per_hop": spread([milliseconds - wire_ms for milliseconds in outside]),
    }


@contextlib.asynccontextmanager
async def _wire(hops: int, rows_bytes: int) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Yield a function that measures the seconds of the messages of a whole ring.

    A message takes half of an echo's time; each time is the median of 40 echoes.
    """
    async with echo_process() as addresses, contextlib.AsyncExitStack() as stack:
        transport = transport_of(TLS)
        stack.push_async_callback(transport.close)
        stream = await transport.connect(addresses[TLS], StreamKind.LINK)

        async def way_s(size: int) -> float:
            return statistics.median([await echo_s(stream, bytes(size)) for _ in range(ECHOES)]) / 2

        async def ring_s() -> float:
            return 2 * await way_s(SMALL_BYTES) + (hops - 1) * await way_s(rows_bytes)

        yield ring_s


async def _traversals(bench: BenchSwarm, prompt: list[int]) -> list[tuple[float, float]]:
    """Return the seconds of each traversal with a full tree in one generation, and the device threads' part of them."""
    with bench.client.adapted(_one_after_another):
        run = await bench.run(prompt, tree_size=DRAFTED)
    return [(time.seconds, time.compute_s) for time in run.recorder.traversal_times[1:] if time.rows == DRAFTED + 1]


def _one_after_another(usual: Generation) -> Generation:
    return replace(usual, policy=FixedSizePolicy(DRAFTED, drafts_ahead=False))
