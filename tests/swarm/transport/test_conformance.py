"""Conformance suite of the transports: in memory, gRPC with each kind of security, and emulated links around them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest

from treeswarm.errors import BadRequest, LinkBroken, Malformed, Refused, SwarmError, Unreachable
from treeswarm.keys import Identity
from treeswarm.protocol.messages import Answers, Append, Describe, FaultCode, LinkHello, Message, Ping, Pong
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.transport.emulated import EmulatedTransport, EmulatedUplink, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.memory import Faults, MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind, Transport
from treeswarm.transport.tls import Security

CONTROL, LINK = StreamKind.CONTROL, StreamKind.LINK
SHAPE = LinkShape(delay_s=0.003, rate=1e9)
NewTransport = Callable[[], Transport]


SECURITY: dict[str, Callable[[], Security | None]] = {
    "grpc": lambda: None,
    "tls": lambda: Security(Identity.ephemeral()),
    "private": lambda: Security(Identity.ephemeral(), b"a key of the tests' swarm"),
}


@pytest.fixture(params=["memory", "grpc", "tls", "private", "emulated memory", "emulated grpc", "emulated tls"])
async def new_transport(request: pytest.FixtureRequest) -> AsyncIterator[NewTransport]:
    """Return a factory of transports that can reach each other; close them after the test."""
    network, transports = MemoryNetwork(), []

    def create() -> Transport:
        emulated, _, form = request.param.rpartition(" ")
        inner: Transport = network.transport() if form == "memory" else GrpcTransport(security=SECURITY[form]())
        transports.append(EmulatedTransport(inner, SHAPE) if emulated else inner)
        return transports[-1]

    yield create
    for transport in transports:
        await transport.close()


def empty_append(seq: int, size: int = 0) -> Append:
    empty = np.empty(0, np.uint32)
    return Append(
        epoch=0,
        seq=seq,
        commit=empty,
        first_id=1,
        parents=empty,
        tokens=empty,
        prefill=False,
        answers=Answers.NONE,
        settings=SamplingSettings(),
        skipped=np.empty(0, np.bool_),
        hidden=bytes(size),
    )


async def echo(kind: StreamKind, stream: Stream) -> None:
    """Answer pings until the peer ends the stream."""
    while (message := await stream.receive()) is not None:
        assert isinstance(message, Ping)
        await stream.send(Pong(message.stamp))


@contextlib.asynccontextmanager
async def listening(new_transport: NewTransport, accept: Callable[[StreamKind, Stream], object]) -> AsyncIterator[str]:
    listener = await new_transport().listen("127.0.0.1:0", accept)  # type: ignore[arg-type]
    try:
        yield listener.address
    finally:
        await listener.close()


async def test_messages_arrive_in_order_in_both_directions_at_once(new_transport: NewTransport) -> None:
    async with listening(new_transport, echo) as address:
        stream = await new_transport().connect(address, CONTROL)

        async def send_pings() -> None:
            for stamp in range(100):
                await stream.send(Ping(stamp))

        sending = asyncio.create_task(send_pings())
        replies = [await stream.receive() for _ in range(100)]
        await sending
        assert replies == [Pong(stamp) for stamp in range(100)]
        await stream.end()


async def test_concurrent_streams_do_not_mix_messages(new_transport: NewTransport) -> None:
    async with listening(new_transport, echo) as address:
        transport = new_transport()

        async def exchange(number: int) -> None:
            stream = await transport.connect(address, CONTROL)
            for i in range(5):
                await stream.send(Ping(number * 100 + i))
                assert await stream.receive() == Pong(number * 100 + i)
            await stream.end()

        await asyncio.gather(*(exchange(number) for number in range(20)))


async def test_messages_sent_before_the_end_arrive_before_it(new_transport: NewTransport) -> None:
    received: asyncio.Queue[Message | None] = asyncio.Queue()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        assert kind is LINK
        while (message := await stream.receive()) is not None:
            await received.put(message)
        await received.put(None)

    async with listening(new_transport, accept) as address:
        stream = await new_transport().connect(address, LINK)
        await stream.send(LinkHello(1, b"s" * 16, 0, b"t" * 16))
        await stream.send(empty_append(7, size=3 << 20))
        await stream.end()
        await stream.end()
        assert isinstance(await asyncio.wait_for(received.get(), 10), LinkHello)
        large = await asyncio.wait_for(received.get(), 10)
        assert isinstance(large, Append)
        assert len(large.hidden) == 3 << 20
        assert await asyncio.wait_for(received.get(), 10) is None
        with pytest.raises(LinkBroken):
            await stream.send(empty_append(8))


async def test_error_of_acceptor_reaches_the_dialler(new_transport: NewTransport) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        raise Refused("no room for you", FaultCode.FULL)

    async with listening(new_transport, accept) as address:
        stream = await new_transport().connect(address, CONTROL)
        await stream.send(Describe(1))
        with pytest.raises(Refused, match="no room for you") as refused:
            await asyncio.wait_for(stream.receive(), 10)
        assert refused.value.code == "full"


async def test_acceptor_may_end_the_stream_itself(new_transport: NewTransport) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.send(Pong(1))
        await stream.end()

    async with listening(new_transport, accept) as address:
        stream = await new_transport().connect(address, CONTROL)
        assert await asyncio.wait_for(stream.receive(), 10) == Pong(1)
        assert await asyncio.wait_for(stream.receive(), 10) is None


async def test_pending_receive_returns_none_after_own_end(new_transport: NewTransport) -> None:
    """The peer's status may arrive at the same moment as the end of its messages."""
    dialler = new_transport()
    async with listening(new_transport, echo) as address, asyncio.timeout(60):
        for _ in range(20):
            stream = await dialler.connect(address, LINK)
            waiting = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            await stream.end()
            assert await waiting is None


