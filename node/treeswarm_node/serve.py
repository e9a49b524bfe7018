"""Build a running node from its settings: identity, transport, registry, lifecycle, metrics."""

import asyncio
import contextlib
import logging
import socket
import textwrap
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from treeswarm.keys import key_marker, read_swarm_key
from treeswarm.model_files import read_config
from treeswarm.programs.devices import checkpoint_dtype
from treeswarm.programs.units import format_bytes
from treeswarm.progress import Progress
from treeswarm.protocol.address import Address, is_loopback
from treeswarm.protocol.records import NodeState, speculator_words
from treeswarm.registry.book import BookRegistry
from treeswarm.tasks import cancelled, keep_running
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.rate_limit import RateLimiter
from treeswarm.transport.seam import Transport
from treeswarm.transport.tls import Security
from treeswarm_node.config import NetworkConfig, NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, find_device
from treeswarm_node.joining import OpenedRegistry, begin_run, check_admission, listen_address, open_own_registry
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.membership.clock_watch import ClockWatch
from treeswarm_node.membership.distances import DistanceSurvey
from treeswarm_node.membership.identity_file import claim_identity, dht_key_file, record_running
from treeswarm_node.membership.last_run import RunRecorder, read_last_run
from treeswarm_node.model.attention_selection import check_attention_choice
from treeswarm_node.model.automatic import this_machine, with_device, with_numerics
from treeswarm_node.monitoring.collect import SnapshotCollector
from treeswarm_node.monitoring.prometheus import serve_metrics
from treeswarm_node.own_record import OwnRecord
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.reachability.reachability import AddressMonitor, Basis, PublicAddress, local_address
from treeswarm_node.schedule import follow_schedule, wait_until_within
from treeswarm_node.sessions.compression import LinkCompression
from treeswarm_node.sessions.server import NodeServer

log = logging.getLogger(__name__)

# What a terminal shows in one line, and where the facts of the ready line begin.
SCREEN, INDENT = 80, 20


@dataclass(frozen=True)
class HostedModel:
    """What the ready line says of the model, the hosted blocks, and how they are computed."""

    model: str
    blocks: str
    """Blocks hosted, as `start:end`."""
    of: int
    """Number of blocks of the whole model."""
    dtype: str
    device: str
    attention: str
    """Name of the attention implementation."""
    weights: str
    """Digest of the weights."""
    kv_tokens: int
    """Number of tokens in the KV cache."""
    kv_row_bytes: int
    """Number of bytes per token in the KV cache, of all hosted blocks together."""
    rate: float
    """Block-rows per second, as measured."""
    automatic: str | None = None
    """Reasons of the automatic choices of device and dtype, or None if the owner made both."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub, or None for the main branch."""
    quantization: str = "none"
    """Kind in which this node has packed the weights, or `none`."""
    holds_codes: bool = False
    """Whether weights are held in the bits in which they were published, and expanded where they are used."""
    speculator: str | None = None
    """Kind of the speculator that proposes trees, or None if there is none."""
    agreement: float | None = None
    """Share of held-out tokens that its first guess names, or None if that is not known."""

    @property
    def numbers(self) -> str:
        """The dtype, and how weights are held, in words."""
        packed = "" if self.quantization == "none" else f", weights in {self.quantization}"
        return f"{self.dtype}{packed}{', weights as published' if self.holds_codes else ''}"


