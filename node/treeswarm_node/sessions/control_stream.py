"""One control stream: a client, another node or the owner sends requests, and this node answers them."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Protocol

from treeswarm.errors import Refused, SwarmError, TransportError
from treeswarm.protocol.drive_messages import Drive, DriverKind
from treeswarm.protocol.messages import (
    MAX_RECORDS,
    Close,
    Describe,
    Description,
    Fault,
    FaultCode,
    Hint,
    Open,
    Ping,
    Pong,
    Records,
    ReportLost,
    Resume,
    Watch,
)
from treeswarm.protocol.node_messages import DialBack, FindSwarm, LeasePort, Manage, Managed, SwarmFound
from treeswarm.protocol.version import check_version
from treeswarm.tasks import TaskSet
from treeswarm.transport.seam import Stream
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.reachability.dial_back import DialBackResponder
from treeswarm_node.reachability.port_lender import PortLender
from treeswarm_node.sessions.server_session import ServerSession
from treeswarm_node.sessions.session_table import SessionTable

log = logging.getLogger(__name__)

# Most requests of one stream that may be under way.  A client has one session or a few, each resumed once at a time.
MAX_TASKS = 64


class DrivesTexts(Protocol):
    """Runs the generation loop for clients."""

    @property
    def kind(self) -> DriverKind:
        """With what it drafts, as the node's record says."""
        ...

    @property
    def driven(self) -> int:
        """Number of texts driven since start."""
        ...

    async def drive(self, request: Drive, stream: Stream) -> None:
        """Drive one text and send its tokens on `stream`, until its end.  Cancelling ends it at once.

        Raises Refused with the reason if the text is not driven, and the SwarmErrors of generating.
        """
        ...


class NodeServices(Protocol):
    """What a node offers besides sessions.  A node listens before it has any of them, so all are read late."""

    membership: Membership | None
    port_lender: PortLender | None
    registry_spec: Callable[[], str] | None
    driver: DrivesTexts | None


