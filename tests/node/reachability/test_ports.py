"""Rented ports over real TCP and TLS on loopback: a node that listens for itself alone, and strangers who reach it."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
from tests.support.port_peers import (
    CONTROL,
    LINK,
    OPEN_HANDED,
    SOON_S,
    Peer,
    ask,
    is_closed,
    peer,
    port_of,
    stranger,
    until,
)

from treeswarm.errors import Impostor, LinkBroken, Refused, SwarmError, TransportError
from treeswarm.protocol.messages import (
    Answers,
    Append,
    DialBack,
    DialledBack,
    FaultCode,
    LeasePort,
    LinkHello,
    Ping,
    Pong,
    PortLeased,
)
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_node.config import LendingConfig
from treeswarm_node.reachability.port_borrower import LeasedPort, lease_port


@contextlib.asynccontextmanager
async def tenancy(limits: LendingConfig = OPEN_HANDED) -> AsyncIterator[tuple[Peer, Peer, LeasedPort]]:
    """PortLender, tenant, and the port between them."""
    async with (
        peer(limits) as landlord,
        peer() as tenant,
        lease_port(tenant.transport, landlord.address, tenant.local, tenant.node.forwarded_ports) as port,
    ):
        yield landlord, tenant, port


def frame(seq: int, size: int) -> Append:
    empty = np.empty(0, np.uint32)
    return Append(
        epoch=0, seq=seq, commit=empty, first_id=1, parents=empty, tokens=empty, prefill=False, answers=Answers.NONE,
        settings=SamplingSettings(), skipped=np.empty(0, np.bool_), hidden=bytes(size),
    )  # fmt: skip


# ---------------------------------------------------------------- it works


async def test_strangers_reach_the_tenant_by_control_and_by_link() -> None:
    async with tenancy() as (_, tenant, port), stranger() as client:
        address = f"{port.address}#{tenant.pin}"
        await ask(client, address)
        link = await client.connect(address, LINK)
        await link.send(LinkHello(1, b"s" * 16, 0, b"t" * 16))
        for seq in range(3):
            await link.send(frame(seq, 1 << 20))
        await link.end()
        assert isinstance(await asyncio.wait_for(tenant.heard.get(), SOON_S), LinkHello)
        for seq in range(3):
            got = await asyncio.wait_for(tenant.heard.get(), SOON_S)
            assert isinstance(got, Append)
            assert (got.seq, len(got.hidden)) == (seq, 1 << 20)
        assert await asyncio.wait_for(tenant.heard.get(), SOON_S) is None


async def test_fifty_at_once() -> None:
    async with tenancy() as (landlord, tenant, port), contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(stranger()) for _ in range(50)]
        await asyncio.gather(
            *(ask(client, f"{port.address}#{tenant.pin}", stamp) for stamp, client in enumerate(clients))
        )
        assert landlord.port_lender.connections >= 50


async def test_an_end_of_one_is_an_end_of_the_other() -> None:
    async with tenancy() as (landlord, tenant, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(port.address))
        await until(lambda: tenant.node.forwarded_ports)
        writer.close()
        await until(lambda: landlord.port_lender.connections == 0)
        await until(lambda: not tenant.node.forwarded_ports)


# ---------------------------------------------------------------- trust


async def test_a_landlord_cannot_pose_as_its_tenant() -> None:
    """It answers the rented port itself, with its own key: strangers who ask for the tenant's say nothing to it."""
    async with tenancy() as (landlord, tenant, port), stranger() as client:
        impostor = await landlord.transport.listen("127.0.0.1:0", landlord.node.accept)
        with pytest.raises(Impostor):
            await ask(client, f"{impostor.address}#{tenant.pin}")
        await impostor.close()
        with pytest.raises(Impostor):
            await ask(client, f"{port.address}#{landlord.pin}")


async def test_a_visitor_cannot_have_the_tenants_own_machine_dialled() -> None:
    """Through a rented port everybody has the tenant's own address, and would be dialled back there."""
    async with tenancy() as (_, tenant, port), stranger() as client:
        stream = await client.connect(f"{port.address}#{tenant.pin}", CONTROL)
        await stream.send(DialBack("127.0.0.1:22"))
        with pytest.raises(Refused, match="cannot be seen"):
            await asyncio.wait_for(stream.receive(), SOON_S)
        direct = await client.connect(tenant.address, CONTROL)
        await direct.send(DialBack(f"0.0.0.0:{port_of(tenant.address)}#{tenant.pin}"))
        assert await asyncio.wait_for(direct.receive(), SOON_S) == DialledBack(True, tenant.local)
        await direct.end()


