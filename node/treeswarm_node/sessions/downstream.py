"""Send the results of steps onwards: to the next node, or to the client."""

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
    no_logprobs,
)
from treeswarm.session.session import answered_ids
from treeswarm.session.steps import Step
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.engine.model_runner import Computed
from treeswarm_node.sessions.compression import compress_rows, run_by_size

# A dead peer does not confirm the end of a stream, so this node waits no longer for it.
END_S = 1.0
# Opens a cold connection's window as far as most trees need it.  A home's uplink of 20 Mbit/s takes 26 ms for it,
# while the head computes the prompt.
MAX_WARM_UP = 1 << 16


class Downstream(Protocol):
    """The receiver of a session's results, which come in order."""

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None: ...
    async def replay(self, append: Append) -> None: ...
    async def end(self) -> None: ...


@dataclass(eq=False)
class ToClient:
    """The tail's downstream: it sends answers on the client's control stream."""

    session: bytes
    control: Stream

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None:
        assert computed.tokens is not None
        assert computed.logprobs is not None
        best, best_logprobs = computed.alternatives, computed.alternative_logprobs
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
                alternative_logprobs=no_logprobs() if best_logprobs is None else best_logprobs,
                scored=computed.scored,
            )
        )

    async def replay(self, append: Append) -> None:
        raise AssertionError("the tail has no next node to replay to")

    async def end(self) -> None:
        """Do nothing: the client ends the control stream."""


@dataclass(eq=False)
class ToNextNode:
    """The downstream of every node but the tail: the same append with this node's activations, on a link of its own.

    It dials as soon as it exists, so that the handshake is over before the first result.
    """

    session: bytes
    epoch: int
    hop: NextHop
    transport: Transport
    warm_up: int
    """Number of bytes that a tree takes on this link.  As many are sent ahead while the client still waits for the
    session to open."""
    on_broken: Callable[[SwarmError], None]
    """Called when the link cannot be opened, or when the next node ends it."""
    value_bytes: int = 0
    """Number of bytes per value of the rows to compress once the next node said that it decompresses; 0 for none."""
    _link: asyncio.Task[Stream] = field(init=False)
    _peer_decompresses: bool = False
    _watch: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._link = asyncio.create_task(self._dial())

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None:
        append = replace(step.append, skipped=~step.computed, hidden=computed.hidden, timings=timings)
        await self._send(replace(append, tap_sums=computed.tap_sums))

    async def replay(self, append: Append) -> None:
        await self._send(append)

    async def _send(self, append: Append) -> None:
        link = await asyncio.shield(self._link)
        if self._peer_decompresses and append.hidden:
            append = await run_by_size(compress_rows, append, self.value_bytes, len(append.hidden))
        await link.send(append)

    async def end(self) -> None:
        """End the link, or stop dialling."""
        if self._watch is not None:
            self._watch.cancel()
        if not self._link.done():
            self._link.cancel()
        with contextlib.suppress(SwarmError, asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for((await self._link).end(), END_S)

    async def _dial(self) -> Stream:
        try:
            link = await self.transport.connect(self.hop.address, StreamKind.LINK)
            warm_up = bytes(min(self.warm_up, MAX_WARM_UP))
            compresses = self.value_bytes > 0
            await link.send(LinkHello(PROTOCOL_VERSION, self.session, self.epoch, self.hop.ticket, warm_up, compresses))
        except SwarmError as error:
            self.on_broken(error)
            raise
        self._watch = asyncio.create_task(self._watch_link(link))
        return link

    async def _watch_link(self, link: Stream) -> None:
        """Take the next node's welcome, if one is due, and report the end of the link."""
        try:
            message = await link.receive()
            if isinstance(message, LinkWelcome) and self.value_bytes:
                self._peer_decompresses = message.unpacks
                message = await link.receive()
            if message is not None:
                raise Refused(
                    f"the next node, {self.hop.address}, sent an unexpected {type(message).__name__} up its link",
                    FaultCode.MALFORMED,
                )
            self.on_broken(LinkBroken(f"the next node, {self.hop.address}, closed its link"))
        except SwarmError as error:
            self.on_broken(error)
