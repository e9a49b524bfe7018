"""A session on a chain of nodes: control streams to all, appends to the head, answers from the tail."""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Malformed, NodeLost, Refused, SwarmError, TransportError
from treeswarm.messages import (
    SESSION_ID_BYTES,
    TICKET_BYTES,
    Answer,
    Append,
    Close,
    Describe,
    Description,
    Fault,
    FaultCode,
    LinkHello,
    Message,
    NextHop,
    Open,
    Opened,
    Ping,
    Pong,
)
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm_client.route import Hop, Route

PING_EVERY_S = 1.0
# A node answers pings from its event loop even while its device computes.  Ten seconds of silence were never seen
# from a living one, with three nodes and a training run on two cores.
SILENCE_S = 10.0
OPEN_S = 20.0
# A frame unanswered for so long is lost: the longest a forward of a full budget may take on a slow CPU, several times.
ANSWER_S = 120.0


async def describe(transport: Transport, address: str) -> Description:
    """Ask one node what it serves.  Raises Unreachable, LinkBroken, Refused, Malformed."""
    stream = await transport.connect(address, StreamKind.CONTROL)
    try:
        await stream.send(Describe(PROTOCOL_VERSION))
        answer = await asyncio.wait_for(stream.receive(), OPEN_S)
    except TimeoutError:
        raise NodeLost(f"{address} accepted the connection and then said nothing", address) from None
    finally:
        await stream.end()
    if not isinstance(answer, Description):
        raise Malformed(f"{address} did not describe itself: is it a swarm-node?")
    if answer.version != PROTOCOL_VERSION:
        raise Refused(
            f"{address} speaks protocol {answer.version} ({answer.software}), this client {PROTOCOL_VERSION}: "
            "install the same release on both",
            FaultCode.WRONG_VERSION,
        )
    return answer


