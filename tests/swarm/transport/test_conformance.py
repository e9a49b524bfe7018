"""One conformance suite for the transport seam: in memory, over gRPC in all its kinds of trust, and emulated links."""

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
Make = Callable[[], Transport]


SECURITY: dict[str, Callable[[], Security | None]] = {
    "grpc": lambda: None,
    "tls": lambda: Security(Identity.ephemeral()),
    "private": lambda: Security(Identity.ephemeral(), b"a key of the tests' swarm"),
}


@pytest.fixture(params=["memory", "grpc", "tls", "private", "emulated memory", "emulated grpc", "emulated tls"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Make]:
    """Makes transports that can reach each other; closes them."""
    network, made = MemoryNetwork(), []

    def new() -> Transport:
        emulated, _, form = request.param.rpartition(" ")
        inner: Transport = network.transport() if form == "memory" else GrpcTransport(security=SECURITY[form]())
        made.append(EmulatedTransport(inner, SHAPE) if emulated else inner)
        return made[-1]

    yield new
    for transport in made:
        await transport.close()


def frame(seq: int, size: int = 0) -> Append:
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
    """Answers pings until the peer is done."""
    while (message := await stream.receive()) is not None:
        assert isinstance(message, Ping)
        await stream.send(Pong(message.stamp))


@contextlib.asynccontextmanager
async def listening(make: Make, accept: Callable[[StreamKind, Stream], object]) -> AsyncIterator[str]:
    listener = await make().listen("127.0.0.1:0", accept)  # type: ignore[arg-type]
    try:
        yield listener.address
    finally:
        await listener.close()


async def test_messages_come_in_order_both_ways_at_once(make: Make) -> None:
    async with listening(make, echo) as address:
        stream = await make().connect(address, CONTROL)

        async def say() -> None:
            for stamp in range(100):
                await stream.send(Ping(stamp))

        saying = asyncio.create_task(say())
        heard = [await stream.receive() for _ in range(100)]
        await saying
        assert heard == [Pong(stamp) for stamp in range(100)]
        await stream.end()


async def test_many_streams_do_not_mix(make: Make) -> None:
    async with listening(make, echo) as address:
        transport = make()

        async def talk(number: int) -> None:
            stream = await transport.connect(address, CONTROL)
            for i in range(5):
                await stream.send(Ping(number * 100 + i))
                assert await stream.receive() == Pong(number * 100 + i)
            await stream.end()

        await asyncio.gather(*(talk(number) for number in range(20)))


async def test_what_was_sent_before_the_end_arrives_and_then_the_end(make: Make) -> None:
    heard: asyncio.Queue[Message | None] = asyncio.Queue()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        assert kind is LINK
        while (message := await stream.receive()) is not None:
            await heard.put(message)
        await heard.put(None)

    async with listening(make, accept) as address:
        stream = await make().connect(address, LINK)
        await stream.send(LinkHello(1, b"s" * 16, 0, b"t" * 16))
        await stream.send(frame(7, size=3 << 20))
        await stream.end()
        await stream.end()
        assert isinstance(await asyncio.wait_for(heard.get(), 10), LinkHello)
        big = await asyncio.wait_for(heard.get(), 10)
        assert isinstance(big, Append)
        assert len(big.hidden) == 3 << 20
        assert await asyncio.wait_for(heard.get(), 10) is None
        with pytest.raises(LinkBroken):
            await stream.send(frame(8))


async def test_an_acceptors_error_reaches_the_peer_as_words(make: Make) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        raise Refused("no room for you", FaultCode.FULL)

    async with listening(make, accept) as address:
        stream = await make().connect(address, CONTROL)
        await stream.send(Describe(1))
        with pytest.raises(Refused, match="no room for you") as refused:
            await asyncio.wait_for(stream.receive(), 10)
        assert refused.value.code == "full"


async def test_an_acceptor_that_is_done_ends_the_stream(make: Make) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.send(Pong(1))
        await stream.end()

    async with listening(make, accept) as address:
        stream = await make().connect(address, CONTROL)
        assert await asyncio.wait_for(stream.receive(), 10) == Pong(1)
        assert await asyncio.wait_for(stream.receive(), 10) is None


async def test_whoever_waits_for_a_message_hears_that_the_stream_has_ended_after_an_end_of_ours(make: Make) -> None:
    """The peer's status may come in the same moment as the end of its messages."""
    dialler = make()
    async with listening(make, echo) as address, asyncio.timeout(60):
        for _ in range(20):
            stream = await dialler.connect(address, LINK)
            waiting = asyncio.create_task(stream.receive())
            await asyncio.sleep(0)
            await stream.end()
            assert await waiting is None


async def test_an_acceptor_that_just_returns_loses_nothing_it_sent(make: Make) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        for stamp in range(3):
            await stream.send(Pong(stamp))

    async with listening(make, accept) as address:
        stream = await make().connect(address, CONTROL)
        heard = [await asyncio.wait_for(stream.receive(), 10) for _ in range(4)]
        assert heard == [Pong(0), Pong(1), Pong(2), None]


async def test_an_acceptors_bug_is_reported_here_and_refused_there(make: Make) -> None:
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))

    async def accept(kind: StreamKind, stream: Stream) -> None:
        raise KeyError("private")

    async with listening(make, accept) as address:
        with pytest.raises(Refused, match=r"^internal error$"):  # by `connect`, if it comes that soon
            stream = await make().connect(address, CONTROL)
            await asyncio.wait_for(stream.receive(), 10)
    assert [type(error) for error in reported] == [KeyError]


