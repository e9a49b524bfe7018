"""`swarm bench concurrent`: 1, 4 and 16 clients at once through the same nodes, by tree size; on the virtual clock.

The product's loop, planner and drafter run for each client.  Nodes compute all that waits in one forward, which takes
what a table of measured times says for its rows; all that a node sends shares its uplink.
"""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from treeswarm.errors import BadRequest
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_bench.benchmarks.disturbed.cases import LINKS
from treeswarm_bench.benchmarks.disturbed.chain import ScriptedChain, ScriptedNode, SharedNodes
from treeswarm_bench.benchmarks.disturbed.play import MARGIN, SEGMENT_ROWS, Size, policy_of_size
from treeswarm_bench.benchmarks.disturbed.text import LENGTH, scripted_drafter, scripted_text
from treeswarm_bench.benchmarks.disturbed.world import FLAT, NODES, SMALL, SMOLLM2, Script, Speeds, World
from treeswarm_bench.virtual_clock import VirtualClockLoop, no_time, run_virtually
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.loop import Generation, GenerationLimits
from treeswarm_client.planner.policy import Round
from treeswarm_client.provenance import machine_provenance

CLIENTS = (1, 4, 16)
NODE_COUNTS = (1, 3)
SIZES: tuple[Size, ...] = (0, 16, 64, "auto")
# Seconds after which the planners have settled, and seconds that are measured then.
SETTLED_S, WINDOW_S = 5.0, 12.0
TIMES: Mapping[str, Speeds] = {"small": SMALL, "smollm2": SMOLLM2, "flat": FLAT}
"""Times of a node with a third of the model."""


@dataclass(frozen=True)
class SharedCase:
    """One cell of the bench."""

    times: str
    link: str
    nodes: int
    clients: int

    @property
    def script(self) -> Script:
        """The speeds of links and nodes; one node has the whole model, and takes as long as three."""
        speeds = TIMES[self.times]
        factor = len(NODES) / self.nodes
        forward_s = tuple(factor * seconds for seconds in speeds.forward_s)
        return Script(LINKS[self.link], speeds=replace(speeds, forward_s=forward_s))


@dataclass(eq=False)
class TokenCount:
    """What the clients did in the measured seconds."""

    tokens: int = 0
    rounds: int = 0
    sent: int = 0
    """Number of draft nodes sent."""


async def bench_concurrent(
    *,
    clients: Sequence[int] = CLIENTS,
    nodes: Sequence[int] = NODE_COUNTS,
    links: Sequence[str] | None = None,
    times: Sequence[str] = tuple(TIMES),
    seed: int = 0,
) -> dict[str, Any]:
    """Return tokens per second of all clients together by times, link, nodes, clients and tree size.

    `auto_over_best` is the planner's rate over that of the best other size, plain decoding included.
    """
    torch.set_num_threads(1)
    if unknown := [name for name in links or () if name not in LINKS]:
        raise BadRequest(f"unknown cell '{unknown[0]}': choose from {', '.join(LINKS)}")
    start, rows = time.perf_counter(), []
    for case in (SharedCase(*choice) for choice in product(times, links or ("1ms", "25ms"), nodes, clients)):
        figures = {str(size): await asyncio.to_thread(measure, case, size, seed) for size in SIZES}
        rows.append(vars(case) | over_best(figures) | {"sizes": figures})
        print(_line_of(rows[-1]), file=sys.stderr, flush=True)
    ratios = [row["auto_over_best"] for row in rows]
    minutes = (time.perf_counter() - start) / 60
    return {
        "bench": "concurrent",
        "least_over_best": min(ratios),
        "rows": rows,
        "seed": seed,
        "real_minutes": minutes,
        "provenance": machine_provenance(),
    }


def measure(case: SharedCase, size: Size, seed: int) -> dict[str, float]:
    """Return tokens per second of all clients together, tokens and nodes per traversal, and sessions per forward."""
    return run_virtually(_measure(case, size, seed), work_s=None)


def over_best(figures: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return the best size besides `auto`, and what `auto` makes of it."""
    rates = {size: figure["tokens_per_s"] for size, figure in figures.items()}
    best = max((size for size in rates if size != "auto"), key=lambda size: rates[size])
    return {"best_fixed": best, "auto_over_best": rates["auto"] / rates[best]}


async def _measure(case: SharedCase, size: Size, seed: int) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    loop.meter = no_time
    world = World(case.script, loop, seed)
    world.origin_s = 0.0
    nodes = SharedNodes([ScriptedNode(name, world) for name in NODES[: case.nodes]])
    nodes.start()
    count = TokenCount()
    users = [asyncio.create_task(_generate(world, nodes, size, 1000 * seed + i, count)) for i in range(case.clients)]
    try:
        await asyncio.gather(*users)
    finally:
        await nodes.close()
    return {
        "tokens_per_s": count.tokens / WINDOW_S,
        "tokens_per_traversal": count.tokens / max(1, count.rounds),
        "nodes_per_traversal": count.sent / max(1, count.rounds),
        "sessions_per_forward": sum(node.sessions for node in nodes.nodes) / sum(node.forwards for node in nodes.nodes),
    }


async def _generate(world: World, nodes: SharedNodes, size: Size, seed: int, count: TokenCount) -> None:
    """Be one client: generate texts until the measured seconds are over, with one planner and one drafter."""
    policy = policy_of_size(size, world)
    while world.now < SETTLED_S + WINDOW_S:
        text = scripted_text("good", seed)
        chain = ScriptedChain(text, world, shared=nodes)
        chain.start()
        sent = 0

        def note(finished: Round) -> None:
            nonlocal sent
            sent = len(finished.draft)

        generation = Generation(
            chain=chain,  # type: ignore[arg-type]
            drafter=scripted_drafter(text, world),
            builder=AppendBuilder(SamplingSettings(), SEGMENT_ROWS, chain.epoch.number, 0),
            limits=GenerationLimits(LENGTH - MARGIN, frozenset()),
            policy=policy,
            on_round=note,
            clock=world.loop.clock,
        )
        try:
            async with aclosing(generation.rounds(text.prompt, SamplingSettings())) as rounds:
                async for committed in rounds:
                    if world.now >= SETTLED_S + WINDOW_S:
                        return
                    if world.now >= SETTLED_S:
                        count.tokens += len(committed.tokens)
                        count.rounds += 1
                        count.sent += sent
        finally:
            await chain.close()


def _line_of(row: Mapping[str, Any]) -> str:
    rates = "  ".join(
        f"{size}: {f['tokens_per_s']:.1f} ({f['nodes_per_traversal']:.0f} nodes)" for size, f in row["sizes"].items()
    )
    place = f"{row['times']}, {row['link']}, {row['nodes']} nodes, {row['clients']} clients"
    return f"{place}: {row['auto_over_best']:.2f} of {row['best_fixed']}; {rates}"
