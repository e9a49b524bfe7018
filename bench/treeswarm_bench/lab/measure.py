"""`python -m treeswarm_bench.lab.measure` prints the lab's own latency and highest throughput as one JSON object."""

import asyncio
import contextlib
import json
import os
import statistics
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from treeswarm_bench.lab import Lab, LabLink, peer, wan_lab

SHAPED = "delay=25ms,rate=100mbit"
ROUND_TRIPS = 200
# Bytes that take over a second at the hub's highest throughput.
PUSHED = 256 << 20
PUSHES = 3
PROGRAM = (sys.executable, str(Path(peer.__file__)))


async def measure() -> dict[str, Any]:
    """Return round trips (ms) and throughput (Mbit/s) between two hosts.

    They are measured without any shaping, shaped, and shaped with all cores busy with something else.
    """
    async with wan_lab(["a", "b"]) as lab, running(lab.command("b", *PROGRAM, "serve")) as server:
        assert server.stdout is not None
        await server.stdout.readline()
        bare = {"rtt_ms": await _round_trips(lab), "mbit_s": [await _throughput(lab, PUSHED) for _ in range(PUSHES)]}
        await lab.shape("a", "b", LabLink.parse(SHAPED))
        shaped = {"rtt_ms": await _round_trips(lab), "mbit_s": [await _throughput(lab, PUSHED // 8)]}
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(os.cpu_count() or 1):
                await stack.enter_async_context(running([sys.executable, "-c", "while True: pass"]))
            busy = {"rtt_ms": await _round_trips(lab), "mbit_s": [await _throughput(lab, PUSHED // 8)]}
    return {"unshaped": bare, SHAPED: shaped, f"{SHAPED}, all cores busy": busy}


@contextlib.asynccontextmanager
async def running(command: list[str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Start a process with pipes to it; it is killed on leaving."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def _round_trips(lab: Lab) -> dict[str, float]:
    round_trips_ms = [1e3 * float(seconds) for seconds in await _run_program(lab, "rtt", ROUND_TRIPS)]
    cuts = statistics.quantiles(round_trips_ms, n=100)
    return {"p1": cuts[0], "p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}


async def _throughput(lab: Lab, size: int) -> float:
    return float(size * 8 / await _run_program(lab, "push", size) / 1e6)


async def _run_program(lab: Lab, program: str, number: int) -> Any:
    async with running(lab.command("a", *PROGRAM, program, lab.host("b").address, str(number))) as process:
        output, _ = await process.communicate()
        return json.loads(output)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure()), indent=1))
