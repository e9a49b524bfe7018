"""From a config to a node that serves: identity, registry, port, and a life in between."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from treeswarm.errors import BadRequest
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.progress import Progress
from treeswarm.protocol.address import Address
from treeswarm.protocol.records import NodeState
from treeswarm.registry import Registry, open_registry, registry_kind, shareable_spec
from treeswarm.registry.book import BookRegistry
from treeswarm.tasks import cancelled
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.rate_limit import RateLimiter
from treeswarm.transport.seam import Transport
from treeswarm.transport.tls import Security
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, choose_dtype, find_device
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.membership.distances import DistanceSurvey
from treeswarm_node.membership.identity_file import claim_identity, record_running
from treeswarm_node.model.attention_selection import check_attention_choice
from treeswarm_node.monitoring.collect import SnapshotCollector
from treeswarm_node.monitoring.prometheus import metrics_served
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.reachability.reachability import AddressMonitor
from treeswarm_node.schedule import keep_hours, until_within
from treeswarm_node.sessions.compression import LinkCompression
from treeswarm_node.sessions.server import NodeServer

log = logging.getLogger(__name__)

NEW_SWARM = "dht:"


@dataclass(frozen=True)
class Ready:
    """What the ready line says."""

    address: str
    pinned: str
    """The address with the pin, for clients that want nobody else."""
    node: str
    pin: str
    model: str
    blocks: str
    of: int
    dtype: str
    device: str
    attention: str
    weights: str
    kv_tokens: int
    rate: float
    join: str | None
    """What another node gives as `--registry`; None where there is no registry."""
    revision: str | None = None
    """Of a model on the hub, if not its main one."""
    metrics: str | None = None
    """Where Prometheus finds this node's figures."""

    def __str__(self) -> str:
        lines = [
            f"swarm-node {self.node} ready on {self.pinned}: blocks {self.blocks} of {self.of} of {self.model} "
            f"({self.dtype}, {self.device}, attention {self.attention}, {self.kv_tokens} KV rows)"
        ]
        model = f"{self.model} --revision {self.revision}" if self.revision else self.model
        if self.join:
            lines.append(f"  nodes join with:  swarm-node {model} --registry {self.join}")
        lines.append(f"  clients ask with: swarm generate PROMPT --model {model} --registry {self.pinned}")
        if self.metrics:
            lines.append(f"  Prometheus asks:  {self.metrics}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return {"event": "ready", **asdict(self)}


@dataclass(frozen=True, eq=False)
class Serving:
    """A node that serves: what it says of itself, its life, and its figures."""

    ready: Ready
    life: Lifecycle
    gauge: SnapshotCollector


@contextlib.asynccontextmanager
async def serving(config: NodeConfig, progress: Progress | None = None) -> AsyncIterator["Serving"]:
    """A node that serves; on leaving, its sessions are handed over and its record withdrawn.  `progress` hears how far
    loading is.  Outside its hours it waits for them first.  Cancelled while it waits or loads, it withdraws as well."""
    device = find_device(config.device.name)
    config = replace(config, model=replace(config.model, dtype=choose_dtype(config.model.dtype, device)))
    check_attention_choice(config.device.attention, device, getattr(torch, config.model.dtype))
    swarm_key = read_swarm_key(config.network.swarm_key) if config.network.swarm_key else None
    async with contextlib.AsyncExitStack() as stack:
        identity, kept_at = stack.enter_context(claim_identity(config.network.identity))
        model = await asyncio.to_thread(ModelInfo.find, config.model.name, config.model.revision)
        pace = RateLimiter(config.network.bandwidth) if config.network.bandwidth else None
        line = GrpcTransport(security=Security(identity, swarm_key), rate_limiter=pace)
        transport: Transport = line
        if config.network.emulate_link:
            transport = EmulatedTransport(transport, LinkShape.parse(config.network.emulate_link))
        stack.push_async_callback(transport.close)
        node = NodeServer(transport, config.limits)
        listener = await transport.listen(config.network.listen, node.accept)
        stack.push_async_callback(listener.close)
        node.sessions.compression = _packing(config, listener.address)
        node.port_lender = PortLender(Address.parse(config.network.listen).host, config.lending, rate_limiter=pace)
        registry = await _registry(config, model, identity)
        stack.push_async_callback(registry.close)
        life = Lifecycle(
            config, identity, model, node, _seen_from_outside(config, listener.address), DistanceSurvey(transport)
        )
        life.progress = progress
        assert isinstance(registry, BookRegistry)
        life.membership = node.membership = Membership(identity, life.make_record, registry, registry)
        gauge, metrics = SnapshotCollector(life, line), None
        if config.operations.metrics:
            metrics = await stack.enter_async_context(metrics_served(config.operations.metrics, gauge.read))
        if config.operations.hours:
            node.state = NodeState.PAUSED
            await until_within(config.operations.hours)
        stack.push_async_callback(life.leave)
        # What it joined with is not kept here: a paused node would keep the weights of its first span.
        await life.join()
        stack.enter_context(record_running(kept_at, f"{life.address.bare}#{identity.pin}"))
        monitor = AddressMonitor(
            transport,
            listening=listener.address,
            pin=identity.pin,
            lender_candidates=life.lender_candidates,
            on_address=life.settle,
            announced=config.network.announce,
            forwarded_ports=node.forwarded_ports,
            assumed=life.address.bare,
        )
        works = [node.sweep(), life.membership.run(), life.survey.run(life.neighbours), monitor.run()]
        if config.operations.hours:
            works.append(keep_hours(config.operations.hours, life.membership.orders))
        for work in works:
            stack.push_async_callback(cancelled, asyncio.create_task(work))
        yield Serving(_ready(config, life, registry, metrics), life, gauge)


async def _registry(config: NodeConfig, model: ModelInfo, identity: Identity) -> Registry:
    """The one asked for; else this node begins a swarm of its own, where the DHT is installed."""
    spec = config.network.registry or NEW_SWARM
    host = Address.parse(config.network.listen).host
    try:
        kind = "ip6" if ":" in host else "ip4"
        return await open_registry(spec, model.config, identity.node_id, listen=(f"/{kind}/{host}/tcp/0",))
    except BadRequest as error:
        if config.network.registry is not None:
            raise
        log.warning("%s; serving those who know this address", error)
        return await open_registry("none", model.config, identity.node_id)


def _seen_from_outside(config: NodeConfig, bound: str) -> Address:
    """Where others find this node: as its owner says, else as bound, a wildcard as this machine's way out."""
    address = Address.parse(bound)
    if config.network.announce:
        told = Address.parse(config.network.announce)
        return Address(told.host, told.port or address.port)
    if address.host in {"0.0.0.0", "::"}:
        return Address(_way_out(address.host), address.port)
    return address


def _packing(config: NodeConfig, bound: str) -> LinkCompression:
    shape = LinkShape.parse(config.network.emulate_link) if config.network.emulate_link else LinkShape()
    rates = [rate for rate in (config.network.bandwidth, shape.rate) if rate is not None]
    return LinkCompression(config.network.compression, min(rates, default=None), _seen_from_outside(config, bound).host)


def _way_out(wildcard: str) -> str:
    """This machine's address towards the internet; asks the routing table, sends nothing."""
    family, far = (socket.AF_INET6, "2001:db8::1") if ":" in wildcard else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((far, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if ":" in wildcard else "127.0.0.1"


def _ready(config: NodeConfig, life: Lifecycle, registry: Registry, metrics: str | None) -> Ready:
    stage = life.node.ready_stage()
    address, served = str(life.address.bare), stage.served
    return Ready(
        address=address,
        pinned=f"{address}#{life.identity.pin}",
        node=life.identity.node_id,
        pin=life.identity.pin,
        model=config.model.name,
        blocks=str(served.span),
        of=served.blocks,
        dtype=config.model.dtype,
        device=config.device.name,
        attention=served.attention,
        weights=served.numerics.weights,
        kv_tokens=config.device.kv_tokens,
        rate=stage.rate,
        join=_join_line(config, registry),
        revision=config.model.revision,
        metrics=metrics,
    )


def _join_line(config: NodeConfig, registry: Registry) -> str | None:
    if config.network.registry and registry_kind(config.network.registry) == "mqtt":
        return shareable_spec(config.network.registry)
    spec = getattr(registry, "spec", None)
    return str(spec) if spec else None
