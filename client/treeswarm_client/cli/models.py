"""`swarm models`: the models that a swarm serves, and whether they can be used."""

import argparse
import asyncio
import json
from pathlib import Path

from treeswarm.errors import ModelError
from treeswarm.identity import config_digest
from treeswarm.model_files import BUNDLED, HUB_ID, is_at_hand, read_config, read_shape, resolve_model
from treeswarm.model_sources.named_models import NAMED
from treeswarm.programs.interrupts import ASKING, SLOW_S, ticking
from treeswarm.programs.process import run_until_terminated
from treeswarm.registry import client_registry
from treeswarm.transport.seam import Transport
from treeswarm_client.cli.checks import check_route
from treeswarm_client.cli.flags import add_route_flags, open_transport
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.cli.render.models_table import models_as_dict, render_models
from treeswarm_client.discovery.overview import ModelView, Overview
from treeswarm_client.discovery.prober import swarm_overview

EXAMPLES = """examples:
  swarm models --registry 10.0.0.5:4001                            all models that this node knows
  swarm models --registry mqtts://user:password@broker.example.org/swarm
  swarm models --registry 10.0.0.5:4001 --json | jq -r '.models[] | select(.covered).name'

A model is complete if nodes that answer serve every one of its blocks.  Versions in other dtypes or quantizations give
other texts: `swarm generate --dtype … --quantization …` chooses one.  The context length is shown for models whose
config is on this machine.  The free room is that of the block with the least room, in tokens of sessions.
Exit status: 0 if at least one model is complete, else 1."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `swarm models` to the command line."""
    parser = commands.add_parser(
        "models",
        help="list the models that a swarm serves",
        description="List the models that a swarm serves, their versions, and their free room.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_route_flags(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=lambda args: run_until_terminated(_run(args)))


async def _run(args: argparse.Namespace) -> int:
    spec, transport = check_route(args), open_transport(args)
    try:
        with ticking(ASKING, SLOW_S):
            overview = await read_overview(spec, transport)
    finally:
        await transport.close()
    contexts = await asyncio.to_thread(_context_lengths, overview)
    console = stdout_console()
    if args.json:
        console.file.write(json.dumps(models_as_dict(overview, contexts)) + "\n")
    else:
        console.print(*render_models(overview, contexts), sep="\n")
    return 0 if any(model.covered for model in overview.models) else 1


async def read_overview(spec: str, transport: Transport) -> Overview:
    """Return all models of the swarm.  Raises SwarmError if the swarm cannot be reached."""
    registry = await client_registry(spec, None, transport)
    try:
        return await swarm_overview(registry, transport)
    finally:
        await registry.close()


def _context_lengths(overview: Overview) -> dict[str, int]:
    """Return the context length in tokens, by config digest, of the models whose config is on this machine."""
    lengths = {model.digest: context_length_of(model) for model in overview.models}
    return {digest: context for digest, context in lengths.items() if context is not None}


def context_length_of(model: ModelView) -> int | None:
    """Return the context length in tokens, or None if the config of the nodes is not on this machine.

    Nodes choose the name of a model, so no directory is opened and nothing is downloaded because of it.
    """
    try:
        folder = _local_folder(model.name)
        if folder is None or config_digest(read_config(folder)) != model.digest:
            return None
        return read_shape(folder).max_positions
    except ModelError:
        return None


def _local_folder(name: str) -> Path | None:
    if name in BUNDLED or (name in NAMED and is_at_hand(name)):
        return resolve_model(name)
    if not HUB_ID.fullmatch(name):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # an optional dependency

        cached = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # ValueError: the hub does not allow such a name
        return None
    return Path(cached).parent if isinstance(cached, str) else None
