"""The driver that a node offers with `--drive`: a client of its own swarm, in the same process."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from treeswarm.errors import ModelError
from treeswarm.model_files import HubOptions
from treeswarm.protocol.address import without_pin
from treeswarm.protocol.drive_messages import DriverKind
from treeswarm.transport.seam import Accept, Listener, Stream, StreamKind, Transport
from treeswarm_client.client import SwarmClient
from treeswarm_client.drafters.selection.automatic import DraftChoice
from treeswarm_client.drafters.selection.find_draft import FoundDraft, find_draft
from treeswarm_client.driving.choice import kind_of_draft
from treeswarm_client.driving.driver import DriverLimits, TextDriver
from treeswarm_node.config import ModelConfig, NodeConfig

# Seconds that a driver waits for missing blocks: its client can wait longer by itself, and says so to its user.
PATIENCE_S = 10.0


def find_kind(draft: str, folder: Path, model: ModelConfig) -> DriverKind:
    """Return what a driver announces that drafts as `draft` says, for the model in `folder`.

    `auto` takes what the tail proposes or a draft model that is on this machine, as it does for every client.
    """
    if draft != "auto":
        return kind_of_draft(DraftChoice(draft, "as named"))
    try:
        found = find_draft(folder, model.name, HubOptions(model.revision).for_another_model())
    except ModelError:  # of the tokenizer; the text driven first says so
        return DriverKind.TAIL
    return DriverKind.MODEL if isinstance(found, FoundDraft) else DriverKind.TAIL


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
    kind = find_kind(config.driving.draft, folder, model)
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
