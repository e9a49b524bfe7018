"""Tests of pins, private swarms, machines in the middle, and the files that contain secrets."""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.swarm_keys import new_swarm_key

from treeswarm.errors import BadRequest, Impostor, Refused, SwarmError, Unreachable
from treeswarm.keys import Identity, node_id, read_swarm_key, verify
from treeswarm.protocol.address import Address
from treeswarm.protocol.messages import Ping, Pong
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm.transport.tls import Security, fetch_certificate

CONTROL = StreamKind.CONTROL
KEY, OTHER_KEY = new_swarm_key().encode(), new_swarm_key().encode()


async def echo(kind: StreamKind, stream: Stream) -> None:
    """Answer pings until the peer ends the stream."""
    while (message := await stream.receive()) is not None:
        assert isinstance(message, Ping)
        await stream.send(Pong(message.stamp))


def pin_seen(transport: GrpcTransport, address: str) -> str | None:
    """Return the pin last seen at an address, or None if it was never dialled."""
    return transport._cache.pins.get(Address.parse(address).bare)


async def ping(transport: GrpcTransport, address: str) -> None:
    """Send one ping and check its pong."""
    stream = await transport.connect(address, CONTROL)
    await stream.send(Ping(7))
    assert await asyncio.wait_for(stream.receive(), 10) == Pong(7)
    await stream.end()


@contextlib.asynccontextmanager
async def node(
    swarm_key: bytes | None = None, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[str, str, GrpcTransport]]:
    """Yield the address, the pin and the transport of a listening node."""
    identity = Identity.ephemeral()
    transport = GrpcTransport(security=Security(identity, swarm_key))
    listener = await transport.listen(listen, echo)
    try:
        yield listener.address, identity.pin, transport
    finally:
        await listener.close()
        await transport.close()


@contextlib.asynccontextmanager
async def dialler(swarm_key: bytes | None = None, connect_s: float = 5.0) -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(connect_s, Security(swarm_key=swarm_key))
    try:
        yield transport
    finally:
        await transport.close()


@contextlib.asynccontextmanager
async def machine_in_the_middle(target: str, folder: Path) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Terminate TLS with a key of its own, and forward the decrypted bytes to `target`.

    Yields the address and the list of decrypted bytes.
    """
    own, overheard = Identity.ephemeral(), []
    (folder / "own.pem").write_bytes(own.key_pem + own.certificate_pem)
    front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    front.load_cert_chain(folder / "own.pem")
    back = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    back.check_hostname, back.verify_mode = False, ssl.CERT_NONE
    for context in (front, back):
        context.set_alpn_protocols(["h2"])
    forwarding: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                overheard.append(data)
                writer.write(data)

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        address = Address.parse(target)
        inner_reader, inner_writer = await asyncio.open_connection(address.host, address.port, ssl=back)
        try:
            await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))
        finally:
            inner_writer.transport.abort()
            writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwarding.add(asyncio.ensure_future(forward(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=front)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", overheard
    finally:
        server.close()
        for task in forwarding:
            task.cancel()
        await asyncio.gather(*forwarding, return_exceptions=True)


# ---------------------------------------------------------------- pins


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_pinned_address_reaches_its_node(host: str) -> None:
    async with node(listen=f"{host}:0") as (address, pin, _), dialler() as client:
        assert pin_seen(client, address) is None
        await ping(client, f"{address}#{pin}")
        await ping(client, address)
        assert pin_seen(client, address) == pin_seen(client, f"{address}#{pin}") == pin


async def test_a_black_hole_before_a_living_address_of_a_name_is_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name has an IPv6 address that no packet comes back from, and an IPv4 address at which the node listens."""
    loop, dialled, hole = asyncio.get_running_loop(), list[str](), "2001:db8::1"
    connect = loop.sock_connect

    async def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        kinds = ((socket.AF_INET6, (hole, port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port)))
        return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address) for family, address in kinds]

    async def connect_or_hang(own: socket.socket, address: tuple[str, int]) -> None:
        dialled.append(address[0])
        await (asyncio.Event().wait() if address[0] == hole else connect(own, address))

    async with node() as (address, pin, _):
        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        monkeypatch.setattr(loop, "sock_connect", connect_or_hang)
        port = Address.parse(address).port
        assert (await fetch_certificate(Address("node.example.org", port), within_s=30.0)).pin == pin
    assert dialled == [hole, "127.0.0.1"]


