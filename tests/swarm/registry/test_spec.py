"""What `--registry` may say, and what is said of the rest."""

from pathlib import Path

import pytest
from tests.support.registry_media import MODEL, Node

from treeswarm.errors import BadRequest
from treeswarm.registry import client_registry, open_registry, peers_registry, registry_kind, shareable_spec
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.spec import Broker, parse_dht_peers
from treeswarm.transport.memory import MemoryNetwork

MADDR = "/ip4/10.0.0.1/tcp/4002/p2p/12D3KooWQYhTNQdmr3ArTeUHRYzFg94BKyTkoWBDWez9kSCVe2Xo"


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("none", "none"),
        ("dht:", "dht"),
        (f"dht:{MADDR},{MADDR}", "dht"),
        ("mqtt://broker/ns", "mqtt"),
        ("mqtts://u:p@broker:1/ns", "mqtt"),
        ("static:10.0.0.1:1", "static"),
        ("10.0.0.1:1, 10.0.0.2:2", "peers"),
        ("[::1]:4001", "peers"),
    ],
)
def test_kinds(spec: str, kind: str) -> None:
    assert registry_kind(spec) == kind


@pytest.mark.parametrize("spec", ["", "mqtt:broker", "http://x/y", "10.0.0.1", "host:port", "None", ","])
def test_what_names_no_registry_gets_examples(spec: str) -> None:
    with pytest.raises(BadRequest, match=r"names no registry: give 'dht:'.*mqtts://.*static:"):
        registry_kind(spec)


def test_a_broker_is_read_from_its_address(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    assert Broker.parse("mqtt://broker/a/b") == Broker("broker", 1883, "a/b")
    read = Broker.parse(f"mqtts://al%40ice:p%2Fw@[::1]:99/ns/?ca={ca}")
    assert read == Broker("::1", 99, "ns", tls=True, user="al@ice", password="p/w", ca=ca)
    assert Broker.parse("mqtts://broker/ns").port == 8883
    assert str(read) == "mqtts://[::1]:99/ns"
    assert "p/w" not in f"{read} {read!r}"


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ("mqtt:///ns", "names no broker"),
        ("mqtt://broker:99999/ns", "no address of a broker"),
        ("mqtt://broker", "has no namespace"),
        ("mqtt://broker/a/+", "no wildcards"),
        ("mqtt://broker/%23", "no wildcards"),
        ("mqtt://broker/a//b", "no namespace"),
        ("mqtt://broker/$SYS", "no namespace"),
        ("mqtt://broker/" + "a" * 200, "at most 128"),
        ("mqtt://broker/ns?ca=/x.pem", "needs TLS"),
        ("mqtts://broker/ns?ca=/nowhere/x.pem", "is no file"),
        ("mqtts://broker/ns?insecure=1", "'insecure' has no meaning"),
    ],
)
def test_what_is_no_broker(spec: str, what: str) -> None:
    with pytest.raises(BadRequest, match=what):
        Broker.parse(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "mqtts://al:5ec2e7@broker:99999/ns",
        "mqtts://al:5e/c2e7@broker/ns",
        "mqtts://al:1883/5ec2e7@broker/ns",
        "mqtts://al:5e#c2e7@broker/ns",
        "mqtts://al:[5ec2e7@broker/ns",
        "mqtts://al:5ec2e7@broker",
        "mqtts://al:5ec2e7@broker/a//b",
        "mqtts:al:5ec2e7@broker/ns",
        "al:5ec2e7@broker/ns",
    ],
)
async def test_what_is_said_of_a_wrong_one_has_no_password_in_it(spec: str) -> None:
    transport = MemoryNetwork().transport()
    for opening in (open_registry(spec, MODEL, Node().id), client_registry(spec, MODEL, transport)):
        with pytest.raises(BadRequest) as raised:
            await opening
        assert not any(part in str(raised.value) for part in ("5ec2e7", "c2e7", "al:"))


def test_others_are_invited_with_a_user_of_their_own() -> None:
    invited = shareable_spec("mqtts://al%40ice:p%2Fw@[::1]:99/ns/deep?ca=/a@b.pem")
    assert invited == "mqtts://USER:PASSWORD@[::1]:99/ns/deep?ca=/a@b.pem"
    assert shareable_spec("mqtt://broker/ns") == "mqtt://broker/ns"


def test_a_dht_is_joined_by_multiaddresses() -> None:
    assert parse_dht_peers("dht:") == ()
    assert parse_dht_peers(f"dht:{MADDR}, {MADDR}") == (MADDR,)
    for spec in ("dht:10.0.0.1:4001", "dht:/ip4/10.0.0.1/tcp/4002", "dht:/unix/x"):
        with pytest.raises(BadRequest, match="no address in a DHT: give what a node prints"):
            parse_dht_peers(spec)


async def test_who_may_open_what() -> None:
    transport = MemoryNetwork().transport()
    assert isinstance(await open_registry("none", MODEL, Node().id), MemoryRegistry)
    with pytest.raises(BadRequest, match="a node cannot announce itself in"):
        await open_registry("10.0.0.1:4001", MODEL, Node().id)
    for spec in ("dht:", f"dht:{MADDR}", "none"):
        with pytest.raises(BadRequest, match="give --peers HOST:PORT of any node"):
            await client_registry(spec, MODEL, transport)
    assert not peers_registry("static:10.0.0.1:1", transport, None).discover
    assert peers_registry("10.0.0.1:1,10.0.0.1:1", transport, None).addresses == ("10.0.0.1:1",)
