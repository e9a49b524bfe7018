"""Strangers, impostors, machines in the middle, and the files that hold secrets."""

import asyncio
import contextlib
import os
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
from treeswarm.transport.tls import Security

CONTROL = StreamKind.CONTROL
KEY, OTHER_KEY = new_swarm_key().encode(), new_swarm_key().encode()


async def echo(kind: StreamKind, stream: Stream) -> None:
    """Answers pings until the peer is done."""
    while (message := await stream.receive()) is not None:
        assert isinstance(message, Ping)
        await stream.send(Pong(message.stamp))


def pin_seen(transport: GrpcTransport, address: str) -> str | None:
    """Return the pin last seen at an address, or None if it was never dialled."""
    return transport._cache.pins.get(Address.parse(address).bare)


async def ask(transport: GrpcTransport, address: str) -> None:
    """One ping and its pong; raises whatever comes instead."""
    stream = await transport.connect(address, CONTROL)
    await stream.send(Ping(7))
    assert await asyncio.wait_for(stream.receive(), 10) == Pong(7)
    await stream.end()


@contextlib.asynccontextmanager
async def node(
    swarm_key: bytes | None = None, listen: str = "127.0.0.1:0"
) -> AsyncIterator[tuple[str, str, GrpcTransport]]:
    """A listening transport: its address, its pin, itself."""
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
async def in_the_middle(of: str, folder: Path) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Ends the TLS of whoever dials it with a key of its own, and passes on what it can now read."""
    own, heard = Identity.ephemeral(), []
    (folder / "own.pem").write_bytes(own.key_pem + own.certificate_pem)
    front = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    front.load_cert_chain(folder / "own.pem")
    back = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    back.check_hostname, back.verify_mode = False, ssl.CERT_NONE
    for context in (front, back):
        context.set_alpn_protocols(["h2"])
    inside: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                heard.append(data)
                writer.write(data)

    async def enter(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = Address.parse(of)
        inner_reader, inner_writer = await asyncio.open_connection(there.host, there.port, ssl=back)
        try:
            await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))
        finally:
            inner_writer.transport.abort()
            writer.transport.abort()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside.add(asyncio.ensure_future(enter(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=front)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", heard
    finally:
        server.close()
        for task in inside:
            task.cancel()
        await asyncio.gather(*inside, return_exceptions=True)


# ---------------------------------------------------------------- pins


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
async def test_a_pinned_address_reaches_the_node_it_names(host: str) -> None:
    async with node(listen=f"{host}:0") as (address, pin, _), dialler() as client:
        assert pin_seen(client, address) is None
        await ask(client, f"{address}#{pin}")
        await ask(client, address)
        assert pin_seen(client, address) == pin_seen(client, f"{address}#{pin}") == pin


async def test_another_key_than_the_pinned_one_is_an_impostor() -> None:
    async with node() as (address, pin, _), dialler() as client:
        wrong = "0" * 32
        for _ in range(2):
            with pytest.raises(Impostor, match=f"{address} answered with the key {pin} instead of {wrong}.*middle"):
                await ask(client, f"{address}#{wrong}")
        assert pin_seen(client, address) is None
        await ask(client, address)
        with pytest.raises(Impostor):  # also where the certificate is known and a connection is open
            await ask(client, f"{address}#{wrong}")
        assert client.refused == {"impostor": 3}


async def test_a_machine_in_the_middle_is_refused_by_the_pin(tmp_path: Path) -> None:
    async with (
        node() as (address, pin, _),
        in_the_middle(address, tmp_path) as (middle, heard),
        dialler() as client,
        dialler() as careless,
    ):
        with pytest.raises(Impostor):
            await ask(client, f"{middle}#{pin}")
        assert not any(b"treeswarm" in data for data in heard)  # no call was made
        await ask(careless, middle)  # without a pin it gets through: the test's machine does stand in the middle
        assert pin_seen(careless, middle) not in {None, pin}


async def test_a_machine_in_the_middle_gains_nothing_from_a_proof_of_the_swarm_key(tmp_path: Path) -> None:
    async with (
        node(KEY) as (address, _, served),
        in_the_middle(address, tmp_path) as (middle, heard),
        dialler(KEY) as client,
    ):
        with pytest.raises(Refused, match="took another machine for this node") as refused:
            await ask(client, middle)
        assert refused.value.code == "wrong-swarm-key"
        assert any(b"treeswarm-swarm-key" in data for data in heard)  # it had the proof, and passed it on
        assert served.refused == {"wrong-swarm-key": 1}


async def test_a_node_started_anew_under_another_identity(caplog: pytest.LogCaptureFixture) -> None:
    async with dialler() as client:
        async with node() as (address, pin, _):
            await ask(client, address)
        with pytest.raises(Unreachable):
            await ask(client, address)
        async with node(listen=address) as (_, new_pin, _):
            with pytest.raises(Impostor, match=f"{new_pin} instead of {pin}"):
                await ask(client, f"{address}#{pin}")
            await ask(client, address)
            assert pin_seen(client, address) == new_pin
            assert f"{address} answers with the key {new_pin}, earlier with {pin}" in caplog.text


async def test_a_known_certificate_whose_node_changed_is_fetched_again() -> None:
    async with dialler() as client:
        async with node() as (address, _, _):
            await ask(client, address)
        async with node(listen=address) as (_, new_pin, _):
            await ask(client, f"{address}#{new_pin}")


# ---------------------------------------------------------------- private swarms


async def test_members_of_a_private_swarm_reach_each_other() -> None:
    async with node(KEY) as (address, pin, served), dialler(KEY) as client:
        for kind in StreamKind:
            await (await client.connect(f"{address}#{pin}", kind)).end()
        await ask(client, address)
        assert served.refused == {}


@pytest.mark.parametrize(
    ("theirs", "words"), [(None, "has no swarm key"), (OTHER_KEY, "has another swarm key")], ids=["none", "another"]
)
async def test_a_caller_from_outside_is_refused_by_the_node(theirs: bytes | None, words: str) -> None:
    async with node(KEY) as (address, _, served), dialler(theirs) as client:
        with pytest.raises(Refused, match=rf"private swarm.*{words}.*--swarm-key PATH") as refused:
            await ask(client, address)
        assert refused.value.code == "wrong-swarm-key"
        assert served.refused == {"wrong-swarm-key": 1}


async def test_a_node_from_outside_is_refused_by_the_caller() -> None:
    async with node() as (address, _, _), dialler(KEY) as client:
        with pytest.raises(Refused, match=f"{address} does not know this private swarm's key") as refused:
            await ask(client, address)
        assert refused.value.code == "wrong-swarm-key"
        assert client.refused == {"wrong-swarm-key": 1}


# ---------------------------------------------------------------- strangers


async def test_a_peer_without_tls_is_told_apart() -> None:
    plain = GrpcTransport()
    listener = await plain.listen("127.0.0.1:0", echo)
    async with dialler() as client:
        with pytest.raises(Unreachable, match=f"the server at {listener.address} is no swarm-node"):
            await ask(client, listener.address)
    async with node() as (address, _, _):
        with pytest.raises(SwarmError, match=address):
            await ask(plain, address)
    await listener.close()
    await plain.close()


@contextlib.asynccontextmanager
async def stranger(says: bytes = b"", *, stays: bool = False, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server of something else: says its word at once, and goes or stays."""
    gone = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        if stays:
            await gone.wait()
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        gone.set()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("says", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"", bytes(100)])
async def test_what_speaks_another_protocol_is_told_apart(says: bytes) -> None:
    async with stranger(says) as address, dialler() as client:
        with pytest.raises(Unreachable, match=f"{address}.*check the (port|address)"):
            await ask(client, address)


