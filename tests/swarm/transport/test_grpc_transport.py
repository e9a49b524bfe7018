"""Tests of the gRPC transport beyond the conformance suite: distant and silent peers, rates and idle connections."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator

import grpc
import pytest

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import LinkBroken, Refused, SwarmError, Unreachable
from treeswarm.protocol.messages import FaultCode, LinkHello, Ping, Pong
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.grpc_channels import MAX_CHANNELS, ChannelCache
from treeswarm.transport.grpc_streams import GrpcCall, GrpcStream
from treeswarm.transport.rate_limit import LEAST_RATE, RateLimiter
from treeswarm.transport.seam import Stream, StreamKind, Traffic
from treeswarm_bench.raw_codec import RAW

CONTROL, LINK = StreamKind.CONTROL, StreamKind.LINK


async def echo(kind: StreamKind, stream: Stream) -> None:
    """Answer pings until the peer ends the stream."""
    while (message := await stream.receive()) is not None:
        assert isinstance(message, Ping)
        await stream.send(Pong(message.stamp))


async def test_invalid_bytes_end_only_their_own_stream() -> None:
    transport = GrpcTransport()
    listener = await transport.listen("127.0.0.1:0", echo)
    async with grpc.aio.insecure_channel(listener.address) as channel:
        call = channel.stream_stream("/treeswarm.Swarm/Control")()
        await call.write(b"\xff\xff garbage")
        with pytest.raises(grpc.RpcError):
            assert await call.read() is None
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no ControlUp" in await call.details()
    stream = await transport.connect(listener.address, CONTROL)
    await stream.send(Ping(5))
    assert await stream.receive() == Pong(5)
    await stream.end()
    await listener.close()
    await transport.close()


@contextlib.asynccontextmanager
async def delayed_address(port: int, one_way_s: float) -> AsyncIterator[str]:
    """Yield an address that forwards to `port`, with every byte delayed by `one_way_s` seconds."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(one_way_s)
                writer.write(data)

    forwarding: list[asyncio.Task[None]] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(
        lambda *ends: forwarding.append(asyncio.create_task(forward(*ends))), "127.0.0.1", 0
    ) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await asyncio.gather(*forwarding)


async def test_peer_with_a_long_round_trip_is_reached() -> None:
    transport = GrpcTransport()
    listener = await transport.listen("127.0.0.1:0", echo)
    async with delayed_address(int(listener.address.rpartition(":")[2]), 0.4) as address:
        stream = await transport.connect(address, CONTROL)
        await stream.send(Ping(9))
        assert await stream.receive() == Pong(9)
        await stream.end()
        await transport.close()
        await listener.close()


