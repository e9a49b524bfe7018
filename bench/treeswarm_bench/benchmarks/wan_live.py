"""Plain decoding against trees over links as they are, to nodes that run already; in a WAN lab, on hosts of its own."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from treeswarm.errors import SwarmError, Unreachable
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.protocol.address import Address
from treeswarm_bench.benchmarks.batching import rate, speed
from treeswarm_bench.benchmarks.common import BenchSetup, bench_swarm, spread
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_bench.lab import Lab, LabLink, wan_lab
from treeswarm_client.generation.run import Run, TreeSize
from treeswarm_client.generation.stats import TraversalTime
from treeswarm_client.local_swarm import HostCommand, even_cuts, local_swarm

# A swarm has one first generation; three of them show whether it was chance.
COLD_STARTS = 3
CONNECTS = 5
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


async def bench_peers(setup: BenchSetup, *, tree_size: TreeSize) -> dict[str, Any]:
    """Against the nodes at `setup.peers`.  `first` is this client's first generation: on connections that nobody has
    used yet, if the nodes are new as well; `later` ran on the same connections.  A long prompt warms them up: only
    after a short one is the first tree sent cold."""
    async with bench_swarm(setup) as bench:
        held_out = held_out_prompts(bench.client, setup.prompts + 1)
        *prompts, spare = (prompt[: setup.prompt_tokens] for prompt in held_out)
        first = await bench.run(spare, tree_size=tree_size)
        # Trees before the plain run of each prompt: drafters learn from every text, and would know this one.
        pairs = [
            (await bench.run(prompt, tree_size=tree_size), await bench.run(prompt, tree_size=0)) for prompt in prompts
        ]
        trees, plain = [tree for tree, _ in pairs], [plain for _, plain in pairs]
        return {
            "bench": "wan",
            "tree_size": tree_size,
            "rtt_ms": {address: await connect_ms(address) for address in bench.addresses},
            "first": _rounds([first], tree_size),
            "later": _rounds(trees, tree_size),
            "identical": all(tree.token_ids == plain.token_ids for tree, plain in pairs),
            "plain": speed(plain),
            "tree": speed(trees),
            "ratio": spread([rate(tree) / rate(plain) for tree, plain in pairs]),
            "provenance": await bench.provenance(),
        }


async def bench_in_lab(
    which: str, setup: BenchSetup, *, link: LabLink, congestion: str | None, tree_size: TreeSize
) -> dict[str, Any]:
    """`swarm bench WHICH` with the client and every node on a host of its own, `link` between any two.

    Each start has a lab of its own, because the kernel remembers per host what a path could carry.
    """
    starts = COLD_STARTS if which == "wan" else 1
    names = [f"node{i}" for i in range(1, setup.nodes + 1)]
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, setup.nodes)
    results = []
    for start in range(starts):
        async with wan_lab(["client", *names], link, congestion=congestion) as lab:
            hosts = [HostCommand(tuple(lab.command(name)), f"{lab.host(name).address}:0") for name in names]
            async with local_swarm(setup.model, spans, dtype=setup.dtype, hosts=hosts) as swarm:
                prompts = setup.prompts if start == starts - 1 else 1
                told = replace(setup, peers=swarm.peers, prompts=prompts)
                results.append(await _on_client(lab, which, told, tree_size))
    firsts = {"first": [result["first"] for result in results]} if which == "wan" else {}
    return {**results[-1], **firsts, "lab": _shaped(link, congestion)}


def _shaped(link: LabLink, congestion: str | None) -> dict[str, str]:
    return {"link": str(link), "congestion": congestion or CONGESTION.read_text("ascii").strip()}


async def connect_ms(address: str) -> float:
    """Milliseconds a TCP connection takes, which is one round trip: the median of some.  Raises Unreachable."""
    where, taken = Address.parse(address), []
    for _ in range(CONNECTS):
        start = time.perf_counter()
        try:
            _, writer = await asyncio.open_connection(where.host, where.port)
        except OSError as error:
            raise Unreachable(f"nobody answers at {address}: {error}") from None
        taken.append(1e3 * (time.perf_counter() - start))
        writer.close()
    return statistics.median(taken)


def _rounds(runs: Sequence[Run], tree_size: TreeSize) -> dict[str, Any]:
    """What prefill, the first and the later rounds took; of rounds with a tree of one size only those that shipped it
    whole."""
    prefill, first, later = [], [], []
    for run in runs:
        trips = run.recorder.traversal_times
        prefill += trips[:1]
        first += trips[1:2]
        later += trips[2:]
    whole = [[t for t in trips if tree_size == "auto" or t.rows == tree_size + 1] for trips in (first, later)]
    return {"prefill": _cost(prefill), "first_round": _cost(whole[0]), "later_rounds": _cost(whole[1])}


def _cost(trips: Sequence[TraversalTime]) -> dict[str, Any]:
    return {
        "count": len(trips),
        "ms": spread([1e3 * trip.seconds for trip in trips]),
        "outside_torch_ms": spread([1e3 * (trip.seconds - trip.compute_s) for trip in trips]),
    }


async def _on_client(lab: Lab, which: str, setup: BenchSetup, tree_size: TreeSize) -> dict[str, Any]:
    """This program again, on the host `client`."""
    flags = {
        "--peers": setup.peers,
        "--model": setup.model,
        "--draft": setup.draft,
        "--prompts": setup.prompts,
        "--max-new-tokens": setup.tokens,
        "--tree-size": tree_size,
    }
    if setup.prompt_tokens:
        flags["--prompt-tokens"] = setup.prompt_tokens
    words = [str(word) for flag in flags.items() for word in flag]
    command = lab.command("client", sys.executable, "-m", "treeswarm_client.cli.main", "bench", which, "--json", *words)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, complained = await process.communicate()
    if process.returncode:
        lines = complained.decode(errors="replace").strip().splitlines() or ["it ended without a word"]
        raise SwarmError(f"the bench's client in the lab failed: {lines[-1].removeprefix('swarm: ')}")
    result: dict[str, Any] = json.loads(said)
    return result
