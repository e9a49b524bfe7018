"""One control stream: a client, another node or the owner asks, the node answers."""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from typing import Protocol

from treeswarm.errors import Refused, SwarmError, TransportError
from treeswarm.protocol.address import Address, host_of, port_of
from treeswarm.protocol.messages import (
    MAX_RECORDS,
    Close,
    Describe,
    Description,
    DialBack,
    DialledBack,
    Fault,
    FaultCode,
    Hint,
    LeasePort,
    Manage,
    Managed,
    Open,
    Ping,
    Pong,
    Records,
    Resume,
    Watch,
)
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.sessions.server_session import ServerSession

# Things one stream may have under way: a client has a session or a few, each resumed once at a time.
ERRANDS = 64
# Who asks to be dialled there means whatever host it is seen to come from.
ANY_HOST = ("0.0.0.0", "::")


class Host(Protocol):
    """What a conversation needs of its node."""

    transport: Transport
    membership: Membership | None
    port_lender: PortLender | None
    forwarded_ports: set[int]
    sessions: dict[bytes, ServerSession]
    resumed: int

    def describe(self) -> Description: ...
    async def open(self, wanted: Open, control: Stream) -> ServerSession: ...
    async def tell_links(self) -> None: ...


@dataclass(eq=False)
class ControlStream:
    """Answers until the stream ends.  What takes time runs beside it, so that a ping is answered at once."""

    node: Host
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
                self._check_direct()
                self._beside(self._dial_back(address))
            case Manage():
                await self.stream.send(Managed(self._membership().manage(message)))
            case LeasePort():
                self._beside(self._lend(message))
            case _:
                raise Refused(f"{type(message).__name__} does not belong on a control stream", FaultCode.MALFORMED)

    def _mine(self, session: bytes) -> ServerSession | None:
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

    def _check_direct(self) -> None:
        """Whoever comes through a rented port has this machine's own address, and could have its ports dialled."""
        if port_of(self.stream.peer) in self.node.forwarded_ports:
            raise Refused("your address cannot be seen from here: ask another node", FaultCode.REFUSED)

    async def _dial_back(self, asked: str) -> None:
        try:
            address = await self._own_address(Address.parse(asked))
            there = await self.node.transport.connect(str(address), StreamKind.CONTROL)
            await there.end()
            answer = DialledBack(True, address.bare)
        except SwarmError as error:
            answer = DialledBack(False, str(error))
        with contextlib.suppress(TransportError):
            await self.stream.send(answer)

    async def _own_address(self, address: Address) -> Address:
        """A node that dialled whatever it is told would be a stranger's port scanner.  Raises Refused."""
        host = host_of(self.stream.peer).strip("[]")
        if address.host in ANY_HOST:
            return replace(address, host=host)
        with contextlib.suppress(OSError):
            found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port)
            if any(str(entry[4][0]) == host for entry in found):
                return address
        raise Refused(f"{address} is not the address you come from ({host})", FaultCode.REFUSED)

    async def _lend(self, wanted: LeasePort) -> None:
        """Ends with the stream, and the tenancy with it."""
        try:
            if self.node.port_lender is None:
                raise Refused("this node lends no ports: ask another", FaultCode.REFUSED)
            await self.node.port_lender.lend(wanted, self.stream)
        except SwarmError as error:
            await self.stream.end(error)

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
