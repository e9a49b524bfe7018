"""The driver that a node offers with `--drive`: a client of its own swarm, in the same process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from treeswarm.model_files import HubOptions
from treeswarm.protocol.address import without_pin
from treeswarm.transport.seam import Accept, Listener, Stream, StreamKind, Transport
from treeswarm_client.client import SwarmClient
from treeswarm_client.driving.driver import DriverLimits, TextDriver, find_kind
from treeswarm_node.config import NodeConfig

# Seconds that a driver waits for missing blocks: its client can wait longer by itself, and says so to its user.
PATIENCE_S = 10.0


def make_driver(config: NodeConfig, folder: Path, transport: Transport, local: str) -> TextDriver:
    """Return the driver of a node that hosts the model in `folder`; blocks for a moment.

    `local` is the node's address on this machine, with its pin.  `transport` is not closed with the driver, which is of
    the node's own numerics class.
    """
    model = config.model
    client = partial(
        SwarmClient,
        model=model.name,
        registry=local,
        draft=config.driving.draft,
        drive="self",
        transport=transport,
        dtype=model.dtype,
        quantization=model.quantization,
        patience=PATIENCE_S,
        hub=HubOptions(model.revision),
        concurrency=config.driving.texts,
    )
    kind = find_kind(config.driving.draft, folder, model.name, HubOptions(model.revision).for_another_model())
    return TextDriver(client, DriverLimits(config.driving.texts), kind)


@dataclass(eq=False)
class ShortWay:
    """A transport that dials the node itself on this machine, where its public address may lead nowhere."""

    inner: Transport
    direct: Transport
    """Transport for the node itself: without an emulated link, which it has none of."""
    public: Callable[[], str]
    """Returns the address at which others find the node."""
    local: str
    """Address of the node on this machine, with its pin."""

    async def connect(self, address: str, kind: StreamKind) -> Stream:
        is_own = without_pin(address) in (without_pin(self.public()), without_pin(self.local))
        return await (self.direct.connect(self.local, kind) if is_own else self.inner.connect(address, kind))

    async def listen(self, address: str, accept: Accept) -> Listener:
        return await self.inner.listen(address, accept)

    async def close(self) -> None:
        """Close nothing: both transports are the node's."""