async def test_garbage_at_the_fetch_port_is_nobodys() -> None:
    async with tenancy() as (landlord, tenant, port), stranger() as client:
        for said in (b"", b"short", b"x" * 16, b"x" * 100_000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port._fetch_at.port)
            writer.write(said)
            writer.write_eof()
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), SOON_S) == b""
            writer.close()
        await until(lambda: not landlord.port_lender._fetching)
        await ask(client, f"{port.address}#{tenant.pin}")


async def test_whoever_says_no_token_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeswarm_node.reachability.port_lender.TOKEN_S", 0.1)
    async with tenancy() as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port._fetch_at.port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), SOON_S) == b""
        writer.close()


async def test_silent_guests_do_not_fill_the_fetch_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treeswarm_node.reachability.port_lender.FETCHING_OF_HOST", 2)
    async with tenancy() as (landlord, _, port):
        writers = [(await asyncio.open_connection("127.0.0.1", port._fetch_at.port))[1] for _ in range(5)]
        await until(lambda: len(landlord.port_lender._fetching) == 2)
        for writer in writers:
            writer.close()


async def test_a_token_is_good_for_one_connection() -> None:
    async with peer() as landlord, stranger() as tenant:
        stream, rented = await _rented(tenant, landlord)
        _, guest = await asyncio.open_connection("127.0.0.1", rented.port)
        guest.write(b"hello")
        incoming = await asyncio.wait_for(stream.receive(), SOON_S)
        token = incoming.token  # type: ignore[union-attr]
        first, first_writer = await asyncio.open_connection("127.0.0.1", rented.fetch_port)
        first_writer.write(token)
        assert await asyncio.wait_for(first.readexactly(5), SOON_S) == b"hello"
        second, second_writer = await asyncio.open_connection("127.0.0.1", rented.fetch_port)
        second_writer.write(token)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(second.read(), SOON_S) == b""
        guest.write(b"again")
        assert await asyncio.wait_for(first.readexactly(5), SOON_S) == b"again"
        for writer in (guest, first_writer, second_writer):
            writer.close()
        await stream.end()


async def _rented(transport: GrpcTransport, landlord: Peer) -> tuple[Stream, PortLeased]:
    """As a tenant of one's own making."""
    stream = await transport.connect(landlord.address, CONTROL)
    await stream.send(LeasePort(1))
    rented = await asyncio.wait_for(stream.receive(), SOON_S)
    assert isinstance(rented, PortLeased)
    return stream, rented


# ---------------------------------------------------------------- ends


async def test_when_the_tenant_goes_the_port_closes() -> None:
    async with peer() as landlord, peer() as tenant, stranger() as client:
        async with lease_port(tenant.transport, landlord.address, tenant.local) as port:
            stream = await client.connect(f"{port.address}#{tenant.pin}", CONTROL)
        with pytest.raises(TransportError):
            await asyncio.wait_for(stream.receive(), SOON_S)
        await until(lambda: landlord.port_lender.lease_count == 0)
        assert await is_closed(port_of(port.address))
        assert await is_closed(port._fetch_at.port)
        assert landlord.port_lender.connections == 0


async def test_when_the_landlord_goes_the_tenant_is_told() -> None:
    async with peer() as tenant, contextlib.AsyncExitStack() as stack:
        landlord = await stack.enter_async_context(peer())
        async with (
            lease_port(tenant.transport, landlord.address, tenant.local, tenant.node.forwarded_ports) as port,
            stranger() as one,
        ):
            stream = await one.connect(f"{port.address}#{tenant.pin}", CONTROL)
            await stack.aclose()
            with pytest.raises(TransportError):
                await asyncio.wait_for(port.wait_until_lost(), SOON_S)
            with pytest.raises(TransportError):
                await asyncio.wait_for(stream.receive(), SOON_S)
            await until(lambda: not tenant.node.forwarded_ports)


async def test_a_stranger_that_nobody_fetches_is_let_go() -> None:
    async with peer(wait_s=0.1) as landlord, stranger() as tenant:
        stream, rented = await _rented(tenant, landlord)
        reader, writer = await asyncio.open_connection("127.0.0.1", rented.port)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), SOON_S) == b""
        writer.close()
        await until(lambda: landlord.port_lender.connections == 0)
        await stream.end()


async def test_a_tenant_whose_own_port_is_closed_turns_strangers_away() -> None:
    async with (
        peer(wait_s=0.2) as landlord,
        stranger() as client,
        lease_port(client, landlord.address, "127.0.0.1:1") as port,
    ):
        with pytest.raises(TransportError):
            await ask(client, port.address)
        assert not port._ends


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("limits", "code", "words"),
    [
        (replace(OPEN_HANDED, ports=0), FaultCode.REFUSED, "lends no ports"),
        (replace(OPEN_HANDED, ports=1), FaultCode.TOO_MANY, "all 1 ports"),
        (replace(OPEN_HANDED, ports_to_host=1), FaultCode.TOO_MANY, "your address rents 1"),
    ],
)
async def test_a_landlord_lends_so_many_ports(limits: LendingConfig, code: FaultCode, words: str) -> None:
    async with peer(limits) as landlord, peer() as tenant, contextlib.AsyncExitStack() as stack:
        if limits.ports:
            await stack.enter_async_context(lease_port(tenant.transport, landlord.address, tenant.local))
        with pytest.raises(Refused, match=words) as refused:
            await stack.enter_async_context(lease_port(tenant.transport, landlord.address, tenant.local))
        assert refused.value.code == code


