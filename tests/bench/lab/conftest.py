"""Programs on a lab's hosts."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

from treeswarm_bench.lab import Lab
from treeswarm_bench.lab.measure import PROGRAM, running

# These programs take a second; on a machine busy with something else, much more.
PATIENCE_S = 60.0


def program(lab: Lab, name: str, *words: object) -> contextlib.AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """`lab/peer.py` with these words on a host."""
    return running(lab.command(name, *PROGRAM, *map(str, words)))


async def read_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)).decode()


@contextlib.asynccontextmanager
async def server(lab: Lab, name: str) -> AsyncIterator[str]:
    """The address of a host that echoes."""
    async with program(lab, name, "serve") as process:
        assert await read_line(process) == "ready\n"
        yield lab.host(name).address


async def rtt(lab: Lab, name: str, address: str) -> float:
    """The shortest of some round trips."""
    async with program(lab, name, "rtt", address, 5) as process:
        return float(min(json.loads(await read_line(process))))


async def echo(lab: Lab, name: str, address: str, size: int) -> float:
    """Seconds until all came back as it was."""
    async with program(lab, name, "echo", address, size) as process:
        return float(await read_line(process))
