"""`swarm-node doctor`: check whether this machine can serve, whether others find it, and say what to do if not."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from rich.console import Console

from treeswarm.errors import BadRequest, SwarmError
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.model_files import read_config
from treeswarm.programs.devices import checkpoint_dtype
from treeswarm.programs.health import Finding, check_open_files, check_python_version
from treeswarm.programs.health_report import print_findings
from treeswarm.programs.interrupts import ticking
from treeswarm.programs.swarm_health import examine_swarm, peers_opener
from treeswarm.protocol.address import Address
from treeswarm.registry import Registry, client_registry, open_registry, registry_kind
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm.transport.tls import Security
from treeswarm_node.cli.checks import find_refusals
from treeswarm_node.cli.machine_checks import (
    check_attention_kernels,
    check_device,
    check_device_numerics,
    check_disk,
    check_identity,
    check_memory,
    check_metrics_port,
    check_port,
    check_software,
    files_needed,
    report_dtype,
)
from treeswarm_node.config import NetworkConfig, NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo
from treeswarm_node.joining import check_code
from treeswarm_node.model.automatic import this_machine, with_device, with_numerics
from treeswarm_node.reachability.reachability import (
    ANSWERS,
    Basis,
    DialResult,
    PublicAddress,
    announced_address,
    ask_dial_back,
    decide_address,
)


def doctor(config: NodeConfig, *, as_json: bool = False) -> int:
    """Run all checks, print the findings, and return the exit status."""
    with ticking("checking this machine and its swarm"):
        findings = asyncio.run(examine(config))
    return print_findings(Console(highlight=False), findings, as_json=as_json)


async def examine(config: NodeConfig) -> list[Finding]:
    """Run all checks of a node that would be started with `config`.

    The node's port is bound for a moment.  Nothing is served, and nothing is announced to a registry.
    """
    findings = [check_python_version(), check_software()]
    findings += [Finding.of_error("settings", refusal) for refusal in find_refusals(config)]
    findings += [check_identity(config), *check_metrics_port(config.operations.metrics)]
    machine = this_machine()
    config = with_device(config, machine)
    device_finding, device = check_device(config, machine)
    findings.append(device_finding)
    model: ModelInfo | None = None
    if config.model.name:
        try:
            model = await asyncio.to_thread(ModelInfo.find, config.model.name, config.model.revision)
        except SwarmError as error:
            findings += without_repeats([Finding.of_error("model", error)], findings)
    # The swarm that is joined is not asked: a node would compute as the others do.
    config = with_numerics(config, machine, checkpoint_dtype(read_config(model.folder)) if model else "")
    findings += [report_dtype(config)] if model else []
    if device is not None:
        findings.append(await asyncio.to_thread(check_memory, config, device, model))
    findings.append(await asyncio.to_thread(check_disk, config.model.name))
    files = check_open_files(files_needed(config))
    findings += [files] if files else []
    port = check_port(config.network.listen)
    network = await examine_network(config.network, model, listens=port.verdict == "ok")
    findings += without_repeats([port, *network], findings)
    if device is not None:
        findings.append(await asyncio.to_thread(check_device_numerics, config, device))
        findings.append(await asyncio.to_thread(check_attention_kernels, config, device))
    return findings


def without_repeats(findings: Sequence[Finding], before: Sequence[Finding]) -> list[Finding]:
    """Return the findings that say something else than those `before`: several checks may meet the same problem."""
    known = {(finding.message, finding.next_step) for finding in before}
    return [finding for finding in findings if (finding.message, finding.next_step) not in known]


async def examine_network(network: NetworkConfig, model: ModelInfo | None, *, listens: bool) -> list[Finding]:
    """Check the swarm as seen from this machine, and, if `listens`, this machine as seen from the swarm."""
    identity = Identity.ephemeral()  # a running node may hold its own
    try:
        key = read_swarm_key(network.swarm_key) if network.swarm_key else None
        check_code(network)
    except SwarmError as error:
        return [Finding.of_error("swarm key", error)]
    transport = GrpcTransport(security=Security(identity, key))
    try:
        opener = _registry_opener(network.registry, model, transport)
        if isinstance(opener, Finding):
            return [opener]
        swarm = await examine_swarm(opener, transport)
        if not listens:
            return list(swarm.findings)
        return [*swarm.findings, await check_reachability(network, transport, identity.pin, swarm.answering)]
    except BadRequest as error:
        return [Finding.of_error("registry", error)]
    finally:
        await transport.close()


def _registry_opener(
    spec: str | None, model: ModelInfo | None, transport: Transport
) -> Callable[[], Awaitable[Registry]] | Finding:
    """Return how to read a registry without being announced in it, or a finding if it cannot be read.

    Raises BadRequest.
    """
    if spec is None or spec in ("none", "dht:"):
        return _check_new_swarm(spec)
    digest, kind = model.config_digest if model else None, registry_kind(spec)
    if kind in ("peers", "static"):
        return peers_opener(spec, digest, transport)
    if kind == "mqtt":
        return lambda: client_registry(spec, digest, transport)
    if digest is None:
        return Finding.warn(
            "registry", "not read: a DHT is searched for the nodes of one model", "give a MODEL to see its nodes"
        )
    return lambda: open_registry(spec, digest, f"doctor-{secrets.token_hex(4)}")


def _check_new_swarm(spec: str | None) -> Finding:
    if spec == "none":
        return Finding.ok("registry", "none: only clients that are given this node's address find it")
    try:
        from treeswarm.registry.dht_peer import check_hivemind  # noqa: PLC0415  # hivemind brings torch

        check_hivemind()
    except SwarmError as error:
        return Finding.of_error("registry", error)
    return Finding.ok("registry", "a new swarm would start here; to check an existing one, give --registry")


async def check_reachability(network: NetworkConfig, transport: Transport, pin: str, others: Sequence[str]) -> Finding:
    """Listen for a moment as the node would, and ask other nodes to dial this machine."""
    if not others:
        return Finding.warn(
            "reachability", "there is no node to ask", "try again with --registry when other nodes are online"
        )

    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()

    try:
        listener = await transport.listen(network.listen, accept)
    except BadRequest as error:
        return Finding.of_error("reachability", error)
    try:
        own = Address("0.0.0.0", Address.parse(listener.address).port)
        if network.announce is not None:
            own = announced_address(network.announce, listener.address)
        requests = [ask_dial_back(transport, other, str(replace(own, pin=pin))) for other in others[:ANSWERS]]
        results = [result for result in await asyncio.gather(*requests) if result is not None]
        return judge_reachability(
            decide_address(network.announce, listener.address, results), results, listener.address
        )
    finally:
        await listener.close()


def judge_reachability(public: PublicAddress | None, results: Sequence[DialResult], listening: str) -> Finding:
    """Return the finding that the results of other nodes amount to.  Pure."""
    check = "reachability"
    if not results:
        return Finding.warn(check, "no node could tell", "try again when nodes are online that are not behind a router")
    port = Address.parse(listening).port
    if public is None:
        next_step = (
            "serve all the same: the node borrows a port of another node; or forward a port in the router, for example "
            f"{port}, open it in the firewall, and give --listen 0.0.0.0:{port} --announce HOST:{port}"
        )
        return Finding.warn(check, f"{len(results)} nodes were asked, and most do not reach this machine", next_step)
    if not public.reachable:
        next_step = "check that the router forwards that port to this machine and its firewall lets it in"
        return Finding.fail(check, f"no node reaches {public.address}, given by --announce", next_step)
    if public.basis is Basis.ASSUMED:
        return Finding.warn(check, "there is no node to ask", "try again when other nodes are online")
    return Finding.ok(check, f"others reach it at {public.address}")
