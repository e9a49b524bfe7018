"""One control stream: a client, another node or the owner asks, the node answers."""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from treeswarm.errors import Refused, SwarmError, TransportError
from treeswarm.messages import (
    MAX_RECORDS,
    Close,
    Describe,
    DialBack,
    DialledBack,
    Fault,
    FaultCode,
    Hint,
    Manage,
    Managed,
    Open,
    Ping,
    Pong,
    Records,
    Rent,
    Resume,
    Watch,
)
from treeswarm.transport.address import Address
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_node.admission import host_of
from treeswarm_node.hosted import HostedSession
from treeswarm_node.membership import Membership

if TYPE_CHECKING:  # a node makes conversations
    from treeswarm_node.node import Node

# Things one stream may have under way: a client has a session or a few, each resumed once at a time.
ERRANDS = 64


@dataclass(eq=False)
class Conversation:
    """Answers until the stream ends.  What takes time runs beside it, so that a ping is answered at once."""

    node: "Node"
    stream: Stream
    _errands: set[asyncio.Task[None]] = field(default_factory=set)
    _watching: bool = False
    """Every watch keeps in mind what it has told, of every node."""

    async def run(self) -> None:
        """Until the stream ends; a stream that ends frees nothing: sessions live on for a lease."""
        try:
            while (message := await self.stream.receive()) is not None:
                await self._obey(message)
        except TransportError:
            pass
        finally:
            for errand in self._errands:
                errand.cancel()
            now = asyncio.get_running_loop().time()
            for hosted in self.node.sessions.values():
                if hosted.control is self.stream:
                    hosted.detached_at = now

    async def _obey(self, message: object) -> None:  # noqa: PLR0912  # one arm a message
        match message:
            case Ping(stamp, session):
                hosted = self._mine(session)
                progress = (hosted.session.received, hosted.passed_on, hosted.replayed) if hosted else (0, 0, 0)
                await self.stream.send(Pong(stamp, *progress))
            case Describe():
                await self.stream.send(self.node.describe())
            case Open():
                await self._open(message)
            case Resume():
                self._beside(self._resume(message))
            case Hint(session):
                if (hosted := self._mine(session)) is not None:
                    hosted.session.hint(message)
            case Close(session):
                if (hosted := self._mine(session)) is not None:
                    hosted.let_go()
            case Watch():
                if self._watching:
                    raise Refused("a stream watches once", FaultCode.TOO_MANY)
                self._watching = True
                self._beside(self._tell_records(everyone=message.everyone))
            case DialBack(address):
                self._beside(self._dial_back(address))
            case Manage():
                await self.stream.send(Managed(self._membership().manage(message)))
            case Rent():
                raise Refused("this node lends no ports", FaultCode.REFUSED)
            case _:
                raise Refused(f"{type(message).__name__} does not belong on a control stream", FaultCode.MALFORMED)

    def _mine(self, session: bytes) -> HostedSession | None:
        """None also for a session that has just failed: its fault is on the way."""
        hosted = self.node.sessions.get(session)
        return hosted if hosted is not None and hosted.control is self.stream else None

    async def _open(self, wanted: Open) -> None:
        try:
            hosted = await self.node.open(wanted, self.stream)
        except Refused as error:
            await self.stream.send(Fault(wanted.session, FaultCode(error.code), str(error), fatal=True))
        else:
            await hosted.grant()

    async def _resume(self, wanted: Resume) -> None:
        hosted = self.node.sessions.get(wanted.session)
        try:
            if hosted is None:
                name = wanted.session.hex()[:8]
                raise Refused(f"session {name} is not open here", FaultCode.UNKNOWN_SESSION)
            await hosted.resume(wanted, self.stream)
            self.node.resumed += 1
            await self.node.tell_links()
            await hosted.grant()
        except Refused as error:
            fault = Fault(wanted.session, FaultCode(error.code), str(error), fatal=True)
            with contextlib.suppress(TransportError):
                await self.stream.send(fault)
        except TransportError:
            pass

    async def _tell_records(self, *, everyone: bool) -> None:
        with contextlib.suppress(TransportError):
            async for news in self._membership().tell(everyone=everyone):
                for start in range(0, len(news), MAX_RECORDS):
                    await self.stream.send(Records(news[start : start + MAX_RECORDS]))

    async def _dial_back(self, address: str) -> None:
        answer = DialledBack(True, "")
        try:
            await self._check_own(Address.parse(address))
            there = await self.node.transport.connect(address, StreamKind.CONTROL)
            await there.end()
        except SwarmError as error:
            answer = DialledBack(False, str(error))
        with contextlib.suppress(TransportError):
            await self.stream.send(answer)

    async def _check_own(self, address: Address) -> None:
        """A node that dialled whatever it is told would be a stranger's port scanner.  Raises Refused."""
        host = host_of(self.stream.peer).strip("[]")
        with contextlib.suppress(OSError):
            found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port)
            if any(str(entry[4][0]) == host for entry in found):
                return
        raise Refused(f"{address} is not the address you come from ({host})", FaultCode.REFUSED)

    def _membership(self) -> Membership:
        if self.node.membership is None:
            raise Refused("this node keeps no records", FaultCode.REFUSED)
        return self.node.membership

    def _beside(self, errand: Coroutine[None, None, None]) -> None:
        if len(self._errands) >= ERRANDS:
            errand.close()
            raise Refused(f"{ERRANDS} things are under way on this stream: wait for some", FaultCode.TOO_MANY)
        task = asyncio.create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
