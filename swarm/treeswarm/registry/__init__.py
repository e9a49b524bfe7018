"""Registries: one interface to the records of a swarm's nodes, and the functions that open its implementations."""

from collections.abc import Sequence
from pathlib import Path

from treeswarm.errors import BadRequest
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
    raise BadRequest(
        f"a node cannot announce itself in '{redacted(spec)}': give 'dht:', 'dht:ADDRESS', "
        "'mqtts://BROKER/NAMESPACE' or 'none'; lists of addresses are for clients"
    )


async def client_registry(spec: str, model: str | None, transport: Transport) -> Registry:
    """Open the registry in which a client looks for nodes.

    `model` is the config digest, or None for every model.  Raises BadRequest or Unreachable with the next step.
    """
    kind = registry_kind(spec)
    if kind == "mqtt":
        from treeswarm.registry.mqtt import MqttRegistry  # noqa: PLC0415  # aiomqtt is an optional dependency.

        return await MqttRegistry.start(Broker.parse(spec), model)
    if kind in ("static", "peers"):
        peers = peers_registry(spec, transport, model)
        await peers.start()
        return peers
    raise BadRequest(
        f"a client cannot read '{redacted(spec)}': give the join code or HOST:PORT of any node, which passes on all "
        "records that it knows from the DHT"
    )


def peers_registry(spec: str, transport: Transport, model: str | None) -> PeersRegistry:
    """Return a registry, not yet started, that asks nodes.  Raises BadRequest.

    `static:H:P,H:P` stands for exactly these nodes, `H:P,H:P` for these nodes and all that they know.
    """
    addresses = spec.removeprefix("static:")
    return PeersRegistry(model, transport=transport, addresses=parse_addresses(addresses), discover=addresses == spec)
