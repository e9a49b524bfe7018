"""A swarm of real `swarm-node` processes on this machine's loopback, for the demo, benches and tests."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treeswarm.errors import ModelError, NodeLost
from treeswarm.extras import install_command
from treeswarm.model_files import is_cached
from treeswarm.programs.settings import PREFIX
from treeswarm.protocol.spans import Span

# Importing torch and proving a span takes seconds, or minutes on a busy machine: five nodes that started at once on two
# cores at a load of 24 took more than 180 s (2026-11-30).
READY_S = 600.0
STOP_S = 10.0
HOME_VARIABLES = ("XDG_CACHE_HOME", "XDG_STATE_HOME")
"""Variables that name the folders in which a node keeps files for its next start."""


@dataclass(frozen=True)
class HostCommand:
    """How a node is started on a host."""

    through: tuple[str, ...] = ()
    """Command line that runs another command on the host; empty for this machine."""
    listen: str = "127.0.0.1:0"
    """Address on which the node listens."""


@dataclass(frozen=True)
class LocalNode:
    """A running `swarm-node`."""

    process: asyncio.subprocess.Process
    address: str
    pinned: str
    """Address with the pin of the node's key."""
    ready: dict[str, Any]
    """Ready line that the node printed."""
    errors: asyncio.Task[bytes]
    """Task whose result is the node's standard error, once the node has ended."""


@dataclass(eq=False)
class LocalSwarm:
    """Running nodes, in the order they were started.  Their identities are not kept."""

    model: str = ""
    flags: tuple[str, ...] = ()
    """Command-line flags of every node."""
    nodes: list[LocalNode] = field(default_factory=list)
    on_ready: Callable[[LocalNode], None] = lambda _: None
    """Called with each node as soon as it is ready."""
    _environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every node besides those of this process."""
    _folder: Path = field(default_factory=Path)
    _stack: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    _names: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def peers(self) -> str:
        """Addresses of all nodes, as `--peers` takes them."""
        return ",".join(node.address for node in self.nodes)

    def identity(self, number: int) -> Path:
        """Return the path of the identity of the node that was started as this one, counted from 0."""
        return self._folder / f"{number}.pem"

    async def start(self, *flags: str, host: HostCommand = HostCommand()) -> LocalNode:
        """Start one more node and wait until it is ready.  Raises ModelError with the node's error, or NodeLost."""
        (node,) = await self.start_all([flags], [host])
        return node

    async def start_all(self, flags: Sequence[Sequence[str]], hosts: Sequence[HostCommand]) -> list[LocalNode]:
        """Start several nodes at once, which load side by side, and wait until all are ready."""
        started: list[tuple[asyncio.subprocess.Process, asyncio.Task[bytes]]] = []
        # Before the first one starts: if starting is cancelled between two nodes, the first is stopped too.
        self._stack.push_async_callback(_stop_all, started)
        for own, host in zip(flags, hosts, strict=True):
            identity = str(self.identity(next(self._names)))
            arguments = (self.model, *self.flags, "--identity", identity, *own)
            started.append(await _start(host, arguments, self._environment))
        ready = await asyncio.gather(*(self._ready(process, errors) for process, errors in started))
        self.nodes.extend(ready)
        return ready

    async def _ready(self, process: asyncio.subprocess.Process, errors: asyncio.Task[bytes]) -> LocalNode:
        node = await _ready(process, errors)
        self.on_ready(node)
        return node


def even_cuts(blocks: int, nodes: int) -> list[Span]:
    """Cut `blocks` blocks into `nodes` spans whose lengths differ by at most one."""
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
    keeps_nothing: bool = False,
    on_ready: Callable[[LocalNode], None] = lambda _: None,
) -> AsyncIterator[LocalSwarm]:
    """Start one node per span and wait until all are ready; stop them on leaving the context.

    All compute on the CPU unless `flags` name another device: the nodes of a machine would share one GPU.
    `hosts` says where each node runs, by default here on loopback.  `flags` are further flags of every node,
    `own_flags` those of each.  With `keeps_nothing` the nodes also leave no cache in the user's home.  `on_ready` is
    called with each node as soon as it is ready.  Raises ModelError with the error of a node that did not start, or
    NodeLost.
    """
    shared = [
        "--device",
        "cpu",
        "--dtype",
        dtype,
        "--threads",
        str(threads),
        "--log-format",
        "json",
        "--registry",
        registry,
        *flags,
    ]
    shared += ["--emulate-link", emulate_link] if emulate_link else []
    shared += ["--swarm-key", str(swarm_key)] if swarm_key else []
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="treeswarm-")))
        # Files of a model that was fetched or converted lie in the user's cache, which nodes then use.
        variables = [name for name in HOME_VARIABLES if name != "XDG_CACHE_HOME" or not is_cached(model)]
        environment = dict.fromkeys(variables, str(folder)) if keeps_nothing else {}
        swarm = LocalSwarm(
            model, tuple(shared), on_ready=on_ready, _environment=environment, _folder=folder, _stack=stack
        )
        node_flags = [
            ("--blocks", str(span), *own) for span, own in zip(spans, own_flags or [()] * len(spans), strict=True)
        ]
        await swarm.start_all(node_flags, hosts or [HostCommand()] * len(spans))
        yield swarm


def node_command() -> list[str]:
    """Return the command of `swarm-node`: the program beside this Python, or on the PATH.  Raises ModelError."""
    beside = Path(sys.executable).with_name("swarm-node")
    program = str(beside) if beside.exists() else shutil.which("swarm-node")
    if program is None:
        raise ModelError(f"the program swarm-node is not installed: {install_command('node')}")
    return [program]


async def _start(
    host: HostCommand, arguments: Sequence[str], environment: Mapping[str, str]
) -> tuple[asyncio.subprocess.Process, asyncio.Task[bytes]]:
    process = await asyncio.create_subprocess_exec(
        *(*host.through, *node_command(), *arguments, "--listen", host.listen),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Variables that the user has set are meant for a node of theirs, not for these.
        env={name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | dict(environment),
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
        lines = (await errors).decode(errors="replace").strip().splitlines()
        raise ModelError(lines[-1].removeprefix("swarm-node: ") if lines else "a node ended without an error message")
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
