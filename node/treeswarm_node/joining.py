"""How a node comes into its swarm: the ports that it had before, and the registry that it is announced in."""

import logging
from collections.abc import Sequence
from pathlib import Path

from treeswarm.errors import BadRequest, DamagedFile
from treeswarm.protocol.address import Address
from treeswarm.registry import Registry, open_registry, parse_dht_peers, registry_kind
from treeswarm_node.config import NetworkConfig
from treeswarm_node.membership.last_run import LastRun, is_free, peers_to_rejoin

log = logging.getLogger(__name__)

OWN_SWARM = "dht:"
"""Registry of a node that names none: the swarm of its last run, or a new one."""


def listen_address(network: NetworkConfig, last_run: LastRun | None) -> str:
    """Return the address to listen on: as the owner says, on the port of the last run if the choice is the node's."""
    address = Address.parse(network.listen)
    if address.port or last_run is None:
        return address.bare
    return Address(address.host, _free_port(address.host, last_run.port, "port")).bare


def remembered_peers(network: NetworkConfig, last_run: LastRun | None, key_marker: str) -> tuple[str, ...]:
    """Return the DHT peers of the last run through which the node may look for its swarm; none for other registries.

    Raises BadRequest.
    """
    spec = network.registry or OWN_SWARM
    return peers_to_rejoin(parse_dht_peers(spec), last_run, key_marker) if registry_kind(spec) == "dht" else ()


async def open_own_registry(
    network: NetworkConfig, model: str, node: str, dht_key: Path, last_run: LastRun | None, remembered: Sequence[str]
) -> Registry:
    """Open the registry asked for; by default, return to the swarm of the last run or start a new one.

    `model` is the config digest, `node` the node's id, `dht_key` the key file of its DHT peer.  Without the DHT
    installed, the default is no registry.  Raises BadRequest or Unreachable.
    """
    spec = network.registry or OWN_SWARM
    host = Address.parse(network.listen).host
    port = _free_port(host, last_run.dht_port, "DHT port") if last_run and registry_kind(spec) == "dht" else 0
    listen = (f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}",)
    try:
        return await open_registry(spec, model, node, listen, dht_key, remembered)
    except DamagedFile:
        raise
    except BadRequest as error:
        if network.registry is not None:
            raise
        log.warning("%s; without a registry, only clients that are given this node's address find it", error)
        return await open_registry("none", model, node)


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
