"""From a config to a node that serves: load, prove, listen."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from treeswarm.errors import BadRequest
from treeswarm.identity import config_digest, weights_digest
from treeswarm.keys import Identity, read_swarm_key
from treeswarm.messages import NumericsClass
from treeswarm.model_files import read_config, read_shape, resolve_model
from treeswarm.spans import Span
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Transport
from treeswarm.transport.tls import Security
from treeswarm_node.config import NodeConfig
from treeswarm_node.device import Device
from treeswarm_node.engine import Engine
from treeswarm_node.loader import load_span
from treeswarm_node.node import Node, Served
from treeswarm_node.own_identity import own_identity
from treeswarm_node.proof import prove
from treeswarm_node.sampler import Sampler
from treeswarm_node.span_model import SpanModel


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

    def __str__(self) -> str:
        return (
            f"swarm-node {self.node} ready on {self.pinned}: blocks {self.blocks} of {self.of} of {self.model} "
            f"({self.dtype}, {self.device}, attention {self.attention}, {self.kv_tokens} KV rows)"
        )

    def as_dict(self) -> dict[str, Any]:
        return {"event": "ready", **asdict(self)}


@contextlib.asynccontextmanager
async def serving(config: NodeConfig) -> AsyncIterator[Ready]:
    """Serve until left; then every session's client is told and every room freed."""
    swarm_key = read_swarm_key(config.swarm_key) if config.swarm_key else None
    with own_identity(config.identity) as identity:
        model, served = await asyncio.to_thread(_load, config)
        async with _listening(config, Security(identity, swarm_key), model, served) as address:
            yield _ready(config, identity, address, served)


@contextlib.asynccontextmanager
async def _listening(config: NodeConfig, security: Security, model: SpanModel, served: Served) -> AsyncIterator[str]:
    transport: Transport = GrpcTransport(security=security)
    if config.emulate_link:
        transport = EmulatedTransport(transport, LinkShape.parse(config.emulate_link))
    engine = Engine(Device(model, Sampler(served.vocab_size)), config.limits.budget)
    node = Node(served, engine, model.store, transport, config.limits)
    running = asyncio.create_task(engine.run())
    try:
        listener = await transport.listen(config.listen, node.accept)
        try:
            yield listener.address
        finally:
            await node.close()
            await listener.close()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await transport.close()


def _load(config: NodeConfig) -> tuple[SpanModel, Served]:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    folder = resolve_model(config.model, weights=True, span=config.span)
    shape = read_shape(folder)
    span = config.span or Span(0, shape.blocks)
    with _progress() as progress:
        loaded = load_span(folder, span, getattr(torch, config.dtype), device, progress)
        weights = weights_digest(folder, read_config(folder), progress)
    model = SpanModel(loaded, config.kv_tokens)
    prove(model)
    served = Served(
        span=span,
        blocks=shape.blocks,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        max_positions=shape.max_positions,
        config=config_digest(read_config(folder)),
        numerics=NumericsClass(weights=weights, dtype=config.dtype),
        attention=model.attention_name,
        activation_bytes=shape.hidden_size * loaded.dtype.itemsize,
    )
    return model, served


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadRequest(
            f"device '{name}' cannot be used here ({str(error).splitlines()[0]}): try --device cpu"
        ) from None
    return device


def _ready(config: NodeConfig, identity: Identity, address: str, served: Served) -> Ready:
    return Ready(
        address=address,
        pinned=f"{address}#{identity.pin}",
        node=identity.node_id,
        pin=identity.pin,
        model=config.model,
        blocks=str(served.span),
        of=served.blocks,
        dtype=config.dtype,
        device=config.device,
        attention=served.attention,
        weights=served.numerics.weights,
        kv_tokens=config.kv_tokens,
    )
