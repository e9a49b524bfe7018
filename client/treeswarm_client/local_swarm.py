"""A swarm on this machine: real `swarm-node` processes on loopback, for the demo, benches and tests."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treeswarm.errors import ModelError, NodeLost
from treeswarm.programs.settings import PREFIX
from treeswarm.protocol.spans import Span

# Importing torch and proving a span takes seconds; minutes on a machine busy with something else.
READY_S = 180.0
STOP_S = 10.0


@dataclass(frozen=True)
class HostCommand:
    """Where a node runs: the command line it is started through, and the address it listens on."""

    through: tuple[str, ...] = ()
    listen: str = "127.0.0.1:0"


@dataclass(frozen=True)
class LocalNode:
    """A running `swarm-node`."""

    process: asyncio.subprocess.Process
    address: str
    pinned: str
    """The address that nobody else can answer at."""
    ready: dict[str, Any]
    """Its ready line."""
    errors: asyncio.Task[bytes]
    """Everything it wrote to standard error, once it has ended."""


@dataclass(eq=False)
class LocalSwarm:
    """Nodes in the order they were started; identities are for this once."""

    model: str = ""
    flags: tuple[str, ...] = ()
    """Of every node."""
    nodes: list[LocalNode] = field(default_factory=list)
    _folder: Path = field(default_factory=Path)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _names: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def peers(self) -> str:
        """For `--peers`."""
        return ",".join(node.address for node in self.nodes)

    async def start(self, *flags: str, host: HostCommand = HostCommand()) -> LocalNode:
        """One more node, ready.  Raises ModelError with what a node that would not start said."""
        (node,) = await self.start_all([flags], [host])
        return node

    async def start_all(self, flags: Sequence[Sequence[str]], hosts: Sequence[HostCommand]) -> list[LocalNode]:
        """Some at once: they load side by side."""
        started: list[tuple[asyncio.subprocess.Process, asyncio.Task[bytes]]] = []
        # Before the first one starts: whoever is told to stop in their midst stops them too.
        self._stack.push_async_callback(_stop_all, started)
        for own, host in zip(flags, hosts, strict=True):
            identity = str(self._folder / f"{next(self._names)}.pem")
            started.append(await _start(host, self.model, *self.flags, "--identity", identity, *own))
        ready = await asyncio.gather(*(_ready(process, errors) for process, errors in started))
        self.nodes.extend(ready)
        return ready


def even_cuts(blocks: int, nodes: int) -> list[Span]:
    """`blocks` in `nodes` spans that differ by at most one block."""
    edges = [round(blocks * i / nodes) for i in range(nodes + 1)]
    return [Span(start, end) for start, end in itertools.pairwise(edges)]


@contextlib.asynccontextmanager
async def local_swarm(
    model: str,
    spans: Sequence[Span],
    *,
    dtype: str = "float32",
    emulate_link: str | None = None,
    threads: int = 1,
    swarm_key: Path | None = None,
    registry: str = "none",
    hosts: Sequence[HostCommand] | None = None,
    flags: Sequence[str] = (),
    own_flags: Sequence[Sequence[str]] | None = None,
) -> AsyncIterator[LocalSwarm]:
    """Start one node a span, wait until all are ready, stop them on leaving.

    `hosts` says where each runs, if not here on loopback; `flags` are more of every node's, `own_flags` of each.
    Raises ModelError with what a node that would not start said.
    """
    shared = ["--dtype", dtype, "--threads", str(threads), "--log-format", "json", "--registry", registry, *flags]
    shared += ["--emulate-link", emulate_link] if emulate_link else []
    shared += ["--swarm-key", str(swarm_key)] if swarm_key else []
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="treeswarm-")))
        swarm = LocalSwarm(model, tuple(shared), _folder=folder, _stack=stack)
        told = [("--blocks", str(span), *own) for span, own in zip(spans, own_flags or [()] * len(spans), strict=True)]
        await swarm.start_all(told, hosts or [HostCommand()] * len(spans))
        yield swarm


def node_command() -> list[str]:
    """How to run `swarm-node` here: the program beside this Python, or on the PATH.  Raises ModelError."""
    beside = Path(sys.executable).with_name("swarm-node")
    found = str(beside) if beside.exists() else shutil.which("swarm-node")
    if found is None:
        raise ModelError("the program swarm-node is not installed: pip install 'treeswarm[node]'")
    return [found]


async def _start(host: HostCommand, *arguments: str) -> tuple[asyncio.subprocess.Process, asyncio.Task[bytes]]:
    process = await asyncio.create_subprocess_exec(
        *(*host.through, *node_command(), *arguments, "--listen", host.listen),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # What the user has set is meant for a node of theirs, not for these.
        env={name: value for name, value in os.environ.items() if not name.startswith(PREFIX)},
    )
    assert process.stderr is not None
    return process, asyncio.create_task(process.stderr.read())


async def _ready(process: asyncio.subprocess.Process, errors: asyncio.Task[bytes]) -> LocalNode:
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), READY_S)
    except TimeoutError:
        raise NodeLost(f"a node was not ready after {READY_S:.0f} s", "127.0.0.1") from None
    if not line:
        said = (await errors).decode(errors="replace").strip().splitlines()
        raise ModelError(said[-1].removeprefix("swarm-node: ") if said else "a node ended without a word")
    ready = json.loads(line)
    return LocalNode(process, ready["address"], ready["pinned"], ready, errors)


async def _stop_all(started: Sequence[tuple[asyncio.subprocess.Process, asyncio.Task[bytes]]]) -> None:
    await asyncio.gather(*(_stop(process, errors) for process, errors in started))


async def _stop(process: asyncio.subprocess.Process, errors: asyncio.Task[bytes]) -> None:
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
    await errors
