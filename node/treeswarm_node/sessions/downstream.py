"""Where a step's result goes: on to the next node, or back to the client."""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Refused, SwarmError
from treeswarm.protocol.messages import (
    Answer,
    Append,
    FaultCode,
    HopTiming,
    LinkHello,
    LinkWelcome,
    NextHop,
    no_alternatives,
)
from treeswarm.session.session import answered_ids
from treeswarm.session.steps import Step
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.engine.model_runner import Computed
from treeswarm_node.sessions.compression import by_size, packed

# A dead peer takes no goodbye; nobody waits for it longer.
GOODBYE_S = 1.0
# Opens a cold connection's window as far as most trees need it.  A home's uplink of 20 Mbit/s takes 26 ms for it,
# while the head computes the prompt.
MOST_WARM_UP = 1 << 16


class Downstream(Protocol):
    """Takes results in order."""

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None: ...
    async def replay(self, append: Append) -> None: ...
    async def end(self) -> None: ...


@dataclass(eq=False)
class ToClient:
    """The tail's: answers on the client's control stream."""

    session: bytes
    control: Stream

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None:
        assert computed.tokens is not None
        assert computed.logprobs is not None
        best = computed.alternatives
        await self.control.send(
            Answer(
                session=self.session,
                epoch=step.append.epoch,
                seq=step.append.seq,
                ids=answered_ids(step),
                tokens=computed.tokens.astype(np.uint32),
                logprobs=computed.logprobs,
                timings=timings,
                alternatives=no_alternatives() if best is None else best.astype(np.uint32),
            )
        )

    async def replay(self, append: Append) -> None:
        raise AssertionError("nobody is behind the tail")

    async def end(self) -> None:
        """The control stream is the client's to end."""


@dataclass(eq=False)
class ToNextNode:
    """Everyone else's: the same append with this node's activations, on a link of its own.

    Dialled as soon as it exists: the handshake is then over before the first result.
    """

    session: bytes
    epoch: int
    hop: NextHop
    transport: Transport
    warm_up: int
    """Bytes a tree will take on this link: so many go ahead, while the client still waits for the session to open."""
    broken: Callable[[SwarmError], None]
    """Called when the next hop ends the link."""
    value_bytes: int = 0
    """Of the values in rows that are packed on this link once the next hop said that it unpacks; 0: none are."""
    _link: asyncio.Task[Stream] = field(init=False)
    _unpacks: bool = False
    _watch: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._link = asyncio.create_task(self._dial())

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None:
        await self._send(replace(step.append, skipped=~step.computed, hidden=computed.hidden, timings=timings))

    async def replay(self, append: Append) -> None:
        await self._send(append)

    async def _send(self, append: Append) -> None:
        link = await asyncio.shield(self._link)
        if self._unpacks and append.hidden:
            append = await by_size(packed, append, self.value_bytes, len(append.hidden))
        await link.send(append)

    async def end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if not self._link.done():
            self._link.cancel()
        with contextlib.suppress(SwarmError, asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for((await self._link).end(), GOODBYE_S)

    async def _dial(self) -> Stream:
        try:
            link = await self.transport.connect(self.hop.address, StreamKind.LINK)
            warm_up = bytes(min(self.warm_up, MOST_WARM_UP))
            packs = self.value_bytes > 0
            await link.send(LinkHello(PROTOCOL_VERSION, self.session, self.epoch, self.hop.ticket, warm_up, packs))
        except SwarmError as error:
            self.broken(error)
            raise
        self._watch = asyncio.create_task(self._watch_end(link))
        return link

    async def _watch_end(self, link: Stream) -> None:
        try:
            said = await link.receive()
            if isinstance(said, LinkWelcome) and self.value_bytes:
                self._unpacks = said.unpacks
                said = await link.receive()
            if said is not None:
                raise Refused(f"the next node, {self.hop.address}, talks up its link unasked", FaultCode.MALFORMED)
            self.broken(LinkBroken(f"the next node, {self.hop.address}, closed its link"))
        except SwarmError as error:
            self.broken(error)
