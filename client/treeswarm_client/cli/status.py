"""`swarm status`: who serves which blocks, how busy, how far away, and what nobody serves."""

import argparse
import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from rich.console import Console, Group
from rich.live import Live

from treeswarm.identity import config_digest
from treeswarm.model_files import HubOptions, read_config, read_shape, resolve_model
from treeswarm.registry import Registry, client_registry, registry_kind
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Transport
from treeswarm_client.cli.flags import add_revision_flag, add_route_flags, registry_of, security_of
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.cli.render.status_table import render_status
from treeswarm_client.discovery.overview import ModelFilter, Overview
from treeswarm_client.discovery.prober import PROBE_AGAIN_S, Prober

EXAMPLES = """examples:
  swarm status --peers 127.0.0.1:4001,127.0.0.1:4002        exactly these nodes
  swarm status --registry 10.0.0.5:4001 --model demo        one model, and all nodes that this one knows of
  swarm status --registry mqtts://user:password@broker.example.org/swarm --watch
  swarm status --registry 10.0.0.5:4001 --model ./Llama-3-8B > /dev/null || echo "blocks are missing"
  swarm status --peers 127.0.0.1:4001 --json | jq '.models[].gaps'

exit status: 0 when every block of every model shown is served, 1 when not, 130 after Ctrl-C.
A node counts for its blocks when it is online and answers this client."""

REDRAW_S = 1.0
"""At least so long between two pictures: eyes are no faster, and every one asks new nodes how far they are."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "status",
        help="who serves which blocks, and what is missing",
        description="Show a swarm: its models block by block, its nodes, how busy they are and how far from here.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_route_flags(made)
    made.add_argument("--model", help="only this one: directory, hub id or `demo` (default: all that are served)")
    add_revision_flag(made)
    made.add_argument("--watch", action="store_true", help="redraw when something changes, until Ctrl-C")
    made.add_argument("--json", action="store_true", help="one JSON object; with --watch one line a change")
    made.set_defaults(run=lambda args: asyncio.run(_run(args)))


async def _run(args: argparse.Namespace) -> int:
    transport = GrpcTransport(security=security_of(args))
    try:
        return await status(args, transport, stdout_console())
    finally:
        await transport.close()


async def status(args: argparse.Namespace, transport: Transport, console: Console) -> int:
    """The command, over a transport of one's choosing.  Raises SwarmError."""
    wanted = await asyncio.to_thread(_wanted, args.model, args.revision) if args.model else None
    registry = await _open(registry_of(args), wanted, transport)
    try:
        prober = Prober(registry, transport, wanted)
        if args.watch:
            return await _watch(prober, console, as_json=args.json)
        overview = await prober.fresh_overview()
    finally:
        await registry.close()
    if args.json:
        _print_json(console, overview)
    else:
        console.print(*render_status(overview, console.width, ascii_only=_ascii_only(console)), sep="\n")
    return 0 if overview.covered else 1


def _wanted(model: str, revision: str | None) -> ModelFilter:
    folder = resolve_model(model, hub=HubOptions(revision))
    return ModelFilter(model, config_digest(read_config(folder)), read_shape(folder).blocks)


async def _open(spec: str, wanted: ModelFilter | None, transport: Transport) -> Registry:
    """A broker sends one model's records if only those are wanted.  Nodes tell theirs, and that somebody is there with
    another model is worth showing."""
    by_model = wanted is not None and registry_kind(spec) == "mqtt"
    return await client_registry(spec, wanted.digest if wanted is not None and by_model else None, transport)


async def _watch(prober: Prober, console: Console, *, as_json: bool) -> int:
    """Until cancelled."""
    async with contextlib.aclosing(_overviews(prober)) as overviews:
        if as_json:
            last: object = None
            async for overview in overviews:
                if (now := _without_times(overview)) != last:
                    last = now
                    _print_json(console, overview)
        elif not console.is_terminal:
            async for overview in overviews:
                console.print(*render_status(overview, console.width, ascii_only=_ascii_only(console)), "", sep="\n")
        else:
            with Live(console=console, auto_refresh=False) as live:
                async for overview in overviews:
                    # The verdict comes first: a terminal that is too low loses what is below.
                    drawn = render_status(overview, console.width, ascii_only=_ascii_only(console), verdict_first=True)
                    live.update(Group(*drawn), refresh=True)
    return 0


async def _overviews(prober: Prober) -> AsyncGenerator[Overview, None]:
    """After every change and every round of pings, and now and then without: what expires is no news in a registry."""
    changed = asyncio.Event()

    async def follow() -> None:
        async for _ in prober.registry.watch():
            changed.set()

    async def ask() -> None:
        while True:  # beside the drawing: a node that hangs holds up nobody
            if await prober.probe_due():
                changed.set()
            await asyncio.sleep(REDRAW_S)

    yield await prober.fresh_overview()
    tasks = [asyncio.create_task(follow()), asyncio.create_task(ask())]
    try:
        while not any(task.done() for task in tasks):
            with contextlib.suppress(TimeoutError):
                # Python 3.11's wait_for forgets a Ctrl-C that comes together with a change.
                async with asyncio.timeout(PROBE_AGAIN_S):
                    await changed.wait()
            changed.clear()
            yield await prober.current_overview()
            await asyncio.sleep(REDRAW_S)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for error in ended:
        if isinstance(error, Exception):
            raise error


def _without_times(overview: Overview) -> dict[str, Any]:
    """What makes a change a change: latencies differ at every look."""
    told = overview.as_dict()
    for model in told["models"]:
        for served in model["classes"]:
            for node in served["nodes"]:
                del node["latency_ms"]
    return told


def _print_json(console: Console, overview: Overview) -> None:
    console.file.write(json.dumps(overview.as_dict()) + "\n")
    console.file.flush()


def _ascii_only(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
