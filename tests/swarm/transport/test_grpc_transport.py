"""What the gRPC transport does beyond the seam: distance, silence, strangers."""

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
from treeswarm.transport.grpc_streams import GrpcCall, GrpcStream
from treeswarm.transport.rate_limit import LEAST_RATE, RateLimiter
from treeswarm.transport.seam import Stream, StreamKind, Traffic
from treeswarm_bench.raw_codec import RAW

CONTROL, LINK = StreamKind.CONTROL, StreamKind.LINK


async def echo(kind: StreamKind, stream: Stream) -> None:
    """Answers pings until the peer is done."""
    while (message := await stream.receive()) is not None:
        assert isinstance(message, Ping)
        await stream.send(Pong(message.stamp))


async def test_grpc_garbage_ends_its_own_stream_only() -> None:
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
async def far_away(port: int, one_way_s: float) -> AsyncIterator[str]:
    """A door to `port` behind which every byte comes late."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(one_way_s)
                writer.write(data)

    inside: list[asyncio.Task[None]] = []

    async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(
        lambda *ends: inside.append(asyncio.create_task(enter(*ends))), "127.0.0.1", 0
    ) as door:
        yield f"127.0.0.1:{door.sockets[0].getsockname()[1]}"
        await asyncio.gather(*inside)


async def test_grpc_reaches_the_other_side_of_the_world() -> None:
    transport = GrpcTransport()
    listener = await transport.listen("127.0.0.1:0", echo)
    async with far_away(int(listener.address.rpartition(":")[2]), 0.4) as address:
        stream = await transport.connect(address, CONTROL)
        await stream.send(Ping(9))
        assert await stream.receive() == Pong(9)
        await stream.end()
        await transport.close()
        await listener.close()


async def test_grpc_connecting_can_be_cancelled_and_does_not_wait_for_ever() -> None:
    transport = GrpcTransport(connect_s=0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        connecting = asyncio.create_task(transport.connect(address, CONTROL))
        await asyncio.sleep(0.1)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        with pytest.raises(Unreachable, match="no answer in time"):
            await transport.connect(address, LINK)
    await transport.close()


async def test_grpc_a_code_nobody_knows_is_a_refusal() -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        raise Refused("in words of a later version", "not-a-code")

    transport = GrpcTransport()
    listener = await transport.listen("[::1]:0", accept)
    assert listener.address.startswith("[::1]:")
    with pytest.raises(Refused, match="later version") as refused:  # it may be there before the stream is
        stream = await transport.connect(listener.address, CONTROL)
        await stream.receive()
    assert refused.value.code == FaultCode.REFUSED
    await transport.close()
    await listener.close()


async def test_a_peer_of_ipv6_has_its_brackets() -> None:
    peers: asyncio.Queue[str] = asyncio.Queue()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        peers.put_nowait(stream.peer)

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    transport = GrpcTransport()
    listener = await transport.listen("[::1]:0", accept)
    await transport.connect(listener.address, CONTROL)
    assert (await asyncio.wait_for(peers.get(), 10)).startswith("[::1]:")
    await listener.close()
    await transport.close()


async def test_idle_connections_are_not_kept_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who names next hop after next hop must not fill this machine with connections."""
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


async def test_where_the_rate_is_used_up_links_wait_and_heartbeats_do_not() -> None:
    listening, dialling = GrpcTransport(), GrpcTransport(rate_limiter=RateLimiter(LEAST_RATE))
    came = asyncio.Event()

    async def accept(kind: StreamKind, stream: Stream) -> None:
        while (message := await stream.receive()) is not None:
            if isinstance(message, Ping):
                await stream.send(Pong(message.stamp))
            else:
                came.set()

    listener = await listening.listen("127.0.0.1:0", accept)
    control = await dialling.connect(listener.address, StreamKind.CONTROL)
    link = await dialling.connect(listener.address, StreamKind.LINK)
    hello = LinkHello(PROTOCOL_VERSION, bytes(16), 0, bytes(16), b"")
    await link.send(hello)
    await asyncio.wait_for(came.wait(), 10)
    came.clear()
    assert dialling.rate_limiter is not None
    dialling.rate_limiter.charge(100_000_000, asyncio.get_running_loop().time())  # 800 s of the line
    waiting = asyncio.create_task(link.send(hello))
    await control.send(Ping(1))
    assert await asyncio.wait_for(control.receive(), 10) == Pong(1)
    assert not waiting.done()
    assert not came.is_set()
    owed_s = dialling.rate_limiter.owed_s(asyncio.get_running_loop().time())
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert dialling.rate_limiter.owed_s(asyncio.get_running_loop().time()) <= owed_s
    assert dialling.traffic.sent[StreamKind.LINK] > 0
    async with asyncio.timeout(10):  # who has sent counts it when he hears that it has gone
        while (dialling.traffic.sent, dialling.traffic.received) != (
            listening.traffic.received,
            listening.traffic.sent,
        ):
            await asyncio.sleep(0.01)
    await listener.close()
    await dialling.close()
    await listening.close()


async def test_a_write_that_fails_when_its_sender_has_gone_is_nobodys_bug() -> None:
    failing, told = asyncio.Event(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

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
    assert not told
    with pytest.raises(LinkBroken):  # who stays hears of it
        await stream.send(b"x")  # type: ignore[arg-type]
    stream.reader.cancel()