@dataclass(eq=False)
class ControlStream:
    """Answers requests until the stream ends.

    Requests that take time run as tasks of their own, so that a ping is answered at once.
    """

    stream: Stream
    sessions: SessionTable
    open_session: Callable[[Open, Stream], Awaitable[ServerSession]]
    describe: Callable[[], Description]
    dial_back: DialBackResponder
    services: NodeServices
    _background_tasks: TaskSet = field(default_factory=TaskSet)
    _driving: dict[bytes, "asyncio.Task[None]"] = field(default_factory=dict)
    """Tasks that drive texts for this stream, by the id of the text."""
    _watching: bool = False
    """Whether the stream watches records.  It may watch once: every watch remembers the records of all nodes."""

    async def run(self) -> None:
        """Serve the stream until it ends.  That frees no session: sessions live on for a grace period."""
        try:
            while (message := await self.stream.receive()) is not None:
                await self._answer(message)
        except TransportError:
            pass
        finally:
            self._background_tasks.cancel()
            now = asyncio.get_running_loop().time()
            for session in self.sessions.values():
                if session.client.control is self.stream:
                    session.client.detached_at = now

    async def _answer(self, message: object) -> None:  # noqa: PLR0912  # one case per message
        match message:
            case Ping(stamp, session_id):
                session = self._find(session_id)
                await self.stream.send(Pong(stamp, *(session.progress if session else (0, 0, 0))))
            case Describe():
                await self.stream.send(self.describe())
            case Open():
                await self._open(message)
            case Resume():
                self._spawn(self._resume(message))
            case Hint(session_id):
                if (session := self._find(session_id)) is not None:
                    session.state.hint(message)
            case Close(session_id):
                if (session := self._find(session_id)) is not None:
                    session.begin_end()
                elif session_id in self._driving:
                    self._driving[session_id].cancel()
            case Watch():
                if self._watching:
                    raise Refused("this stream watches already: a stream watches once", FaultCode.TOO_MANY)
                self._watching = True
                if (membership := self.services.membership) is not None and membership.clocks is not None:
                    membership.clocks.compare_client(self.stream.peer, message.clock)
                self._spawn(self._send_records(everyone=message.everyone))
            case DialBack(address):
                self.dial_back.check_direct(self.stream.peer)
                self._spawn(self._dial_back(address))
            case Manage():
                await self.stream.send(Managed(self._require_membership().manage(message)))
            case ReportLost(nodes):
                for node in nodes:
                    self._require_membership().records.hint(node)
            case FindSwarm(version):
                check_version("the node that joins", version)
                await self.stream.send(SwarmFound(self._require_registry_spec()))
            case LeasePort():
                self._spawn(self._lend(message))
            case Drive():
                if message.text in self._driving:
                    raise Refused("this text is driven already: give each text an id of its own", FaultCode.REFUSED)
                driving = self._driving[message.text] = self._spawn(self._drive(message))
                # A task that is cancelled before it begins runs none of its own code.
                driving.add_done_callback(lambda _: self._driving.pop(message.text))
            case _:
                raise Refused(f"{type(message).__name__} does not belong on a control stream", FaultCode.MALFORMED)

    def _find(self, session_id: bytes) -> ServerSession | None:
        """Return the session if this stream controls it.

        A session that has just failed is not found either: its fault is on the way.
        """
        session = self.sessions.get(session_id)
        return session if session is not None and session.client.control is self.stream else None

    async def _open(self, request: Open) -> None:
        try:
            session = await self.open_session(request, self.stream)
        except Refused as error:
            await self.stream.send(Fault(request.session, FaultCode(error.code), str(error), fatal=True))
        else:
            await session.send_opened()

    async def _resume(self, request: Resume) -> None:
        try:
            session = await self.sessions.resume(request, self.stream)
            await session.send_opened()
        except Refused as error:
            await self._send_fault(Fault(request.session, FaultCode(error.code), str(error), fatal=True))
        except TransportError:
            pass

    async def _send_records(self, *, everyone: bool) -> None:
        with contextlib.suppress(TransportError):
            async for sealed in self._require_membership().watch_records(everyone=everyone):
                for start in range(0, len(sealed), MAX_RECORDS):
                    await self.stream.send(Records(sealed[start : start + MAX_RECORDS], int(time.time() * 1e6)))

    async def _dial_back(self, address: str) -> None:
        reply = await self.dial_back.dial(address, self.stream.peer)
        with contextlib.suppress(TransportError):
            await self.stream.send(reply)

    async def _lend(self, request: LeasePort) -> None:
        """Lend a port until the stream ends."""
        try:
            if self.services.port_lender is None:
                raise Refused("this node lends no ports: ask another", FaultCode.REFUSED)
            await self.services.port_lender.lend(request, self.stream)
        except SwarmError as error:
            await self.stream.end(error)

    async def _drive(self, request: Drive) -> None:
        """Drive a text; an error is told to the client, which can go on with the text by itself."""
        try:
            if self.services.driver is None:
                raise Refused("this node drives no texts: drive by yourself, or ask another", FaultCode.REFUSED)
            await self.services.driver.drive(request, self.stream)
        except SwarmError as error:
            code = FaultCode(error.code) if isinstance(error, Refused) else FaultCode.DOWNSTREAM
            await self._send_fault(Fault(request.text, code, str(error), fatal=True))
        except Exception:
            log.exception("driving a text failed unexpectedly")
            await self._send_fault(Fault(request.text, FaultCode.INTERNAL, "internal error", fatal=True))

    async def _send_fault(self, fault: Fault) -> None:
        with contextlib.suppress(TransportError):
            await self.stream.send(fault)

    def _require_membership(self) -> Membership:
        if self.services.membership is None:
            raise Refused("this node keeps no records", FaultCode.REFUSED)
        return self.services.membership

    def _require_registry_spec(self) -> str:
        if self.services.registry_spec is None:
            raise Refused("this node has yet to find its own swarm: try again in a moment", FaultCode.DRAINING)
        return self.services.registry_spec()

    def _spawn(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        if len(self._background_tasks) >= MAX_TASKS:
            work.close()
            raise Refused(
                f"{MAX_TASKS} requests are under way on this stream: wait until some are answered", FaultCode.TOO_MANY
            )
        return self._background_tasks.start(work)
