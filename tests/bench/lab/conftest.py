"""Helpers that run programs on the hosts of a lab."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from treeswarm_bench.lab import Lab
from treeswarm_bench.lab.measure import PROGRAM, running

# These programs take a second, but much longer on a machine busy with something else.
TIMEOUT_S = 60.0


def program(
    lab: Lab, name: str, *arguments: object
) -> contextlib.AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """Run `lab/peer.py` with these arguments on a host."""
    return running(lab.command(name, *PROGRAM, *map(str, arguments)))


async def read_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)).decode()


@contextlib.asynccontextmanager
async def server(lab: Lab, name: str) -> AsyncIterator[str]:
    """Run an echo server on a host and yield its address."""
    async with program(lab, name, "serve") as process:
        assert await read_line(process) == "ready\n"
        yield lab.host(name).address


async def rtt(lab: Lab, name: str, address: str) -> float:
    """Return the shortest of five round trips, in seconds."""
    async with program(lab, name, "rtt", address, 5) as process:
        return float(min(json.loads(await read_line(process))))


async def echo(lab: Lab, name: str, address: str, size: int) -> float:
    """Return the seconds until all bytes have come back unchanged."""
    async with program(lab, name, "echo", address, size) as process:
        return float(await read_line(process))
