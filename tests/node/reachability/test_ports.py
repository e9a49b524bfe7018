"""Leased ports work over real TCP and TLS on loopback: clients reach a borrower through the lender's port."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from tests.support.port_peers import (
    CONTROL,
    GENEROUS,
    LINK,
    SOON_S,
    Peer,
    client_transport,
    is_closed,
    peer,
    ping,
    port_of,
    wait_until,
)

from treeswarm.errors import Impostor, LinkBroken, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import Answers, Append, FaultCode, LinkHello, Ping, Pong
from treeswarm.protocol.node_messages import DialBack, DialledBack, LeasePort, PortLeased
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_node.config import LendingConfig
from treeswarm_node.reachability.port_borrower import LeasedPort, lease_port


@contextlib.asynccontextmanager
async def leased_port(limits: LendingConfig = GENEROUS) -> AsyncIterator[tuple[Peer, Peer, LeasedPort]]:
    """Yield a lender, a borrower, and the port that one leases from the other."""
    async with (
        peer(limits) as lender,
        peer() as borrower,
        lease_port(borrower.transport, lender.address, borrower.local, borrower.node.forwarded_ports) as port,
    ):
        yield lender, borrower, port


def frame(seq: int, size: int) -> Append:
    empty = np.empty(0, np.uint32)
    return Append(
        epoch=0, seq=seq, commit=empty, first_id=1, parents=empty, tokens=empty, prefill=False, answers=Answers.NONE,
        settings=SamplingSettings(), skipped=np.empty(0, np.bool_), hidden=bytes(size),
    )  # fmt: skip


# ---------------------------------------------------------------- forwarding


async def test_control_and_link_streams_pass_through_a_leased_port() -> None:
    async with leased_port() as (_, borrower, port), client_transport() as client:
        address = f"{port.address}#{borrower.pin}"
        await ping(client, address)
        link = await client.connect(address, LINK)
        await link.send(LinkHello(1, b"s" * 16, 0, b"t" * 16))
        for seq in range(3):
            await link.send(frame(seq, 1 << 20))
        await link.end()
        assert isinstance(await asyncio.wait_for(borrower.received.get(), SOON_S), LinkHello)
        for seq in range(3):
            append = await asyncio.wait_for(borrower.received.get(), SOON_S)
            assert isinstance(append, Append)
            assert (append.seq, len(append.hidden)) == (seq, 1 << 20)
        assert await asyncio.wait_for(borrower.received.get(), SOON_S) is None


async def test_fifty_clients_at_once_pass_through_a_leased_port() -> None:
    async with leased_port() as (lender, borrower, port), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(client_transport()) for _ in range(50)]
        await asyncio.gather(
            *(ping(client, f"{port.address}#{borrower.pin}", stamp) for stamp, client in enumerate(clients))
        )
        assert lender.port_lender.connections >= 50


async def test_closing_one_connection_closes_the_joined_one() -> None:
    async with leased_port() as (lender, borrower, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(port.address))
        await wait_until(lambda: borrower.node.forwarded_ports)
        writer.close()
        await wait_until(lambda: lender.port_lender.connections == 0)
        await wait_until(lambda: not borrower.node.forwarded_ports)


# ---------------------------------------------------------------- trust


async def test_a_lender_cannot_pose_as_its_borrower() -> None:
    """The lender answers at the leased port with its own key: clients that expect the borrower's send nothing to it."""
    async with leased_port() as (lender, borrower, port), client_transport() as client:
        impostor = await lender.transport.listen("127.0.0.1:0", lender.node.accept)
        with pytest.raises(Impostor):
            await ping(client, f"{impostor.address}#{borrower.pin}")
        await impostor.close()
        with pytest.raises(Impostor):
            await ping(client, f"{port.address}#{lender.pin}")


async def test_a_forwarded_client_cannot_have_the_borrower_dialled() -> None:
    """Clients that come through a leased port have the borrower's own address, and would be dialled back there."""
    async with leased_port() as (_, borrower, port), client_transport() as client:
        stream = await client.connect(f"{port.address}#{borrower.pin}", CONTROL)
        await stream.send(DialBack("127.0.0.1:22"))
        with pytest.raises(Refused, match="cannot be seen"):
            await asyncio.wait_for(stream.receive(), SOON_S)
        direct = await client.connect(borrower.address, CONTROL)
        await direct.send(DialBack(f"0.0.0.0:{port_of(borrower.address)}#{borrower.pin}"))
        assert await asyncio.wait_for(direct.receive(), SOON_S) == DialledBack(True, borrower.local)
        await direct.end()