@dataclass(frozen=True)
class Ready:
    """What the ready line says."""

    node: str
    """The node's id."""
    address: str
    """Address at which others reach the node, without a pin."""
    pin: str
    hosted: HostedModel
    code: str
    """Join code: what clients, and nodes unless `join` is another, give as `--registry`."""
    join: str | None
    """What another node gives as `--registry` to join, or None if there is no registry."""
    registry: str | None
    """Long form of the registry, with the addresses of this node's DHT peer, or None if there is no registry."""
    private: bool
    """Whether this is a private swarm."""
    metrics: str | None = None
    """URL of the Prometheus metrics, or None if they are not served."""
    ports: str = ""
    """Ports that a firewall must let in."""

    @property
    def pinned(self) -> str:
        """The address with the pin, for clients that accept no other node there."""
        return f"{self.address}#{self.pin}"

    def __str__(self) -> str:
        hosted = self.hosted
        lines = [
            f"swarm-node ready on {self.address}",
            f"  blocks:           {hosted.blocks} of {hosted.of} of {hosted.model}",
            f"  computes:         on {hosted.device} in {hosted.numbers}, attention {hosted.attention}",
            f"  KV cache:         {hosted.kv_tokens} tokens of {format_bytes(hosted.kv_row_bytes)}",
            f"  identity:         {self.node}",
            f"  pin:              {self.pin}",
        ]
        if hosted.speculator:
            lines.insert(4, f"  proposes trees:   {speculator_words(hosted.speculator, hosted.agreement or 0.0)}")
        if hosted.automatic:
            why = textwrap.wrap(f"auto: {hosted.automatic}", SCREEN - INDENT)
            lines[3:3] = [" " * INDENT + line for line in why]
        model = f"{hosted.model} --revision {hosted.revision}" if hosted.revision else hosted.model
        key = " --swarm-key FILE" if self.private else ""
        lines.append(f"  join code:        {self.code}")
        if self.join:
            lines.append(f"  nodes join with:  swarm-node {model} --registry {self.join}{key}")
        lines.append(f"  clients ask with: swarm generate PROMPT --model {model} --registry {self.code}{key}")
        if key:
            lines.append("  FILE is the swarm's key file: give it to them, as the code does not hold it")
        if self.ports and not is_loopback(Address.parse(self.address).host):
            lines.append(f"  ports to open:    {self.ports} (TCP)")
        if self.metrics:
            lines.append(f"  Prometheus asks:  {self.metrics}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return the line as one flat JSON object, whose keys are a promise to programs."""
        return {
            "event": "ready",
            "address": self.address,
            "pinned": self.pinned,
            "node": self.node,
            "pin": self.pin,
            **asdict(self.hosted),
            "code": self.code,
            "join": self.join,
            "registry": self.registry,
            "private": self.private,
            "metrics": self.metrics,
        }


@dataclass(frozen=True, eq=False)
class RunningNode:
    """A node that serves: its ready line, its lifecycle and its figures."""

    ready: Ready
    lifecycle: Lifecycle
    collector: SnapshotCollector


@contextlib.asynccontextmanager
async def run_node(config: NodeConfig, progress: Progress | None = None) -> AsyncIterator[RunningNode]:
    """Start a node, and yield it once it serves; on leaving, hand over its sessions and withdraw its record.

    `progress` receives how far loading is.  Outside the node's hours, wait for them first.  If this is cancelled while
    it waits or loads, the record is withdrawn as well.  Raises BadRequest, ModelError.
    """
    config = with_device(config, this_machine())
    device = find_device(config.device.name)
    network, hours = config.network, config.operations.hours
    swarm_key = read_swarm_key(network.swarm_key) if network.swarm_key else None
    async with contextlib.AsyncExitStack() as stack:
        claim = claim_identity(network.identity, config.model.name, Address.parse(network.listen).port)
        identity, identity_path = stack.enter_context(claim)
        last_run = read_last_run(identity_path)
        model = await asyncio.to_thread(ModelInfo.find, config.model.name, config.model.revision, progress)
        rate_limiter = RateLimiter(network.bandwidth) if network.bandwidth else None
        grpc, transport = _make_transports(network, Security(identity, swarm_key), rate_limiter)
        stack.push_async_callback(transport.close)
        node = NodeServer(transport, config.limits)
        listener = await transport.listen(listen_address(network, last_run), node.accept)
        stack.push_async_callback(listener.close)
        address = _assumed_address(network, listener.address)
        node.sessions.compression = _link_compression(network, address)
        node.port_lender = PortLender(Address.parse(network.listen).host, config.lending, rate_limiter=rate_limiter)
        marker = key_marker(swarm_key)
        opened = await open_own_registry(
            network, model.config_digest, identity.node_id, dht_key_file(identity_path), last_run, marker, transport
        )
        registry, node.registry_spec = opened.registry, opened.shared_spec
        stack.push_async_callback(registry.close)
        assert isinstance(registry, BookRegistry)
        config = await _with_swarm_numerics(config, device, model, registry, identity.node_id)
        recorder = RunRecorder(
            identity_path, begin_run(config, listener.address, marker, last_run), registry, identity.node_id
        )
        # Not before: a start with a wrong key would forget the peers of the last run.
        await check_admission(transport, opened, identity.node_id)
        recorder.write()
        public = PublicAddress(str(address), Basis.ASSUMED, False)
        record = OwnRecord(config, identity, model, node, DistanceSurvey(transport), public)
        membership = node.membership = Membership(identity, record.make, registry, registry)
        clocks = membership.clocks = ClockWatch(registry, identity.node_id, on_step=membership.announce_at_once)
        lifecycle = Lifecycle(record, membership, progress)
        collector, metrics = SnapshotCollector(lifecycle, grpc), None
        if config.operations.metrics:
            metrics = await stack.enter_async_context(serve_metrics(config.operations.metrics, collector.read))
        if hours:
            node.state = NodeState.PAUSED
            await wait_until_within(hours)
        # The clock is compared before the node joins: a wrong one is why others refuse its first record.
        stack.push_async_callback(cancelled, asyncio.create_task(keep_running("comparing clocks", clocks.run)))
        stack.push_async_callback(lifecycle.leave)
        # Ended before the node leaves: its texts go on elsewhere.
        await stack.enter_async_context(_driving(record, grpc, f"{local_address(listener.address)}#{identity.pin}"))
        # The stage that it joins with is not kept here: a paused node would keep the weights of its first span.
        await lifecycle.join()
        stack.enter_context(record_running(identity_path, f"{local_address(listener.address)}#{identity.pin}"))
        monitor = AddressMonitor(
            transport,
            listening=listener.address,
            pin=identity.pin,
            lender_candidates=lifecycle.lender_candidates,
            on_address=partial(_take_address, lifecycle, marker),
            announced=network.announce,
            forwarded_ports=node.forwarded_ports,
            assumed=record.address.bare,
        )
        background: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "ending idle sessions": node.sweep,
            "announcing": membership.run,
            "measuring distances": partial(record.survey.run, lifecycle.neighbours),
            "finding the public address": monitor.run,
            "remembering neighbours": recorder.run,
            "probing neighbours": lifecycle.liveness.run,
        }
        if hours:
            background["following the hours"] = partial(follow_schedule, hours, membership.orders)
        for what, work in background.items():
            stack.push_async_callback(cancelled, asyncio.create_task(keep_running(what, work)))
        yield RunningNode(_describe_ready(record, opened, marker, metrics), lifecycle, collector)