async def test_messages_arrive_when_the_acceptor_just_returns(new_transport: NewTransport) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        for stamp in range(3):
            await stream.send(Pong(stamp))

    async with listening(new_transport, accept) as address:
        stream = await new_transport().connect(address, CONTROL)
        messages = [await asyncio.wait_for(stream.receive(), 10) for _ in range(4)]
        assert messages == [Pong(0), Pong(1), Pong(2), None]


async def test_bug_in_acceptor_is_reported_and_refuses_the_dialler(new_transport: NewTransport) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

    async def accept(kind: StreamKind, stream: Stream) -> None:
        raise KeyError("private")

    async with listening(new_transport, accept) as address:
        with pytest.raises(Refused, match=r"^internal error$"):  # `connect` raises it if it arrives early enough.
            stream = await new_transport().connect(address, CONTROL)
            await asyncio.wait_for(stream.receive(), 10)
    assert [type(error) for error in reported] == [KeyError]


async def test_sender_that_never_receives_gets_the_refusal(new_transport: NewTransport) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        raise Refused("go away", FaultCode.FULL)

    async with listening(new_transport, accept) as address:
        stream = await new_transport().connect(address, CONTROL)

        async def flood() -> None:
            while True:
                await stream.send(Ping(1))
                await asyncio.sleep(0)

        with pytest.raises(Refused, match="go away"):
            await asyncio.wait_for(flood(), 10)
        await asyncio.wait_for(stream.end(), 10)


async def test_closing_a_listener_breaks_its_streams(new_transport: NewTransport) -> None:
    async with listening(new_transport, echo) as address:
        stream = await new_transport().connect(address, CONTROL)
        await stream.send(Ping(1))
        assert await stream.receive() == Pong(1)
    with pytest.raises(SwarmError):
        for _ in range(100):
            assert await asyncio.wait_for(stream.receive(), 10) is not None


async def test_dialler_that_disconnects_breaks_the_stream(new_transport: NewTransport) -> None:
    outcome: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        try:
            await echo(kind, stream)
            outcome.set_result(None)
        except SwarmError as error:
            outcome.set_result(error)

    async with listening(new_transport, accept) as address:
        transport = new_transport()
        stream = await transport.connect(address, CONTROL)
        await stream.send(Ping(1))
        assert await stream.receive() == Pong(1)  # Otherwise it may be closed before it is accepted.
        await transport.close()
        assert isinstance(await asyncio.wait_for(outcome, 10), LinkBroken)