async def test_garbage_at_the_fetch_port_is_refused() -> None:
    async with leased_port() as (lender, borrower, port), client_transport() as client:
        for data in (b"", b"short", b"x" * 16, b"x" * 100_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port._fetch_at.port)
            writer.write(data)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), SOON_S) == b""
            writer.close()
        await wait_until(lambda: not lender.port_lender._fetching)
        await ping(client, f"{port.address}#{borrower.pin}")


async def test_a_fetch_without_a_token_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeswarm_node.reachability.port_lender.TOKEN_S", 0.1)
    async with leased_port() as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port._fetch_at.port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), SOON_S) == b""
        writer.close()


async def test_silent_connections_do_not_fill_the_fetch_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeswarm_node.reachability.port_lender.MAX_FETCHING_OF_HOST", 2)
    async with leased_port() as (lender, _, port):
        writers = [(await asyncio.open_connection("127.0.0.1", port._fetch_at.port))[1] for _ in range(5)]
        await wait_until(lambda: len(lender.port_lender._fetching) == 2)
        for writer in writers:
            writer.close()


async def test_a_token_fetches_one_connection() -> None:
    async with peer() as lender, client_transport() as borrower:
        stream, leased = await request_lease(borrower, lender)
        _, client = await asyncio.open_connection("127.0.0.1", leased.port)
        client.write(b"hello")
        incoming = await asyncio.wait_for(stream.receive(), SOON_S)
        token = incoming.token  # type: ignore[union-attr]
        first, first_writer = await asyncio.open_connection("127.0.0.1", leased.fetch_port)
        first_writer.write(token)
        assert await asyncio.wait_for(first.readexactly(5), SOON_S) == b"hello"
        second, second_writer = await asyncio.open_connection("127.0.0.1", leased.fetch_port)
        second_writer.write(token)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(second.read(), SOON_S) == b""
        client.write(b"again")
        assert await asyncio.wait_for(first.readexactly(5), SOON_S) == b"again"
        for writer in (client, first_writer, second_writer):
            writer.close()
        await stream.end()


async def request_lease(transport: GrpcTransport, lender: Peer) -> tuple[Stream, PortLeased]:
    """Request a lease as a borrower that fetches nothing by itself."""
    stream = await transport.connect(lender.address, CONTROL)
    await stream.send(LeasePort(1))
    leased = await asyncio.wait_for(stream.receive(), SOON_S)
    assert isinstance(leased, PortLeased)
    return stream, leased


# ---------------------------------------------------------------- ends


async def test_a_port_closes_when_its_borrower_leaves() -> None:
    async with peer() as lender, peer() as borrower, client_transport() as client:
        async with lease_port(borrower.transport, lender.address, borrower.local) as port:
            stream = await client.connect(f"{port.address}#{borrower.pin}", CONTROL)
        with pytest.raises(TransportError):
            await asyncio.wait_for(stream.receive(), SOON_S)
        await wait_until(lambda: lender.port_lender.lease_count == 0)
        assert await is_closed(port_of(port.address))
        assert await is_closed(port._fetch_at.port)
        assert lender.port_lender.connections == 0


async def test_a_borrower_learns_that_its_lender_has_left() -> None:
    async with peer() as borrower, contextlib.AsyncExitStack() as stack:
        lender = await stack.enter_async_context(peer())
        async with (
            lease_port(borrower.transport, lender.address, borrower.local, borrower.node.forwarded_ports) as port,
            client_transport() as client,
        ):
            stream = await client.connect(f"{port.address}#{borrower.pin}", CONTROL)
            await stack.aclose()
            with pytest.raises(TransportError):
                await asyncio.wait_for(port.wait_until_lost(), SOON_S)
            with pytest.raises(TransportError):
                await asyncio.wait_for(stream.receive(), SOON_S)
            await wait_until(lambda: not borrower.node.forwarded_ports)


async def test_a_connection_that_is_not_fetched_is_closed() -> None:
    async with peer(wait_s=0.1) as lender, client_transport() as borrower:
        stream, leased = await request_lease(borrower, lender)
        reader, writer = await asyncio.open_connection("127.0.0.1", leased.port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), SOON_S) == b""
        writer.close()
        await wait_until(lambda: lender.port_lender.connections == 0)
        await stream.end()


async def test_a_borrower_that_does_not_listen_refuses_connections() -> None:
    async with (
        peer(wait_s=0.2) as lender,
        client_transport() as client,
        lease_port(client, lender.address, "127.0.0.1:1") as port,
    ):
        with pytest.raises(TransportError):
            await ping(client, port.address)
        assert not port._ends


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "code", "words"),
    [
        (replace(GENEROUS, ports=0), FaultCode.REFUSED, "lends no ports"),
        (replace(GENEROUS, ports=1), FaultCode.TOO_MANY, "all 1 ports"),
        (replace(GENEROUS, ports_to_host=1), FaultCode.TOO_MANY, "your address leases 1"),
    ],
)
async def test_a_lender_limits_its_ports_in_all_and_per_host(
    limits: LendingConfig, code: FaultCode, words: str
) -> None:
    async with peer(limits) as lender, peer() as borrower, contextlib.AsyncExitStack() as stack:
        if limits.ports:
            await stack.enter_async_context(lease_port(borrower.transport, lender.address, borrower.local))
        with pytest.raises(Refused, match=words) as refused:
            await stack.enter_async_context(lease_port(borrower.transport, lender.address, borrower.local))
        assert refused.value.code == code


