"""`swarm bench wan --peers` and `--lab`: plain decoding against trees over real links, to nodes that run already.

In a WAN lab, the client and every node have a host of their own.
"""

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

# A swarm has one first generation; three of them show whether its figures were chance.
COLD_STARTS = 3
CONNECTS = 5
CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


async def bench_peers(setup: BenchSetup, *, tree_size: TreeSize) -> dict[str, Any]:
    """Measure against the nodes at `setup.peers`.

    `first` is this client's first generation: if the nodes are new as well, its connections have carried nothing yet.
    `later` ran on the same connections.  A long prompt warms them up: only after a short one is the first tree sent
    on cold connections.
    """
    async with bench_swarm(setup) as bench:
        held_out = held_out_prompts(bench.client, setup.prompts + 1)
        *prompts, spare = (prompt[: setup.prompt_tokens] for prompt in held_out)
        first = await bench.run(spare, tree_size=tree_size)
        # For each prompt, trees go before plain decoding: drafters learn from every text, and would know this one.
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
    bench: str, setup: BenchSetup, *, link: LabLink, congestion: str | None, tree_size: TreeSize
) -> dict[str, Any]:
    """Run `swarm bench BENCH` with the client and every node on a host of its own, and `link` between any two.

    Each start has a lab of its own, because the kernel remembers per host what a path could carry.
    """
    starts = COLD_STARTS if bench == "wan" else 1
    names = [f"node{i}" for i in range(1, setup.nodes + 1)]
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, setup.nodes)
    results = []
    for start in range(starts):
        async with wan_lab(["client", *names], link, congestion=congestion) as lab:
            hosts = [HostCommand(tuple(lab.command(name)), f"{lab.host(name).address}:0") for name in names]
            async with local_swarm(setup.model, spans, dtype=setup.dtype, hosts=hosts) as swarm:
                prompts = setup.prompts if start == starts - 1 else 1
                client_setup = replace(setup, peers=swarm.peers, prompts=prompts)
                results.append(await _run_on_client(lab, bench, client_setup, tree_size))
    firsts = {"first": [result["first"] for result in results]} if bench == "wan" else {}
    return {**results[-1], **firsts, "lab": _lab_as_dict(link, congestion)}


def _lab_as_dict(link: LabLink, congestion: str | None) -> dict[str, str]:
    return {"link": str(link), "congestion": congestion or CONGESTION.read_text("ascii").strip()}


async def connect_ms(address: str) -> float:
    """Return the milliseconds of a TCP connection, which is one round trip, as the median of 5.  Raises Unreachable."""
    where, taken = Address.parse(address), []
    for _ in range(CONNECTS):
        start = time.perf_counter()
        try:
            _, writer = await asyncio.open_connection(where.host, where.port)
        except OSError as error:
            raise Unreachable(f"no node answers at {address}: {error}") from None
        taken.append(1e3 * (time.perf_counter() - start))
        writer.close()
    return statistics.median(taken)


def _rounds(runs: Sequence[Run], tree_size: TreeSize) -> dict[str, Any]:
    """Return the times of the prefill, of the first round and of later ones.

    Of rounds with trees of one size, only those count that shipped a whole tree.
    """
    prefill, first, later = [], [], []
    for run in runs:
        times = run.recorder.traversal_times
        prefill += times[:1]
        first += times[1:2]
        later += times[2:]
    whole = [[t for t in times if tree_size == "auto" or t.rows == tree_size + 1] for times in (first, later)]
    return {"prefill": _cost(prefill), "first_round": _cost(whole[0]), "later_rounds": _cost(whole[1])}


def _cost(times: Sequence[TraversalTime]) -> dict[str, Any]:
    return {
        "count": len(times),
        "ms": spread([1e3 * time.seconds for time in times]),
        "outside_torch_ms": spread([1e3 * (time.seconds - time.compute_s) for time in times]),
    }


async def _run_on_client(lab: Lab, bench: str, setup: BenchSetup, tree_size: TreeSize) -> dict[str, Any]:
    """Run this program again on the host `client`.  Raises SwarmError with its last line if it fails."""
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
    command = lab.command("client", sys.executable, "-m", "treeswarm_client.cli.main", "bench", bench, "--json", *words)
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    if process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines() or ["it printed no error"]
        raise SwarmError(f"the bench's client in the lab failed: {lines[-1].removeprefix('swarm: ')}")
    result: dict[str, Any] = json.loads(output)
    return result