@dataclass(eq=False)
class Chain:
    """One open session.  Use `open_chain`."""

    route: Route
    session: bytes
    controls: dict[str, Stream]
    link: Stream
    credit_rows: int
    epoch: int
    _answers: dict[int, asyncio.Future[Answer]] = field(default_factory=dict)
    _failure: SwarmError | None = None
    _failed: asyncio.Event = field(default_factory=asyncio.Event)
    _heard: dict[str, float] = field(default_factory=dict)
    _room: asyncio.Condition = field(default_factory=asyncio.Condition)
    _in_flight: dict[int, int] = field(default_factory=dict)
    """Rows by sequence number."""
    _moved: float = 0.0
    """When the chain last took or answered a frame."""

    async def append(self, append: Append) -> asyncio.Future[Answer]:
        """Ship one append as soon as credit allows; the future holds its answer.  Raises what broke the session."""
        async with self._room:
            await self._room.wait_for(
                lambda: self._failure or sum(self._in_flight.values()) + append.rows <= self.credit_rows
            )
        self._raise_failure()
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[append.seq] = answer
        self._in_flight[append.seq] = append.rows
        self._moved = asyncio.get_running_loop().time()
        try:
            await self.link.send(append)
        except SwarmError as error:
            await self._fail(
                error if isinstance(error, Refused) else self._lost(self.route.hops[0].address, str(error))
            )
            self._raise_failure()
        return answer

    async def watch(self) -> None:
        """Read every control stream and keep asking for signs of life, until the session fails or is closed."""
        loop = asyncio.get_running_loop()
        self._heard = dict.fromkeys(self.controls, loop.time())
        async with asyncio.TaskGroup() as tasks:
            for address, control in self.controls.items():
                tasks.create_task(self._listen(address, control))
                tasks.create_task(self._ping(address, control))

    async def close(self) -> None:
        """Free the session on every node that still listens."""
        for control in self.controls.values():
            with contextlib.suppress(SwarmError):
                await control.send(Close(self.session))
        for stream in (self.link, *self.controls.values()):
            await stream.end()

    async def _listen(self, address: str, control: Stream) -> None:
        try:
            while (message := await control.receive()) is not None:
                self._heard[address] = asyncio.get_running_loop().time()
                await self._take(address, message)
            await self._fail(self._lost(address, "it ended the session"))
        except TransportError as error:
            await self._fail(self._lost(address, str(error)))
        except SwarmError as error:
            await self._fail(error)

    async def _ping(self, address: str, control: Stream) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(SwarmError):
            while not self._failed.is_set():
                await control.send(Ping(int(loop.time() * 1e6)))
                await asyncio.sleep(PING_EVERY_S)
                silence = loop.time() - self._heard[address]
                if silence > SILENCE_S:
                    await self._fail(self._lost(address, f"nothing heard for {silence:.0f} s"))
                if self._in_flight and loop.time() - self._moved > ANSWER_S:
                    await self._fail(
                        LinkBroken(
                            f"no answer for {ANSWER_S:.0f} s, though every node is alive: a frame was lost on the way"
                        )
                    )

    async def _take(self, address: str, message: Message) -> None:
        match message:
            case Answer():
                await self._answered(address, message)
            case Fault(code=FaultCode.REPLAYED):
                pass  # a doubled frame, ignored by the node: nothing was lost
            case Fault(session, code, text) if session == self.session:
                await self._fail(self._fault(address, code, text))
            case Pong() | Opened() | Fault():
                pass
            case _:
                await self._fail(Malformed(f"{address} sent a {type(message).__name__} into a session"))

    async def _answered(self, address: str, answer: Answer) -> None:
        if answer.session != self.session or answer.epoch != self.epoch:
            return
        waiting = self._answers.pop(answer.seq, None)
        if waiting is None:
            await self._fail(Malformed(f"{address} answered append {answer.seq}, which waits for no answer"))
            return
        if answer.tokens.size and int(answer.tokens.max()) >= self.route.vocab_size:
            await self._fail(Malformed(f"{address} answered a token outside the vocabulary"))
            return
        self._moved = asyncio.get_running_loop().time()
        if not waiting.cancelled():
            waiting.set_result(answer)
        async with self._room:
            self._in_flight.pop(answer.seq, None)
            self._room.notify_all()

    def _fault(self, address: str, code: FaultCode, text: str) -> SwarmError:
        if code == FaultCode.DOWNSTREAM:
            after = self._next_address(address)
            return self._lost(after, f"{address} cannot reach it: {text}")
        return Refused(f"{address} refused: {text}", code)

    def _lost(self, address: str, why: str) -> NodeLost:
        hop = next(hop for hop in self.route.hops if hop.address == address)
        return NodeLost(f"lost the node {address} with blocks {hop.span}: {why}", address)

    def _next_address(self, address: str) -> str:
        addresses = [hop.address for hop in self.route.hops]
        return addresses[min(addresses.index(address) + 1, len(addresses) - 1)]

    async def _fail(self, error: SwarmError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        self._failed.set()
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # nobody may be waiting; then it is raised by the next append instead
        async with self._room:
            self._room.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


@contextlib.asynccontextmanager
async def open_chain(
    transport: Transport, route: Route, *, trunk_room: int, crown_room: int, epoch: int = 0
) -> AsyncIterator[Chain]:
    """Open a session on every node of `route`; closed on leaving, whatever happened.

    Raises Unreachable, NodeLost, and Refused with the node's address where a node says no.
    """
    session = secrets.token_bytes(SESSION_ID_BYTES)
    tickets = [secrets.token_bytes(TICKET_BYTES) for _ in route.hops]
    opens = [
        Open(
            version=PROTOCOL_VERSION,
            session=session,
            epoch=epoch,
            span=hop.span,
            numerics=route.numerics,
            trunk_room=trunk_room,
            crown_room=crown_room,
            ticket=ticket,
            next_hop=NextHop(after.address, after_ticket) if after else None,
        )
        for hop, ticket, after, after_ticket in zip(
            route.hops, tickets, (*route.hops[1:], None), (*tickets[1:], b""), strict=True
        )
    ]
    controls: dict[str, Stream] = {}
    async with contextlib.AsyncExitStack() as undo:
        granted = await _together(
            [_open_one(transport, hop, wanted, controls, undo) for hop, wanted in zip(route.hops, opens, strict=True)]
        )
        link = await transport.connect(route.hops[0].address, StreamKind.LINK)
        undo.push_async_callback(link.end)
        await link.send(LinkHello(PROTOCOL_VERSION, session, epoch, tickets[0]))
        chain = Chain(route, session, controls, link, min(granted), epoch)
        watching = asyncio.create_task(chain.watch())
        try:
            yield chain
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await chain.close()


async def _open_one(
    transport: Transport, hop: Hop, wanted: Open, controls: dict[str, Stream], undo: contextlib.AsyncExitStack
) -> int:
    control = await transport.connect(hop.address, StreamKind.CONTROL)
    controls[hop.address] = control
    undo.push_async_callback(control.end)
    await control.send(wanted)
    try:
        reply = await asyncio.wait_for(control.receive(), OPEN_S)
    except TimeoutError:
        raise NodeLost(f"{hop.address} did not answer an open within {OPEN_S:.0f} s", hop.address) from None
    match reply:
        case Opened(credit_rows=credit):
            return credit
        case Fault(code=code, message=text):
            raise Refused(f"{hop.address} refused the session: {text}", code)
        case _:
            raise Malformed(f"{hop.address} answered an open with {type(reply).__name__}")


async def _together(work: list[Coroutine[None, None, int]]) -> list[int]:
    """All at once; the first error, alone, if any fails."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, int)]