async def test_an_unreachable_node_lends_nothing() -> None:
    async with peer(reachable=False) as lender, peer() as borrower:
        with pytest.raises(Refused, match="lends no ports"):
            async with lease_port(borrower.transport, lender.address, borrower.local):
                pass


async def test_one_stream_leases_one_port_in_this_version() -> None:
    async with peer() as lender, client_transport() as borrower:
        stream, leased = await request_lease(borrower, lender)
        await stream.send(LeasePort(1))
        with pytest.raises(Refused, match="has leased a port already"):
            await asyncio.wait_for(stream.receive(), SOON_S)
        await wait_until(lambda: lender.port_lender.lease_count == 0)
        assert await is_closed(leased.port)
        other = await borrower.connect(lender.address, CONTROL)
        await other.send(LeasePort(99))
        with pytest.raises(Refused, match="protocol 99"):
            await asyncio.wait_for(other.receive(), SOON_S)


async def test_a_lender_uses_the_configured_ports() -> None:
    first, taken = _three_ports()
    with taken:
        limits = replace(GENEROUS, ports=2, first_port=first)
        async with peer(limits) as lender, client_transport() as borrower:
            stream, leased = await request_lease(borrower, lender)
            assert (leased.fetch_port, leased.port) == (first, first + 1)
            with pytest.raises(Refused, match="no port can be opened"):
                await request_lease(borrower, lender)
            await stream.end()


def _three_ports() -> tuple[int, socket.socket]:
    """Return the first of two free ports, and a socket on the port after them.

    All three are below the ports that systems assign when any port will do.
    """
    for first in range(20000, 30000, 3):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in (first, first + 1):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first, socket.create_server(("127.0.0.1", first + 2))
    raise AssertionError("no three free ports in a row")


@pytest.mark.parametrize("limit", ["connections", "connections_of_host"])
async def test_a_leased_port_limits_its_connections(limit: str) -> None:
    async with leased_port(replace(GENEROUS, **{limit: 2})) as (lender, borrower, port), client_transport() as client:
        streams = [await client.connect(f"{port.address}#{borrower.pin}", kind) for kind in (CONTROL, LINK)]
        await wait_until(lambda: lender.port_lender.connections == 2)
        async with client_transport() as other:
            with pytest.raises(SwarmError):
                await ping(other, f"{port.address}#{borrower.pin}")
        await streams[0].send(Ping(1))
        assert await asyncio.wait_for(streams[0].receive(), SOON_S) == Pong(1)


async def test_waiting_connections_are_limited() -> None:
    limits = replace(GENEROUS, connections=500, connections_of_host=500)
    async with peer(limits) as lender, client_transport() as borrower:
        stream, leased = await request_lease(borrower, lender)
        writers = [(await asyncio.open_connection("127.0.0.1", leased.port))[1] for _ in range(300)]
        # The stream takes some of the tokens.  No connection is kept whose token has no room in the queue.
        (lease,) = lender.port_lender._leases
        await wait_until(lambda: lease.refused + lease.connections >= 300)
        await wait_until(lambda: len(lease._waiting) == lease.connections)
        for writer in writers:
            writer.close()
        await stream.end()


# ---------------------------------------------------------------- faulty lenders


async def test_a_borrower_leaves_a_lender_that_sends_a_wrong_message() -> None:
    async def send_pong(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        await stream.send(PortLeased(1, 1))
        await stream.send(Pong(1))
        await stream.receive()

    async with peer() as borrower:
        lender = await borrower.transport.listen("127.0.0.1:0", send_pong)
        async with lease_port(borrower.transport, lender.address, borrower.local) as port:
            with pytest.raises(SwarmError, match="sent Pong"):
                await asyncio.wait_for(port.wait_until_lost(), SOON_S)
        await lender.close()


async def test_a_lender_that_ends_the_stream_is_reported() -> None:
    async def hang_up(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()

    async with peer() as borrower:
        lender = await borrower.transport.listen("127.0.0.1:0", hang_up)
        with pytest.raises(LinkBroken, match="ended the stream"):
            async with lease_port(borrower.transport, lender.address, borrower.local):
                pass
        await lender.close()
