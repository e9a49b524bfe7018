"""Registries: one interface to the records of a swarm's nodes, and the functions that open its implementations."""

from collections.abc import Sequence
from pathlib import Path

from treeswarm.errors import BadRequest
from treeswarm.extras import require
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.peers import PeersRegistry
from treeswarm.registry.seam import Registry
from treeswarm.registry.spec import (
    Broker,
    Kind,
    check_swarm_key,
    parse_addresses,
    parse_dht_peers,
    redacted,
    registry_kind,
    shareable_spec,
)
from treeswarm.transport.seam import Transport

__all__ = [
    "Kind",
    "Registry",
    "check_client_spec",
    "check_node_spec",
    "check_swarm_key",
    "client_registry",
    "open_registry",
    "parse_addresses",
    "parse_dht_peers",
    "peers_registry",
    "registry_kind",
    "shareable_spec",
]


async def open_registry(
    spec: str,
    model: str,
    node: str,
    listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
    identity: Path | None = None,
    remembered: Sequence[str] = (),
) -> Registry:
    """Open the registry that a node announces itself in.

    `model` is the config digest and `node` the node's id.  `listen` (multiaddresses), `identity` (a key file)
    and `remembered` (multiaddresses of peers of an earlier run) are for the DHT's daemon.

    Raises BadRequest or Unreachable with the next step.
    """
    kind = registry_kind(spec)
    if kind == "none":
        return MemoryRegistry(model)
    if kind == "dht":
        from treeswarm.registry.dht import DhtRegistry  # noqa: PLC0415  # hivemind imports torch.

        return await DhtRegistry.start(model, parse_dht_peers(spec), listen, identity, remembered=remembered)
    if kind == "mqtt":
        from treeswarm.registry.mqtt import MqttRegistry  # noqa: PLC0415  # aiomqtt is an optional dependency.

        return await MqttRegistry.start(Broker.parse(spec), model, node)
    raise _no_place_to_announce(spec)


async def client_registry(spec: str, model: str | None, transport: Transport) -> Registry:
    """Open the registry in which a client looks for nodes.

    `model` is the config digest, or None for every model.  Raises BadRequest or Unreachable with the next step.
    """
    check_client_spec(spec)
    if registry_kind(spec) == "mqtt":
        from treeswarm.registry.mqtt import MqttRegistry  # noqa: PLC0415  # aiomqtt is an optional dependency.

        return await MqttRegistry.start(Broker.parse(spec), model)
    peers = peers_registry(spec, transport, model)
    await peers.start()
    return peers


def check_client_spec(spec: str) -> None:
    """Raise BadRequest with the next step if a client cannot use `spec`.  Nothing is connected or loaded."""
    kind = registry_kind(spec)
    if kind == "mqtt":
        Broker.parse(spec)
        require("mqtt", "a registry with MQTT")
    elif kind in ("static", "peers"):
        parse_addresses(spec.removeprefix("static:"))
    else:
        raise BadRequest(
            f"a client cannot read '{redacted(spec)}': give the join code or HOST:PORT of any node, which passes on "
            "all records that it knows from the DHT"
        )


def check_node_spec(spec: str) -> None:
    """Raise BadRequest with the next step if a node cannot announce itself in `spec`.  Nothing is connected."""
    kind = registry_kind(spec)
    if kind == "dht":
        parse_dht_peers(spec)
    elif kind == "mqtt":
        Broker.parse(spec)
        require("mqtt", "a registry with MQTT")
    elif kind == "peers":  # join codes and addresses of nodes, which say where the swarm meets
        parse_addresses(spec)
    elif kind != "none":
        raise _no_place_to_announce(spec)


def peers_registry(spec: str, transport: Transport, model: str | None) -> PeersRegistry:
    """Return a registry, not yet started, that asks nodes.  Raises BadRequest.

    `static:H:P,H:P` stands for exactly these nodes, `H:P,H:P` for these nodes and all that they know.
    """
    addresses = spec.removeprefix("static:")
    return PeersRegistry(model, transport=transport, addresses=parse_addresses(addresses), discover=addresses == spec)


def _no_place_to_announce(spec: str) -> BadRequest:
    return BadRequest(
        f"a node cannot announce itself in '{redacted(spec)}': give 'dht:', 'dht:ADDRESS', "
        "'mqtts://BROKER/NAMESPACE' or 'none'; lists of addresses are for clients"
    )
