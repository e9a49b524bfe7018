"""`swarm bench busy`: how much faster trees are than plain decoding while other programs keep this machine busy.

Every run is one `swarm demo` in a process of its own: new nodes, a new client and a cold draft.  It writes the same
text with plain decoding and with trees in turns, so that both meet the same load.  The load is a number of endless
loops, or programs that import torch and compute, and start and end at random times.
"""

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from treeswarm.errors import ModelError
from treeswarm_client.provenance import machine_provenance

Load = Literal["loops", "bursts"]
LOADS: tuple[Load, ...] = ("loops", "bursts")
# What the runs must reach: this share of them over OVER times plain decoding, and none under LEAST.
OVER, SHARE_OVER, LEAST = 2.5, 0.9, 0.95
# Seconds until the next burst starts, and for which it computes after its import of torch: shortest and longest.
PAUSE_S, BURST_S = (0.2, 3.0), (0.5, 6.0)
# A busy machine takes a minute or two per run.  A run that takes longer hangs.
RUN_S = 900.0

# The demo's name for the bundled pair.
BUNDLED = "bundled"

# Both end with their parent, even if that is killed.
LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(1_000_000))"
BURST = """import os, sys, time
parent = os.getppid()
import torch
torch.set_num_threads(1)
end, weights = time.time() + float(sys.argv[1]), torch.randn(256, 256)
while os.getppid() == parent and time.time() < end:
    weights @ weights"""


async def bench_busy(
    model: str, *, runs: int, load: Load, programs: int, seed: int, tokens: int | None
) -> dict[str, Any]:
    """Run the demo of a model `runs` times beside a load of `programs` programs (of bursts, at most so many at once).

    `demo` is the bundled pair.
    """
    name = BUNDLED if model == "demo" else model
    demo = ["demo", "--model", name, "--json", *(["--max-new-tokens", str(tokens)] if tokens else [])]
    done: list[dict[str, Any]] = []
    failed: list[str] = []
    async with _loaded(load, programs, random.Random(seed)):
        for number in range(1, runs + 1):
            try:
                done.append(await _run_demo(demo))
                outcome = f"{done[-1]['ratio']:.2f} times plain"
            except ModelError as error:
                failed.append(str(error))
                outcome = f"failed: {error}"
            print(f"{number:3d} of {runs}: {outcome}", file=sys.stderr, flush=True)
    return {
        "bench": "busy",
        "model": name,
        "load": load,
        "programs": programs,
        "seed": seed,
        **verdict([run["ratio"] for run in done], failed=len(failed)),
        "failed": failed,
        "runs": [
            {
                "ratio": run["ratio"],
                "exact": run["exact"],
                "plain_tokens_per_second": run["plain"]["tokens_per_second"],
                "tree_tokens_per_second": run["tree"]["tokens_per_second"],
                "round_trips": run["tree"]["traversals"],
            }
            for run in done
        ],
        "provenance": machine_provenance(),
    }


def verdict(ratios: Sequence[float], *, failed: int = 0) -> dict[str, Any]:
    """Return the figures of the runs, and whether they are good enough; `failed` runs have no ratio."""
    over = sum(ratio > OVER for ratio in ratios)
    return {
        "well": over >= SHARE_OVER * (len(ratios) + failed) and min(ratios, default=0.0) >= LEAST,
        "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
        "least": min(ratios, default=None),
        "median": statistics.median(ratios) if ratios else None,
        f"over_{OVER}": over,
    }


async def _run_demo(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object of one `swarm demo`.  Raises ModelError with its error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "treeswarm_client.cli.main", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(), RUN_S)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()  # it stops its nodes
        await process.wait()
        raise
    if not output:
        raise ModelError((errors.decode(errors="replace").strip().splitlines() or ["swarm demo printed nothing"])[-1])
    result: dict[str, Any] = json.loads(output)
    return result


@contextlib.asynccontextmanager
async def _loaded(load: Load, programs: int, rng: random.Random) -> AsyncIterator[None]:
    """Keep the machine busy as long as the context lasts."""
    running: list[subprocess.Popen[bytes]] = []
    bursts = None
    try:
        if load == "loops":
            running += [_start(LOOP) for _ in range(programs)]
        else:
            bursts = asyncio.create_task(_start_bursts(running, programs, rng))
        yield
    finally:
        if bursts is not None:
            bursts.cancel()
        for process in running:
            process.kill()
            process.wait()


async def _start_bursts(running: list["subprocess.Popen[bytes]"], most: int, rng: random.Random) -> None:
    while True:
        await asyncio.sleep(rng.uniform(*PAUSE_S))
        seconds = rng.uniform(*BURST_S)
        if sum(process.poll() is None for process in running) < most:
            running.append(_start(BURST, f"{seconds:.2f}"))


def _start(program: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdin=subprocess.DEVNULL)
