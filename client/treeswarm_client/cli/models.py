"""`swarm models`: what the swarm serves, and whether one can ask it."""

import argparse
import asyncio
import json
from pathlib import Path

from treeswarm.errors import ModelError
from treeswarm.identity import config_digest
from treeswarm.model_files import BUNDLED, HUB_ID, read_config, read_shape, resolve_model
from treeswarm.registry import client_registry
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Transport
from treeswarm_client.cli.flags import add_route_flags, registry_of, security_of
from treeswarm_client.cli.render.live import stdout_console
from treeswarm_client.cli.render.models_table import models_as_dict, render_models
from treeswarm_client.discovery.overview import ModelView, Overview
from treeswarm_client.discovery.prober import swarm_overview

EXAMPLES = """examples:
  swarm models --registry 10.0.0.5:4001                            all models that this node knows of
  swarm models --registry mqtts://user:password@broker.example.org/swarm
  swarm models --registry 10.0.0.5:4001 --json | jq -r '.models[] | select(.covered).name'

A model is whole where nodes that answer serve every block of it.  Versions in other dtypes or quantisations compute
other text: `swarm generate --dtype … --quantization …` chooses.  The context length is known of models whose config is
on this machine; the free room is that of the block with least of it, in tokens of sessions.
exit status: 0 when at least one model is whole, 1 when none is."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    made = commands.add_parser(
        "models",
        help="which models a swarm serves",
        description="List the models that a swarm serves, in which versions, and how much room they have.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_route_flags(made)
    made.add_argument("--json", action="store_true", help="one JSON object")
    made.set_defaults(run=lambda args: asyncio.run(_run(args)))


async def _run(args: argparse.Namespace) -> int:
    spec, transport = registry_of(args), GrpcTransport(security=security_of(args))
    try:
        overview = await read_overview(spec, transport)
    finally:
        await transport.close()
    contexts = await asyncio.to_thread(_contexts, overview)
    console = stdout_console()
    if args.json:
        console.file.write(json.dumps(models_as_dict(overview, contexts)) + "\n")
    else:
        console.print(*render_models(overview, contexts), sep="\n")
    return 0 if any(model.covered for model in overview.models) else 1


async def read_overview(spec: str, transport: Transport) -> Overview:
    """All models of the swarm.  Raises SwarmError where it cannot be reached."""
    registry = await client_registry(spec, None, transport)
    try:
        return await swarm_overview(registry, transport)
    finally:
        await registry.close()


def _contexts(overview: Overview) -> dict[str, int]:
    """Tokens, by config digest, of models that are at hand."""
    found = {model.digest: context_length_of(model) for model in overview.models}
    return {digest: context for digest, context in found.items() if context is not None}


def context_length_of(model: ModelView) -> int | None:
    """The context length by the config on this machine, where it is the very one that the nodes have.

    Names are what strangers call things: no folder is opened and nothing is downloaded for one.
    """
    try:
        folder = _at_hand(model.name)
        if folder is None or config_digest(read_config(folder)) != model.digest:
            return None
        return read_shape(folder).max_positions
    except ModelError:
        return None


def _at_hand(name: str) -> Path | None:
    if name in BUNDLED:
        return resolve_model(name)
    if not HUB_ID.fullmatch(name):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415  # not every client has it

        cached = try_to_load_from_cache(name, "config.json")
    except (ImportError, ValueError):  # the latter for a name that the hub would not give
        return None
    return Path(cached).parent if isinstance(cached, str) else None