@contextlib.asynccontextmanager
async def _driving(record: OwnRecord, direct: Transport, local: str) -> AsyncIterator[None]:
    """Have the node drive texts within the context, if its owner offers that.

    `direct` dials without an emulated link; `local` is the node's address on this machine, with its pin.
    """
    if not record.config.driving.offered:
        yield
        return
    # Imported here, because a node that drives nothing needs no client.
    from treeswarm_node.driving import ShortWay, make_driver  # noqa: PLC0415

    transport = ShortWay(record.node.transport, direct, lambda: record.public.address, local)
    driver = await asyncio.to_thread(make_driver, record.config, record.model.folder, transport, local)
    record.node.driver = driver
    closing = asyncio.create_task(keep_running("closing the idle driver", driver.run))
    try:
        yield
    finally:
        record.node.driver = None
        await cancelled(closing)
        await driver.close()


async def _take_address(lifecycle: Lifecycle, marker: str, public: PublicAddress) -> None:
    """Announce another public address, and tell the owner the join code that is valid from now on."""
    earlier = lifecycle.record.join_code(marker)
    await lifecycle.set_public_address(public)
    if (code := lifecycle.record.join_code(marker)) != earlier:
        log.warning("others reach this node at %s: its join code is now %s", public.address, code)


async def _with_swarm_numerics(
    config: NodeConfig, device: torch.device, model: ModelInfo, registry: BookRegistry, node_id: str
) -> NodeConfig:
    """Fill in the numbers that are left to `auto`, from the records of the other nodes.  Raises BadRequest."""
    records = [sealed.record for sealed in await registry.snapshot()]
    swarm = [record.numerics for record in records if record.model == model.config_digest and record.node != node_id]
    config = with_numerics(config, this_machine(), checkpoint_dtype(read_config(model.folder)), swarm)
    check_attention_choice(config.device.attention, device, getattr(torch, config.model.dtype))
    return config


