"""How a node comes into its swarm: the ports that it had before, the registry, and the nodes that must admit it."""

import asyncio
import ipaddress
import logging
import random
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import BadRequest, DamagedFile, Impostor, Malformed, Refused, SwarmError, Unreachable
from treeswarm.keys import read_swarm_key
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.node_messages import FindSwarm, SwarmFound
from treeswarm.protocol.records import NodeRecord, NodeState
from treeswarm.registry import (
    Registry,
    check_swarm_key,
    open_registry,
    parse_addresses,
    parse_dht_peers,
    registry_kind,
    shareable_spec,
)
from treeswarm.registry.spec import PLACEHOLDERS
from treeswarm.tasks import first_success
from treeswarm.transport.ping import round_trip
from treeswarm.transport.seam import StreamKind, Transport
from treeswarm_node.config import NetworkConfig, NodeConfig
from treeswarm_node.membership.last_run import LastRun, is_free, peer_id, peers_to_rejoin

log = logging.getLogger(__name__)

OWN_SWARM = "dht:"
"""Registry of a node that names none: the swarm of its last run, or a new one."""
# A node that was started a moment before this one listens already, and may have no registry yet.
ASK_PAUSES_S = (0.0, 1.0, 3.0, 10.0)
ANSWER_S = 8.0
# Of so many nodes at least one belongs to the swarm, and answers.
MAX_ASKED = 8
# A broker sends what it has kept at once; the DHT has been read already.
FIRST_RECORDS_S = 0.5


@dataclass(frozen=True, eq=False)
class OpenedRegistry:
    """The registry that a node is announced in."""

    registry: Registry
    spec: str
    """Specification of the registry, in its long form."""

    def shared_spec(self) -> str:
        """Return what a node that joins gives as `--registry`, in the long form and without credentials; "" if none."""
        if registry_kind(self.spec) == "mqtt":
            return shareable_spec(self.spec).partition("?")[0]  # the path of a certificate is this machine's own
        return str(getattr(self.registry, "shared_spec", ""))

    def join_spec(self, code: str) -> str | None:
        """Return what a node that joins gives as `--registry`: the join code `code` wherever that suffices.

        At a broker every node needs credentials of its own.  Return None if there is no registry.
        """
        shared = self.shared_spec()
        return (shared if PLACEHOLDERS in shared else code) if shared else None


def check_code(network: NetworkConfig) -> None:
    """Check what the join codes in `--registry` tell without dialling any node.  Raises BadRequest."""
    if network.registry is not None:
        check_swarm_key(network.registry, read_swarm_key(network.swarm_key) if network.swarm_key else None)


def listen_address(network: NetworkConfig, last_run: LastRun | None) -> str:
    """Return the address to listen on: as the owner says, on the port of the last run if the choice is the node's."""
    address = Address.parse(network.listen)
    if address.port or last_run is None:
        return address.bare
    return Address(address.host, _free_port(address.host, last_run.port, "port")).bare


async def open_own_registry(
    network: NetworkConfig,
    model: str,
    node: str,
    dht_key: Path,
    last_run: LastRun | None,
    key_marker: str,
    transport: Transport,
) -> OpenedRegistry:
    """Open the registry asked for; by default, return to the swarm of the last run or start a new one.

    `model` is the config digest, `node` the node's id, `dht_key` the key file of its DHT peer.  Without the DHT
    installed, the default is no registry.  Raises BadRequest, Refused or a TransportError.
    """
    spec = network.registry or OWN_SWARM
    if registry_kind(spec) == "peers":
        spec = await find_swarm(transport, spec, last_run if last_run and last_run.key_marker == key_marker else None)
    host = Address.parse(network.listen).host
    uses_dht = registry_kind(spec) == "dht"
    port = _free_port(host, last_run.dht_port, "DHT port") if last_run and uses_dht else 0
    remembered = peers_to_rejoin(parse_dht_peers(spec), last_run, key_marker) if uses_dht else ()
    listen = (f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}",)
    try:
        return OpenedRegistry(await open_registry(spec, model, node, listen, dht_key, remembered), spec)
    except DamagedFile:
        raise
    except BadRequest as error:
        if network.registry is not None:
            raise
        log.warning("%s; without a registry, only clients that are given this node's address find it", error)
        return OpenedRegistry(await open_registry("none", model, node), "none")


async def find_swarm(transport: Transport, spec: str, last_run: LastRun | None) -> str:
    """Ask the nodes at the addresses or join codes `spec` for their registry, and return its long form.

    Where none answers, the nodes of the last run are asked, if that was begun with the same addresses or met them.
    Raises BadRequest if nodes cannot join this one, Refused or Impostor if it admits no such node, else Unreachable.
    What keeps a node of the last run from answering, such as another program at its port, is no such reason.
    """
    addresses = named = parse_addresses(spec)
    known = {Address.parse(node).bare for node in last_run.nodes} if last_run else set()
    if last_run is not None and (last_run.registry == spec or known & {Address.parse(a).bare for a in addresses}):
        addresses += tuple(node for node in last_run.nodes if Address.parse(node).bare not in map(_bare, addresses))
    errors: Sequence[SwarmError] = ()
    for pause_s in ASK_PAUSES_S:
        await asyncio.sleep(pause_s)
        try:
            return await first_success([partial(_ask_for_swarm, transport, address) for address in addresses])
        except* SwarmError as group:
            errors = [error for error in group.exceptions if isinstance(error, SwarmError)]
        if final := [error for error in errors[: len(named)] if _is_final(error)]:
            raise final[0]
    raise errors[0]