async def test_node_with_another_key_than_the_pin_is_an_impostor() -> None:
    async with node() as (address, pin, _), dialler() as client:
        wrong = "0" * 32
        for _ in range(2):
            with pytest.raises(Impostor, match=f"{address} answered with the key {pin} instead of {wrong}.*middle"):
                await ping(client, f"{address}#{wrong}")
        assert pin_seen(client, address) is None
        await ping(client, address)
        with pytest.raises(Impostor):  # Also when the certificate is cached and a connection is open.
            await ping(client, f"{address}#{wrong}")
        assert client.refused == {"impostor": 3}


async def test_pin_detects_a_machine_in_the_middle(tmp_path: Path) -> None:
    async with (
        node() as (address, pin, _),
        machine_in_the_middle(address, tmp_path) as (middle, overheard),
        dialler() as client,
        dialler() as careless,
    ):
        with pytest.raises(Impostor):
            await ping(client, f"{middle}#{pin}")
        assert not any(b"treeswarm" in data for data in overheard)  # No call was created.
        await ping(careless, middle)  # Without a pin the call succeeds: the machine does forward.
        assert pin_seen(careless, middle) not in {None, pin}


async def test_machine_in_the_middle_cannot_reuse_a_swarm_key_proof(tmp_path: Path) -> None:
    async with (
        node(KEY) as (address, _, served),
        machine_in_the_middle(address, tmp_path) as (middle, overheard),
        dialler(KEY) as client,
    ):
        with pytest.raises(Refused, match="took another machine for this node") as refused:
            await ping(client, middle)
        assert refused.value.code == "wrong-swarm-key"
        assert any(b"treeswarm-swarm-key" in data for data in overheard)  # It received the proof and forwarded it.
        assert served.refused == {"wrong-swarm-key": 1}


async def test_new_identity_at_a_known_address_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with dialler() as client:
        async with node() as (address, pin, _):
            await ping(client, address)
        with pytest.raises(Unreachable):
            await ping(client, address)
        async with node(listen=address) as (_, new_pin, _):
            with pytest.raises(Impostor, match=f"{new_pin} instead of {pin}"):
                await ping(client, f"{address}#{pin}")
            await ping(client, address)
            assert pin_seen(client, address) == new_pin
            assert f"{address} answers with the key {new_pin}, earlier with {pin}" in caplog.text


async def test_outdated_certificate_is_fetched_again() -> None:
    async with dialler() as client:
        async with node() as (address, _, _):
            await ping(client, address)
        async with node(listen=address) as (_, new_pin, _):
            await ping(client, f"{address}#{new_pin}")


# ---------------------------------------------------------------- private swarms


async def test_members_of_a_private_swarm_reach_each_other() -> None:
    async with node(KEY) as (address, pin, served), dialler(KEY) as client:
        for kind in StreamKind:
            await (await client.connect(f"{address}#{pin}", kind)).end()
        await ping(client, address)
        assert served.refused == {}


@pytest.mark.parametrize(
    ("swarm_key", "message"),
    [(None, "has no swarm key"), (OTHER_KEY, "has another swarm key")],
    ids=["none", "another"],
)
async def test_node_refuses_a_caller_without_the_swarm_key(swarm_key: bytes | None, message: str) -> None:
    async with node(KEY) as (address, _, served), dialler(swarm_key) as client:
        with pytest.raises(Refused, match=rf"private swarm.*{message}.*--swarm-key PATH") as refused:
            await ping(client, address)
        assert refused.value.code == "wrong-swarm-key"
        assert served.refused == {"wrong-swarm-key": 1}


async def test_caller_refuses_a_node_without_the_swarm_key() -> None:
    async with node() as (address, _, _), dialler(KEY) as client:
        with pytest.raises(Refused, match=f"{address} does not know this private swarm's key") as refused:
            await ping(client, address)
        assert refused.value.code == "wrong-swarm-key"
        assert client.refused == {"wrong-swarm-key": 1}


# ---------------------------------------------------------------- other protocols


async def test_peer_without_tls_is_reported() -> None:
    plain = GrpcTransport()
    listener = await plain.listen("127.0.0.1:0", echo)
    async with dialler() as client:
        with pytest.raises(Unreachable, match=f"the server at {listener.address} is no swarm-node"):
            await ping(client, listener.address)
    async with node() as (address, _, _):
        with pytest.raises(SwarmError, match=address):
            await ping(plain, address)
    await listener.close()
    await plain.close()