async def test_connecting_can_be_cancelled_and_times_out() -> None:
    transport = GrpcTransport(connect_s=0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        connecting = asyncio.create_task(transport.connect(address, CONTROL))
        await asyncio.sleep(0.1)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        with pytest.raises(Unreachable, match="no answer in time"):
            await transport.connect(address, LINK)
    await transport.close()


async def test_a_late_connection_gives_the_next_one_more_time() -> None:
    cache = ChannelCache()
    for factor in (1, 2, 4, 4):
        assert cache.connect_s("node:1", 5.0) == 5.0 * factor
        cache.note_connected("node:1", late=True)
    assert cache.connect_s("other:1", 5.0) == 5.0
    cache.note_connected("node:1", late=False)
    assert cache.connect_s("node:1", 5.0) == 5.0
    for number in range(2 * MAX_CHANNELS):
        cache.note_connected(f"node:{number}", late=True)
    assert len(cache.late) == MAX_CHANNELS


async def test_unknown_fault_code_is_a_refusal() -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        raise Refused("in words of a later version", "not-a-code")

    transport = GrpcTransport()
    listener = await transport.listen("[::1]:0", accept)
    assert listener.address.startswith("[::1]:")
    with pytest.raises(Refused, match="later version") as refused:  # `connect` raises it if it arrives early enough.
        stream = await transport.connect(listener.address, CONTROL)
        await stream.receive()
    assert refused.value.code == FaultCode.REFUSED
    await transport.close()
    await listener.close()


async def test_ipv6_peer_address_has_brackets() -> None:
    peers: asyncio.Queue[str] = asyncio.Queue()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        peers.put_nowait(stream.peer)

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    transport = GrpcTransport()
    listener = await transport.listen("[::1]:0", accept)
    await transport.connect(listener.address, CONTROL)
    assert (await asyncio.wait_for(peers.get(), 10)).startswith("[::1]:")
    await listener.close()
    await transport.close()


async def test_number_of_idle_connections_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that names one next hop after another must not fill this machine with connections."""
    monkeypatch.setattr("treeswarm.transport.grpc_channels.MAX_CHANNELS", 3)
    dialling = GrpcTransport()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        while await stream.receive() is not None:
            pass

    listening = GrpcTransport()
    listeners = [await listening.listen("127.0.0.1:0", accept) for _ in range(6)]
    busy = await dialling.connect(listeners[0].address, StreamKind.CONTROL)
    for listener in listeners[1:]:
        stream = await dialling.connect(listener.address, StreamKind.CONTROL)
        await stream.end()
        while stream in dialling._streams:
            await asyncio.sleep(0.01)
    assert len(dialling._cache.channels) <= 4
    await busy.send(Ping(1))
    await busy.end()
    await dialling.close()
    for listener in listeners:
        await listener.close()
    await listening.close()


async def test_rate_limit_delays_links_but_not_heartbeats() -> None:
    listening, dialling = GrpcTransport(), GrpcTransport(rate_limiter=RateLimiter(LEAST_RATE))
    arrived = asyncio.Event()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            if isinstance(message, Ping):
                await stream.send(Pong(message.stamp))
            else:
                arrived.set()

    listener = await listening.listen("127.0.0.1:0", accept)
    control = await dialling.connect(listener.address, StreamKind.CONTROL)
    link = await dialling.connect(listener.address, StreamKind.LINK)
    hello = LinkHello(PROTOCOL_VERSION, bytes(16), 0, bytes(16), b"")
    await link.send(hello)
    await asyncio.wait_for(arrived.wait(), 10)
    arrived.clear()
    assert dialling.rate_limiter is not None
    dialling.rate_limiter.charge(100_000_000, asyncio.get_running_loop().time())  # 800 s at the limit
    waiting = asyncio.create_task(link.send(hello))
    await control.send(Ping(1))
    assert await asyncio.wait_for(control.receive(), 10) == Pong(1)
    assert not waiting.done()
    assert not arrived.is_set()
    owed_s = dialling.rate_limiter.owed_s(asyncio.get_running_loop().time())
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert dialling.rate_limiter.owed_s(asyncio.get_running_loop().time()) <= owed_s
    assert dialling.traffic.sent[StreamKind.LINK] > 0
    async with asyncio.timeout(10):  # A sender counts a message when the write has completed.
        while (dialling.traffic.sent, dialling.traffic.received) != (
            listening.traffic.received,
            listening.traffic.sent,
        ):
            await asyncio.sleep(0.01)
    await listener.close()
    await dialling.close()
    await listening.close()


async def test_failed_write_of_cancelled_sender_is_not_logged() -> None:
    failing, reported = asyncio.Event(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def write(_: bytes) -> None:
        await failing.wait()
        raise grpc.RpcError

    async def nothing(*_: object) -> None:
        await asyncio.Event().wait()

    async def unknown() -> SwarmError | None:
        return None

    stream = GrpcStream(
        GrpcCall("peer", CONTROL, nothing, write, unknown, nothing), RAW.encode, RAW.down[CONTROL], Traffic()
    )
    sending = asyncio.create_task(stream.send(b"x"))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    failing.set()
    await asyncio.sleep(0.01)
    gc.collect()
    assert not reported
    with pytest.raises(LinkBroken):  # A sender that still waits gets the error.
        await stream.send(b"x")  # type: ignore[arg-type]
    stream.reader.cancel()
