"""Programs on a lab's hosts."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from treeswarm_client.lab import Lab

PEER = Path(__file__).with_name("peer.py")
# These programs take a second; on a machine busy with something else, much more.
PATIENCE_S = 60.0


async def read_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)).decode()


@contextlib.asynccontextmanager
async def peer(lab: Lab, name: str, *words: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """`peer.py` with these words on a host."""
    pipe = asyncio.subprocess.PIPE
    command = lab.command(name, sys.executable, str(PEER), *map(str, words))
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def server(lab: Lab, name: str) -> AsyncIterator[str]:
    """The address of a host that echoes."""
    async with peer(lab, name, "serve") as process:
        assert await read_line(process) == "ready\n"
        yield lab.host(name).address


async def seconds(lab: Lab, name: str, *words: object) -> float:
    """What `rtt` or `send` found."""
    async with peer(lab, name, *words) as process:
        return float(await read_line(process))