@contextlib.asynccontextmanager
async def other_server(
    greeting: bytes = b"", *, stays: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Run a server of another protocol that sends a greeting, then disconnects or (`stays`) waits."""
    finished = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        if stays:
            await finished.wait()
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finished.set()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"", bytes(100)])
async def test_server_of_another_protocol_is_reported(greeting: bytes) -> None:
    async with other_server(greeting) as address, dialler() as client:
        with pytest.raises(Unreachable, match=f"{address}.*check the (port|address)"):
            await ping(client, address)


async def test_tls_of_another_protocol_is_reported(tmp_path: Path) -> None:
    own = Identity.ephemeral()
    (tmp_path / "own.pem").write_bytes(own.key_pem + own.certificate_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem")
    async with other_server(tls=context) as address, dialler() as client:
        with pytest.raises(Unreachable, match=r"TLS is for another protocol.*check the port"):
            await ping(client, address)


async def test_connecting_to_a_silent_server_times_out() -> None:
    async with other_server(stays=True) as address, dialler(connect_s=0.3) as client:
        with pytest.raises(Unreachable, match="no answer in time"):
            await ping(client, address)


# ---------------------------------------------------------------- keys and their files


def test_identity_file_is_created_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.pem"
    created, loaded = Identity.load_or_create(path), Identity.load_or_create(path)
    assert (created.node_id, created.pin, created.public_key) == (loaded.node_id, loaded.pin, loaded.public_key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert created.node_id == node_id(created.public_key) != Identity.ephemeral().node_id
    assert len(created.node_id) == len(created.pin) == 32
    assert created.key_pem.decode() not in repr(created)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_identity_file_readable_by_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(BadRequest, match=f"other users.*{mode:04o}.*chmod 600 {path}"):
        Identity.load_or_create(path)


def test_damaged_identity_file_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "identity.pem", tmp_path / "other.pem"
    Identity.load_or_create(path)
    Identity.load_or_create(other)
    whole = path.read_bytes()
    foreign = whole[: whole.index(b"-----BEGIN CERT")] + other.read_bytes()[whole.index(b"-----BEGIN CERT") :]
    for damaged in (b"", whole[:-60], whole[:100] + b"!" + whole[101:], whole * 2, os.urandom(500), foreign):
        path.write_bytes(damaged)
        with pytest.raises(BadRequest, match=r"damaged.*backup"):
            Identity.load_or_create(path)


def test_identity_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "identity.pem"):
        with pytest.raises(BadRequest, match="--identity PATH"):
            Identity.load_or_create(path)


def test_signature_is_valid_for_one_key_and_one_text() -> None:
    signer, other = Identity.ephemeral(), Identity.ephemeral()
    signature = signer.sign(b"text")
    assert verify(signer.public_key, signature, b"text")
    assert not verify(other.public_key, signature, b"text")
    assert not verify(signer.public_key, signature, b"another text")
    assert not verify(signer.public_key, signature[:-1], b"text")
    assert not verify(b"no key", signature, b"text")


def test_swarm_key_is_read_and_weak_keys_are_refused(tmp_path: Path) -> None:
    path, text = tmp_path / "swarm.key", new_swarm_key()
    path.write_text(f"{text}\n")
    path.chmod(0o600)
    assert read_swarm_key(path) == read_swarm_key(text) == text.encode()
    assert repr(text) not in repr(Security(swarm_key=text.encode()))
    for weak in ("", "secret", "a" * 64):
        with pytest.raises(BadRequest, match="easy to guess"):
            read_swarm_key(weak)
    with pytest.raises(BadRequest, match=r"cannot be read.*openssl rand"):
        read_swarm_key(tmp_path / "none")
    path.chmod(0o644)
    with pytest.raises(BadRequest, match="chmod 600"):
        read_swarm_key(path)


@pytest.mark.parametrize("text", ["127.0.0.1:4001#" + "a" * 32, "[::1]:4001#" + "0" * 32, "host:1"])
def test_pinned_address_is_parsed_and_printed(text: str) -> None:
    assert str(Address.parse(text)) == text
    assert Address.parse(text).bare == text.partition("#")[0]


@pytest.mark.parametrize("pin", ["", "a", "a" * 31, "a" * 33, "A" * 32, "g" * 32, "a" * 32 + "\n", "a" * 32 + "#"])
def test_malformed_pin_is_refused(pin: str) -> None:
    with pytest.raises(BadRequest, match="pin"):
        Address.parse(f"127.0.0.1:4001#{pin}")