async def test_a_landlord_that_is_a_tenant_lends_nothing() -> None:
    async with peer(reachable=False) as landlord, peer() as tenant:
        with pytest.raises(Refused, match="lends no ports"):
            async with lease_port(tenant.transport, landlord.address, tenant.local):
                pass


async def test_one_stream_rents_one_port_in_one_version() -> None:
    async with peer() as landlord, stranger() as tenant:
        stream, rented = await _rented(tenant, landlord)
        await stream.send(LeasePort(1))
        with pytest.raises(Refused, match="has its port"):
            await asyncio.wait_for(stream.receive(), SOON_S)
        await until(lambda: landlord.port_lender.lease_count == 0)
        assert await is_closed(rented.port)
        other = await tenant.connect(landlord.address, CONTROL)
        await other.send(LeasePort(99))
        with pytest.raises(Refused, match="protocol 99"):
            await asyncio.wait_for(other.receive(), SOON_S)


async def test_a_landlord_lends_the_ports_it_was_told_to() -> None:
    first, taken = _three_ports()
    with taken:
        limits = replace(OPEN_HANDED, ports=2)
        async with peer(limits, first_port=first) as landlord, stranger() as tenant:
            stream, rented = await _rented(tenant, landlord)
            assert (rented.fetch_port, rented.port) == (first, first + 1)
            with pytest.raises(Refused, match="no port can be opened"):
                await _rented(tenant, landlord)
            await stream.end()


def _three_ports() -> tuple[int, socket.socket]:
    """The first of two free ones, and the next, taken; below those that systems give to whoever asks for any."""
    for first in range(20000, 30000, 3):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in (first, first + 1):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first, socket.create_server(("127.0.0.1", first + 2))
    raise AssertionError("no three free ports in a row")


@pytest.mark.parametrize("limit", ["connections", "connections_of_host"])
async def test_a_port_takes_so_many_connections(limit: str) -> None:
    async with tenancy(replace(OPEN_HANDED, **{limit: 2})) as (landlord, tenant, port), stranger() as client:
        held = [await client.connect(f"{port.address}#{tenant.pin}", kind) for kind in (CONTROL, LINK)]
        await until(lambda: landlord.port_lender.connections == 2)
        async with stranger() as another:
            with pytest.raises(SwarmError):
                await ask(another, f"{port.address}#{tenant.pin}")
        await held[0].send(Ping(1))
        assert await asyncio.wait_for(held[0].receive(), SOON_S) == Pong(1)


async def test_so_many_strangers_wait() -> None:
    limits = replace(OPEN_HANDED, connections=500, connections_of_host=500)
    async with peer(limits) as landlord, stranger() as tenant:
        stream, rented = await _rented(tenant, landlord)
        writers = [(await asyncio.open_connection("127.0.0.1", rented.port))[1] for _ in range(300)]
        # The stream takes some of the tokens; nobody is kept for whom there is no room to tell.
        (tenancy,) = landlord.port_lender._tenancies
        await until(lambda: tenancy.refused + tenancy.connections >= 300)
        await until(lambda: len(tenancy._waiting) == tenancy.connections)
        for writer in writers:
            writer.close()
        await stream.end()


# ---------------------------------------------------------------- landlords that are none


async def test_a_tenant_drops_all_when_its_landlord_talks_nonsense() -> None:
    async def nonsense(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        await stream.send(PortLeased(1, 1))
        await stream.send(Pong(1))
        await stream.receive()

    async with peer() as tenant:
        landlord = await tenant.transport.listen("127.0.0.1:0", nonsense)
        async with lease_port(tenant.transport, landlord.address, tenant.local) as port:
            with pytest.raises(SwarmError, match="sent Pong"):
                await asyncio.wait_for(port.wait_until_lost(), SOON_S)
        await landlord.close()


async def test_a_landlord_that_does_not_answer_or_hangs_up() -> None:
    async def hang_up(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()

    async with peer() as tenant:
        landlord = await tenant.transport.listen("127.0.0.1:0", hang_up)
        with pytest.raises(LinkBroken, match="ended the stream"):
            async with lease_port(tenant.transport, landlord.address, tenant.local):
                pass
        await landlord.close()