async def test_closing_a_transport_ends_receive_and_dialling(new_transport: NewTransport) -> None:
    async with listening(new_transport, echo) as address:
        transport = new_transport()
        stream = await transport.connect(address, CONTROL)
        await stream.send(Ping(1))
        assert await stream.receive() == Pong(1)
        waiting = asyncio.create_task(stream.receive())
        await asyncio.sleep(0)
        await transport.close()
        with pytest.raises(LinkBroken):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(Unreachable, match="closed"):
            await transport.connect(address, CONTROL)


async def test_address_without_a_listener_is_unreachable(new_transport: NewTransport) -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9.*check the address"):
        await new_transport().connect("127.0.0.1:9", CONTROL)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:70000", "::1:80"])
async def test_malformed_address_is_a_bad_request(new_transport: NewTransport, address: str) -> None:
    with pytest.raises(BadRequest, match="HOST:PORT"):
        await new_transport().connect(address, CONTROL)


async def test_port_in_use_is_a_bad_request(new_transport: NewTransport) -> None:
    async with listening(new_transport, echo) as address:
        with pytest.raises(BadRequest, match="in use"):
            await new_transport().listen(address, echo)


async def test_sender_waits_while_the_receiver_does_not_read(new_transport: NewTransport) -> None:
    release = asyncio.Event()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        await release.wait()
        while await stream.receive() is not None:
            pass

    async with listening(new_transport, accept) as address:
        stream = await new_transport().connect(address, LINK)

        async def flood() -> None:
            for seq in range(400):
                await stream.send(empty_append(seq, size=1 << 20))

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.5)
        assert not flooding.done()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        release.set()
        await new_transport().close()


async def test_cancelled_receive_leaves_the_stream_usable(new_transport: NewTransport) -> None:
    async with listening(new_transport, echo) as address:
        stream = await new_transport().connect(address, CONTROL)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.receive(), 0.05)
        await stream.send(Ping(3))
        assert await asyncio.wait_for(stream.receive(), 10) == Pong(3)
        await stream.end()


async def test_invalid_bytes_in_memory_are_malformed() -> None:
    network = MemoryNetwork()
    errors: list[Exception] = []

    async def accept(kind: StreamKind, stream: Stream) -> None:
        try:
            await stream.receive()
        except Malformed as error:
            errors.append(error)
            raise

    listener = await network.transport().listen("127.0.0.1:0", accept)
    stream = await network.transport().connect(listener.address, CONTROL)
    await stream.send_bytes(b"\xff\xff garbage")
    with pytest.raises(Malformed):
        await stream.receive()
    assert len(errors) == 1
    await listener.close()


async def test_faults_are_determined_by_the_seed() -> None:
    async def delays(seed: int) -> list[list[float | None]]:
        network = MemoryNetwork(seed, Faults(drop=0.2, double=0.2, delay=0.3, max_delay_s=1.0, cut=0.01))
        return [network.draw_delays(LINK) for _ in range(300)]

    first = await delays(1)
    assert first == await delays(1)
    assert first != await delays(2)
    assert {len(copies) for copies in first} == {0, 1, 2}
    assert [None] in first


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("delay=25ms,rate=100mbit", LinkShape(0.025, 1e8)),
        ("rate=2.5gbit", LinkShape(0.0, 2.5e9)),
        ("delay=1s", LinkShape(1.0, None)),
        ("delay=500us", LinkShape(0.0005, None)),
    ],
)
def test_link_shape_is_parsed(text: str, shape: LinkShape) -> None:
    assert LinkShape.parse(text) == shape


@pytest.mark.parametrize("text", ["", "25ms", "delay=25", "delay=-1ms", "rate=0mbit", "delay=1ms;rate=1mbit", "loss=1"])
def test_malformed_link_shape_is_a_bad_request(text: str) -> None:
    with pytest.raises(BadRequest):
        LinkShape.parse(text)


def test_uplink_sends_one_message_at_a_time() -> None:
    uplink = EmulatedUplink(LinkShape(delay_s=1.0, rate=8_000.0))
    assert [uplink.arrival(1000, now) for now in (0.0, 0.0, 10.0)] == [2.0, 3.0, 12.0]
