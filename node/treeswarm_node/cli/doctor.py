"""`swarm-node doctor`: whether this machine can serve, whether others will find it, and what to do where not."""

import argparse
import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from rich.console import Console

from treeswarm.errors import BadRequest, SwarmError
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.programs.health import Finding, check_open_files, check_python_version
from treeswarm.programs.health_report import print_findings
from treeswarm.programs.settings import parse
from treeswarm.programs.swarm_health import examine_swarm, peers_opener
from treeswarm.protocol.address import Address
from treeswarm.registry import Registry, client_registry, open_registry, registry_kind
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm.transport.tls import Security
from treeswarm_node.cli.arguments import add_node_flags, config_from_arguments
from treeswarm_node.cli.machine_checks import (
    attention,
    device_findings,
    disk,
    files_needed,
    free_port,
    numerics,
    room,
    software,
)
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo
from treeswarm_node.reachability.reachability import (
    ANSWERS,
    Basis,
    DialResult,
    PublicAddress,
    announced_address,
    ask_dial_back,
    decide_address,
)

EXAMPLES = """examples:
  swarm-node doctor                                    this machine
  swarm-node doctor Qwen/Qwen3-8B --device cuda --dtype bfloat16 --listen 0.0.0.0:4001 --registry mqtts://…
                                                       what `swarm-node` with these flags would run into
  swarm-node doctor --registry 203.0.113.7:4001        whether the nodes there can reach this machine
  swarm-node doctor --json                             for programs

It takes swarm-node's flags, variables and config file.  Exit status 1 where something fails, else 0."""


def parser() -> argparse.ArgumentParser:
    """The command line: that of serving, with the model left open."""
    made = argparse.ArgumentParser(
        prog="swarm-node doctor",
        description="Check this machine and its way to a swarm.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("model", metavar="MODEL", nargs="?", default="", help="what would be served (default: not said)")
    made.add_argument("--json", action="store_true", help="one JSON object")
    add_node_flags(made)
    return made


def doctor(arguments: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Check and show; the exit status.  Raises BadRequest for a wrong command line."""
    args = parse(parser(), "node", arguments, os.environ if environ is None else environ)
    return print_findings(
        Console(highlight=False), asyncio.run(examine(config_from_arguments(args))), as_json=args.json
    )


async def examine(config: NodeConfig) -> list[Finding]:
    """All checks of a node that would be started with `config`.  Binds its port for a moment; serves nothing, and says
    nothing of itself to a registry."""
    found = [check_python_version(), software()]
    devices, device = device_findings(config)
    found += devices
    model: ModelInfo | None = None
    if config.model.name:
        try:
            model = await asyncio.to_thread(ModelInfo.find, config.model.name, config.model.revision)
        except SwarmError as error:
            found.append(Finding.of_error("model", error))
    if device is not None:
        found.append(await asyncio.to_thread(room, config, device, model))
    found.append(await asyncio.to_thread(disk, config.model.name))
    files = check_open_files(files_needed(config))
    found += [files] if files else []
    port = free_port(config.network.listen)
    found += [port, *await examine_network(config, model, listens=port.verdict == "ok")]
    if device is not None:
        found.append(await asyncio.to_thread(numerics, config, device))
        found.append(await asyncio.to_thread(attention, config, device))
    return found


async def examine_network(config: NodeConfig, model: ModelInfo | None, *, listens: bool) -> list[Finding]:
    """The swarm as seen from here, and here as seen from the swarm."""
    identity = Identity.ephemeral()  # the node's own may be in use by the node
    try:
        key = read_swarm_key(config.network.swarm_key) if config.network.swarm_key else None
    except SwarmError as error:
        return [Finding.of_error("swarm key", error)]
    transport = GrpcTransport(security=Security(identity, key))
    try:
        opening = _opening(config.network.registry, model, transport)
        if isinstance(opening, Finding):
            return [opening]
        seen = await examine_swarm(opening, transport)
        if not listens:
            return list(seen.findings)
        return [*seen.findings, await reachability(config, transport, identity.pin, seen.answering)]
    except BadRequest as error:
        return [Finding.of_error("registry", error)]
    finally:
        await transport.close()


def _opening(
    spec: str | None, model: ModelInfo | None, transport: Transport
) -> Callable[[], Awaitable[Registry]] | Finding:
    """How to look into a registry without being in it, or why that cannot be.  Raises BadRequest."""
    if spec is None or spec in ("none", "dht:"):
        return _new_swarm(spec)
    digest, kind = model.config if model else None, registry_kind(spec)
    if kind in ("peers", "static"):
        return peers_opener(spec, digest, transport)
    if kind == "mqtt":
        return lambda: client_registry(spec, digest, transport)
    if digest is None:
        return Finding.warn(
            "registry", "not looked into: a DHT is asked for one model's nodes", "name a MODEL to see its nodes"
        )
    return lambda: open_registry(spec, digest, f"doctor-{secrets.token_hex(4)}")


def _new_swarm(spec: str | None) -> Finding:
    if spec == "none":
        return Finding.ok("registry", "none: only who is told this node's address finds it")
    try:
        from treeswarm.registry.dht_peer import check_hivemind  # noqa: PLC0415  # hivemind brings torch

        check_hivemind()
    except SwarmError as error:
        return Finding.of_error("registry", error)
    return Finding.ok("registry", "a new swarm would begin here; to check one that there is, give --registry")


async def reachability(config: NodeConfig, transport: Transport, pin: str, others: Sequence[str]) -> Finding:
    """Listen for a moment as the node would, and have others dial it."""
    if not others:
        return Finding.warn(
            "reachability", "nobody could be asked", "try again with --registry when other nodes are online"
        )

    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()

    try:
        listener = await transport.listen(config.network.listen, accept)
    except BadRequest as error:
        return Finding.of_error("reachability", error)
    try:
        own = Address("0.0.0.0", Address.parse(listener.address).port)
        if config.network.announce is not None:
            own = announced_address(config.network.announce, listener.address)
        asked = [ask_dial_back(transport, other, str(replace(own, pin=pin))) for other in others[:ANSWERS]]
        verdicts = [verdict for verdict in await asyncio.gather(*asked) if verdict is not None]
        return reached(decide_address(config.network.announce, listener.address, verdicts), verdicts, listener.address)
    finally:
        await listener.close()


def reached(place: PublicAddress | None, verdicts: Sequence[DialResult], listening: str) -> Finding:
    """What others' verdicts come to.  Pure."""
    check = "reachability"
    if not verdicts:
        return Finding.warn(check, "no node could say", "try again when others are online that are not behind routers")
    port = Address.parse(listening).port
    if place is None:
        step = (
            f"serve all the same, the node rents a port of another; or forward a port in the router, {port} say, open "
            f"it in the firewall, and give --listen 0.0.0.0:{port} --announce HOST:{port}"
        )
        return Finding.warn(check, f"{len(verdicts)} nodes were asked, and most do not reach this machine", step)
    if not place.reachable:
        step = "check that the router forwards that port to this machine and its firewall lets it in"
        return Finding.fail(check, f"nobody reaches {place.address}, which --announce says", step)
    if place.basis is Basis.ASSUMED:
        return Finding.warn(check, "nobody could be asked", "try again when other nodes are online")
    return Finding.ok(check, f"others reach it at {place.address}")
