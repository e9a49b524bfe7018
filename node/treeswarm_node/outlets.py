"""Where a step's result goes: on to the next node, or back to the client."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, SwarmError
from treeswarm.messages import Answer, HopTiming, LinkHello, NextHop, Open
from treeswarm.session import answered_ids
from treeswarm.steps import Step
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.device import Computed


class Outlet(Protocol):
    """Takes results in order."""

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None: ...
    async def end(self) -> None: ...


@dataclass(eq=False)
class ToClient:
    """The tail's: answers on the client's control stream."""

    opened: Open
    control: Stream

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None:
        assert computed.tokens is not None
        assert computed.logprobs is not None
        await self.control.send(
            Answer(
                session=self.opened.session,
                epoch=self.opened.epoch,
                seq=step.append.seq,
                ids=answered_ids(step),
                tokens=computed.tokens.astype(np.uint32),
                logprobs=computed.logprobs,
                timings=timings,
            )
        )

    async def end(self) -> None:
        """The control stream is the client's to end."""


@dataclass(eq=False)
class ToNextHop:
    """Everyone else's: the same append with this node's activations, on a link dialled at the first result,
    when the client has opened the session everywhere."""

    opened: Open
    hop: NextHop
    transport: Transport
    broken: Callable[[SwarmError], None]
    """Called when the next hop ends the link."""
    _link: Stream | None = None
    _watch: asyncio.Task[None] | None = None

    async def send(self, step: Step, computed: Computed, timings: tuple[HopTiming, ...]) -> None:
        if self._link is None:
            self._link = await self.transport.connect(self.hop.address, StreamKind.LINK)
            self._watch = asyncio.create_task(self._watch_end(self._link))
            await self._link.send(LinkHello(PROTOCOL_VERSION, self.opened.session, self.opened.epoch, self.hop.ticket))
        await self._link.send(replace(step.append, skipped=~step.computed, hidden=computed.hidden, timings=timings))

    async def end(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        if self._link is not None:
            await self._link.end()

    async def _watch_end(self, link: Stream) -> None:
        try:
            await link.receive()
            self.broken(LinkBroken(f"the next node, {self.hop.address}, closed its link"))
        except SwarmError as error:
            self.broken(error)