def _bare(address: str) -> str:
    return Address.parse(address).bare


def _is_final(error: SwarmError) -> bool:
    """Return whether asking again would bring the same answer."""
    if isinstance(error, Refused):
        return error.code != FaultCode.DRAINING
    return isinstance(error, BadRequest | Impostor | Malformed)


async def _ask_for_swarm(transport: Transport, address: str) -> str:
    try:
        async with asyncio.timeout(ANSWER_S):
            stream = await transport.connect(address, StreamKind.CONTROL)
            try:
                await stream.send(FindSwarm(PROTOCOL_VERSION))
                reply = await stream.receive()
            finally:
                await stream.end()
    except TimeoutError:
        raise Unreachable(f"{_bare(address)} accepts connections and does not answer: ask its owner") from None
    if not isinstance(reply, SwarmFound):
        raise Malformed(f"{_bare(address)} does not say where its swarm meets: does it run this release of swarm-node?")
    if not reply.registry.isprintable():
        raise Malformed(f"{_bare(address)} names a registry with control characters: ask its owner")
    return joinable_spec(Address.parse(address), reply.registry)


def joinable_spec(asked: Address, registry: str) -> str:
    """Return the registry in which to join the swarm of the node `asked`, which named `registry`.  Pure.

    The node may know its own host under another name than this machine dialled it by, so that one is tried as well.
    Raises BadRequest if no node can join there.
    """
    kind = registry_kind(registry) if registry else "none"
    if kind == "mqtt" and PLACEHOLDERS in registry:
        raise BadRequest(
            f"the swarm of {asked.bare} meets at a broker where every node has a name and a password of its own: give "
            f"--registry {shlex.quote(registry)}"
        )
    if kind == "mqtt":
        return registry.partition("?")[0]  # files of this machine are not the other node's to name
    if kind != "dht":
        raise BadRequest(
            f"the node at {asked.bare} announces itself nowhere (--registry none), so that clients can use it and "
            "nodes cannot join it: start it without --registry none, or give the address of another node"
        )
    maddrs = parse_dht_peers(registry)
    if not maddrs:
        raise BadRequest(f"the node at {asked.bare} names no peer of its DHT: give the address of another node")
    own = [maddr for maddr in maddrs if peer_id(maddr) == peer_id(maddrs[0])]
    return f"dht:{','.join(dict.fromkeys([*(_at_host(asked.host, maddr) for maddr in own), *maddrs]))}"


async def check_admission(transport: Transport, opened: OpenedRegistry, node: str) -> None:
    """Make sure that the swarm's nodes talk to this one, whose id is `node`: a node that they refuse would be alone.

    Some of them are pinged, and one answer is enough: nobody keeps others out by records of nodes of their own.  Raises
    BadRequest if none answers and at least one refuses for another swarm key.
    """
    others = await _first_others(opened.registry, node) if opened.spec != "none" else []
    online = [record for record in others if record.state is NodeState.ONLINE]
    asked = sorted(random.sample(online, len(online)), key=lambda record: not record.reachable)[:MAX_ASKED]
    if not asked:
        return
    refused: list[Refused] = []
    try:
        await first_success([partial(_ping, transport, record.dial) for record in asked])
    except* SwarmError as group:
        refused = [e for e in group.exceptions if isinstance(e, Refused) and e.code == FaultCode.WRONG_SWARM_KEY]
    if refused:
        raise BadRequest(f"{len(refused)} of {len(asked)} nodes of this swarm refuse this one: {refused[0]}")


async def _first_others(registry: Registry, node: str) -> list[NodeRecord]:
    """Return the records of the other nodes, after a moment in which the first ones may arrive."""
    others: list[NodeRecord] = []
    with suppress(TimeoutError):
        async with asyncio.timeout(FIRST_RECORDS_S):
            async for snapshot in registry.watch():
                if others := [sealed.record for sealed in snapshot if sealed.record.node != node]:
                    break
    return others


async def _ping(transport: Transport, address: str) -> None:
    try:
        await round_trip(transport, address)
    except TimeoutError:
        raise Unreachable(f"no answer from {_bare(address)}") from None


def begin_run(config: NodeConfig, listening: str, key_marker: str, last_run: LastRun | None) -> LastRun:
    """Return what the node remembers of the run that begins: of its swarm, at first what the last run knew.  Pure."""
    run = LastRun(
        config.model.name,
        automatic=not Address.parse(config.network.listen).port,
        port=Address.parse(listening).port,
        key_marker=key_marker,
        registry=config.network.registry or "",
    )
    if last_run is None or last_run.key_marker != key_marker:
        return run
    return replace(run, dht_peers=last_run.dht_peers, nodes=last_run.nodes)


def _at_host(host: str, maddr: str) -> str:
    """Return a multiaddress of the same peer and port at another host."""
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns"
    return "/".join(["", kind, host, *maddr.split("/")[3:]])


def _free_port(host: str, port: int, name: str) -> int:
    """Return a port of the last run if it is free, else 0, with a warning."""
    if not port or is_free(host, port):
        return port
    log.warning(
        "%s %d of this node's last run is in use: the node takes another one, and the addresses and join codes that it "
        "printed then no longer lead to it",
        *(name, port),
    )
    return 0
