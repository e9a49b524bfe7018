"""`swarm status`: the nodes of a swarm, the blocks they serve, their load and latency, and the blocks not served."""

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
from treeswarm.programs.interrupts import ASKING, SLOW_S, ticking
from treeswarm.programs.process import run_until_terminated
from treeswarm.registry import Registry, client_registry, registry_kind
from treeswarm.registry.spec import redacted
from treeswarm.transport.seam import Transport
from treeswarm_client.cli.checks import check_route
from treeswarm_client.cli.flags import add_revision_flag, add_route_flags, open_transport, registry_of
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.cli.render.status_table import render_status
from treeswarm_client.discovery.overview import ModelFilter, Overview
from treeswarm_client.discovery.prober import PROBE_AGAIN_S, Prober

EXAMPLES = """examples:
  swarm status --peers 127.0.0.1:4001,127.0.0.1:4002        exactly these nodes
  swarm status --registry 10.0.0.5:4001 --model demo        one model, on all nodes that this node knows
  swarm status --registry mqtts://user:password@broker.example.org/swarm --watch
  swarm status --registry 10.0.0.5:4001 --model ./Llama-3-8B > /dev/null || echo "blocks are missing"
  swarm status --peers 127.0.0.1:4001 --json | jq '.models[].gaps'

Exit status: 0 if every block of every model shown is served, 1 if not, 130 after Ctrl-C.
A node counts for its blocks if it is online and answers this client."""

REDRAW_S = 1.0
"""Seconds between two pictures at least: faster changes cannot be seen, and each picture pings new nodes."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm status` to the command line."""
    parser = commands.add_parser(
        "status",
        help="show which nodes serve which blocks, and what is missing",
        description="Show a swarm: its models block by block, its nodes, their load and their latency.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_route_flags(parser)
    parser.add_argument(
        "--model",
        help="show only this model: directory, GGUF file, hub id, `smollm2` or `demo` (default: all that are served)",
    )
    add_revision_flag(parser)
    parser.add_argument("--watch", action="store_true", help="redraw at every change, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print one JSON object; with --watch, one line per change")
    parser.set_defaults(run=lambda args: run_until_terminated(_run(args)))


async def _run(args: argparse.Namespace) -> int:
    check_route(args)
    transport = open_transport(args)
    try:
        return await run_status(args, transport, stdout_console())
    finally:
        await transport.close()


async def run_status(args: argparse.Namespace, transport: Transport, console: Console) -> int:
    """Run the command over the given transport and return the exit status.  Raises SwarmError."""
    model_filter = await asyncio.to_thread(_make_filter, args.model, args.revision) if args.model else None
    spec = registry_of(args)
    with ticking(ASKING, SLOW_S):
        registry = await _open(spec, model_filter, transport)
    try:
        prober = Prober(registry, transport, model_filter)
        if args.watch:
            return await _watch(prober, console, shown_registry(spec), as_json=args.json)
        with ticking(ASKING, SLOW_S):
            overview = await prober.fresh_overview()
    finally:
        await registry.close()
    if args.json:
        _print_json(console, overview)
    else:
        console.print(
            *render_status(overview, console.width, shown_registry(spec), ascii_only=_ascii_only(console)), sep="\n"
        )
    return 0 if overview.covered else 1


def shown_registry(spec: str) -> str:
    """Return what a node gives as `--registry` to join the swarm that this command looked at.  Pure.

    Any node that was named says where its swarm meets.  The password of a broker is not shown.
    """
    if registry_kind(spec) in ("peers", "static"):
        return spec.removeprefix("static:").split(",")[0]
    return redacted(spec)


def _make_filter(model: str, revision: str | None) -> ModelFilter:
    folder = resolve_model(model, hub=HubOptions(revision))
    return ModelFilter(model, config_digest(read_config(folder)), read_shape(folder).blocks)


async def _open(spec: str, model_filter: ModelFilter | None, transport: Transport) -> Registry:
    """Open the registry.

    A broker sends the records of one model only, if asked to.  Nodes send all records, and status counts those of other
    models.
    """
    by_model = model_filter is not None and registry_kind(spec) == "mqtt"
    return await client_registry(
        spec, model_filter.digest if model_filter is not None and by_model else None, transport
    )


async def _watch(prober: Prober, console: Console, shown: str, *, as_json: bool) -> int:
    """Show every change until cancelled."""
    async with contextlib.aclosing(_overviews(prober)) as overviews:
        if as_json:
            last: object = None
            async for overview in overviews:
                if (now := _without_latencies(overview)) != last:
                    last = now
                    _print_json(console, overview)
        elif not console.is_terminal:
            async for overview in overviews:
                lines = render_status(overview, console.width, shown, ascii_only=_ascii_only(console))
                console.print(*lines, "", sep="\n")
        else:
            with Live(console=console, auto_refresh=False) as live:
                async for overview in overviews:
                    # The summary comes first, because a terminal with few lines cuts off the end.
                    lines = render_status(
                        overview, console.width, shown, ascii_only=_ascii_only(console), summary_first=True
                    )
                    live.update(Group(*lines), refresh=True)
    return 0


async def _overviews(prober: Prober) -> AsyncGenerator[Overview, None]:
    """Yield an overview after every change, after new pings, and at intervals, since a registry reports no expiry."""
    changed = asyncio.Event()

    async def follow_registry() -> None:
        async for _ in prober.registry.watch():
            changed.set()

    async def probe_repeatedly() -> None:
        while True:  # in a task of its own, so that a node that hangs does not delay the drawing
            if await prober.probe_due():
                changed.set()
            await asyncio.sleep(REDRAW_S)

    yield await prober.fresh_overview()
    tasks = [asyncio.create_task(follow_registry()), asyncio.create_task(probe_repeatedly())]
    try:
        while not any(task.done() for task in tasks):
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`: in Python 3.11 it loses a cancellation that comes together with a change.
                async with asyncio.timeout(PROBE_AGAIN_S):
                    await changed.wait()
            changed.clear()
            yield await prober.current_overview()
            await asyncio.sleep(REDRAW_S)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for error in results:
        if isinstance(error, Exception):
            raise error


def _without_latencies(overview: Overview) -> dict[str, Any]:
    """Return an overview without the latencies, which change all the time."""
    result = overview.as_dict()
    for model in result["models"]:
        for served in model["classes"]:
            for node in served["nodes"]:
                del node["latency_ms"]
    return result


def _print_json(console: Console, overview: Overview) -> None:
    console.file.write(json.dumps(overview.as_dict()) + "\n")
    console.file.flush()


def _ascii_only(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