def _make_transports(
    network: NetworkConfig, security: Security, rate_limiter: RateLimiter | None
) -> tuple[GrpcTransport, Transport]:
    """Return the gRPC transport, and the transport to use: that one, or that one behind an emulated link."""
    grpc = GrpcTransport(security=security, rate_limiter=rate_limiter)
    if not network.emulate_link:
        return grpc, grpc
    return grpc, EmulatedTransport(grpc, LinkShape.parse(network.emulate_link))


def _assumed_address(network: NetworkConfig, bound: str) -> Address:
    """Return where others should find this node: as announced, else as bound, with a wildcard replaced."""
    address = Address.parse(bound)
    if network.announce:
        announced = Address.parse(network.announce)
        return Address(announced.host, announced.port or address.port)
    if address.host in {"0.0.0.0", "::"}:
        return Address(_outgoing_host(address.host), address.port)
    return address


def _link_compression(network: NetworkConfig, address: Address) -> LinkCompression:
    shape = LinkShape.parse(network.emulate_link) if network.emulate_link else LinkShape()
    rates = [rate for rate in (network.bandwidth, shape.rate) if rate is not None]
    return LinkCompression(network.compression, min(rates, default=None), address.host)


def _outgoing_host(wildcard: str) -> str:
    """Return this machine's address towards the internet, from the routing table and without sending anything."""
    family, remote = (socket.AF_INET6, "2001:db8::1") if ":" in wildcard else (socket.AF_INET, "192.0.2.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((remote, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if ":" in wildcard else "127.0.0.1"


def _describe_ready(record: OwnRecord, opened: OpenedRegistry, marker: str, metrics: str | None) -> Ready:
    config, stage = record.config, record.node.ready_stage()
    served, code = stage.served, record.join_code(marker)
    dht_port = getattr(opened.registry, "port", None)
    return Ready(
        node=record.identity.node_id,
        address=str(record.address.bare),
        pin=record.identity.pin,
        hosted=HostedModel(
            model=config.model.name,
            blocks=str(served.span),
            of=served.blocks,
            dtype=config.model.dtype,
            device=config.device.name,
            attention=served.attention,
            weights=served.numerics.weights,
            kv_tokens=config.device.kv_tokens,
            kv_row_bytes=stage.store.row_bytes,
            rate=stage.rate,
            automatic=", ".join(filter(None, (config.automatic.device, config.automatic.numerics))) or None,
            revision=config.model.revision,
            quantization=served.numerics.quantization,
            holds_codes=stage.holds_codes,
            speculator=(stage.speculator.name or None) if stage.speculator is not None else None,
            agreement=(stage.speculator.agreement or None) if stage.speculator is not None else None,
        ),
        code=code,
        join=opened.join_spec(code),
        registry=opened.shared_spec() or None,
        private=bool(marker),
        metrics=metrics,
        ports=f"{record.address.port}, and {dht_port} for the DHT" if dht_port else str(record.address.port),
    )