async def test_a_sender_that_does_not_listen_learns_why_it_was_refused(make: Make) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        raise Refused("go away", FaultCode.FULL)

    async with listening(make, accept) as address:
        stream = await make().connect(address, CONTROL)

        async def flood() -> None:
            while True:
                await stream.send(Ping(1))
                await asyncio.sleep(0)

        with pytest.raises(Refused, match="go away"):
            await asyncio.wait_for(flood(), 10)
        await asyncio.wait_for(stream.end(), 10)


async def test_a_listener_that_closes_breaks_its_streams(make: Make) -> None:
    async with listening(make, echo) as address:
        stream = await make().connect(address, CONTROL)
        await stream.send(Ping(1))
        assert await stream.receive() == Pong(1)
    with pytest.raises(SwarmError):
        for _ in range(100):
            assert await asyncio.wait_for(stream.receive(), 10) is not None


async def test_a_dialler_that_vanishes_breaks_the_stream(make: Make) -> None:
    over: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        try:
            await echo(kind, stream)
            over.set_result(None)
        except SwarmError as error:
            over.set_result(error)

    async with listening(make, accept) as address:
        transport = make()
        stream = await transport.connect(address, CONTROL)
        await stream.send(Ping(1))
        assert await stream.receive() == Pong(1)  # else it may be gone before it was ever accepted
        await transport.close()
        assert isinstance(await asyncio.wait_for(over, 10), LinkBroken)


async def test_whoever_waits_hears_that_the_transport_was_closed_and_dials_no_more(make: Make) -> None:
    async with listening(make, echo) as address:
        transport = make()
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


async def test_nobody_there(make: Make) -> None:
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9.*check the address"):
        await make().connect("127.0.0.1:9", CONTROL)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:x", "host:70000", "::1:80"])
async def test_what_is_no_address(make: Make, address: str) -> None:
    with pytest.raises(BadRequest, match="HOST:PORT"):
        await make().connect(address, CONTROL)


async def test_a_port_in_use(make: Make) -> None:
    async with listening(make, echo) as address:
        with pytest.raises(BadRequest, match="in use"):
            await make().listen(address, echo)


async def test_a_sender_waits_for_a_receiver_that_does_not_read(make: Make) -> None:
    release = asyncio.Event()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        await release.wait()
        while await stream.receive() is not None:
            pass

    async with listening(make, accept) as address:
        stream = await make().connect(address, LINK)

        async def flood() -> None:
            for seq in range(400):
                await stream.send(frame(seq, size=1 << 20))

        flooding = asyncio.create_task(flood())
        await asyncio.sleep(0.5)
        assert not flooding.done()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
        release.set()
        await make().close()


async def test_a_cancelled_receive_does_no_harm(make: Make) -> None:
    async with listening(make, echo) as address:
        stream = await make().connect(address, CONTROL)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.receive(), 0.05)
        await stream.send(Ping(3))
        assert await asyncio.wait_for(stream.receive(), 10) == Pong(3)
        await stream.end()


async def test_memory_garbage_is_malformed() -> None:
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


async def test_a_terrible_network_is_the_same_for_the_same_seed() -> None:
    async def fates(seed: int) -> list[list[float | None]]:
        network = MemoryNetwork(seed, Faults(drop=0.2, double=0.2, delay=0.3, max_delay_s=1.0, cut=0.01))
        return [network.draw_delays(LINK) for _ in range(300)]

    first = await fates(1)
    assert first == await fates(1)
    assert first != await fates(2)
    assert {len(draw_delays) for draw_delays in first} == {0, 1, 2}
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
def test_a_links_shape_reads(text: str, shape: LinkShape) -> None:
    assert LinkShape.parse(text) == shape


@pytest.mark.parametrize("text", ["", "25ms", "delay=25", "delay=-1ms", "rate=0mbit", "delay=1ms;rate=1mbit", "loss=1"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(BadRequest):
        LinkShape.parse(text)


def test_an_uplink_sends_one_message_at_a_time() -> None:
    uplink = EmulatedUplink(LinkShape(delay_s=1.0, rate=8_000.0))
    assert [uplink.arrival(1000, now) for now in (0.0, 0.0, 10.0)] == [2.0, 3.0, 12.0]