async def test_tls_that_is_not_ours_is_told_apart(tmp_path: Path) -> None:
    own = Identity.ephemeral()
    (tmp_path / "own.pem").write_bytes(own.key_pem + own.certificate_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem")
    async with stranger(tls=context) as address, dialler() as client:
        with pytest.raises(Unreachable, match=r"TLS is for another protocol.*check the port"):
            await ask(client, address)


async def test_silence_is_not_waited_out_for_ever() -> None:
    async with stranger(stays=True) as address, dialler(connect_s=0.3) as client:
        with pytest.raises(Unreachable, match="no answer in time"):
            await ask(client, address)


# ---------------------------------------------------------------- keys and their files


def test_an_identity_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "identity.pem"
    made, found = Identity.load_or_create(path), Identity.load_or_create(path)
    assert (made.node_id, made.pin, made.public_key) == (found.node_id, found.pin, found.public_key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.node_id == node_id(made.public_key) != Identity.ephemeral().node_id
    assert len(made.node_id) == len(made.pin) == 32
    assert made.key_pem.decode() not in repr(made)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_an_identity_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(BadRequest, match=f"others.*{mode:04o}.*chmod 600 {path}"):
        Identity.load_or_create(path)


def test_a_damaged_identity_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "identity.pem", tmp_path / "other.pem"
    Identity.load_or_create(path)
    Identity.load_or_create(other)
    whole = path.read_bytes()
    foreign = whole[: whole.index(b"-----BEGIN CERT")] + other.read_bytes()[whole.index(b"-----BEGIN CERT") :]
    for damaged in (b"", whole[:-60], whole[:100] + b"!" + whole[101:], whole * 2, os.urandom(500), foreign):
        path.write_bytes(damaged)
        with pytest.raises(BadRequest, match=r"damaged.*backup"):
            Identity.load_or_create(path)


def test_an_identity_that_cannot_be_kept_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "identity.pem"):
        with pytest.raises(BadRequest, match="--identity PATH"):
            Identity.load_or_create(path)


def test_a_signature_is_its_makers_and_its_texts_alone() -> None:
    one, other = Identity.ephemeral(), Identity.ephemeral()
    signature = one.sign(b"text")
    assert verify(one.public_key, signature, b"text")
    assert not verify(other.public_key, signature, b"text")
    assert not verify(one.public_key, signature, b"another text")
    assert not verify(one.public_key, signature[:-1], b"text")
    assert not verify(b"no key", signature, b"text")


def test_a_swarm_key_is_read_and_checked(tmp_path: Path) -> None:
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
def test_a_pinned_address_reads_and_prints(text: str) -> None:
    assert str(Address.parse(text)) == text
    assert Address.parse(text).bare == text.partition("#")[0]


@pytest.mark.parametrize("pin", ["", "a", "a" * 31, "a" * 33, "A" * 32, "g" * 32, "a" * 32 + "\n", "a" * 32 + "#"])
def test_what_is_no_pin(pin: str) -> None:
    with pytest.raises(BadRequest, match="pin"):
        Address.parse(f"127.0.0.1:4001#{pin}")
