"""Tests of the `--registry` parser: valid specs, and errors without secrets for the others."""

from pathlib import Path

import pytest

from treeswarm.errors import BadRequest
from treeswarm.registry import client_registry, open_registry, peers_registry, registry_kind, shareable_spec
from treeswarm.registry.memory import MemoryRegistry
from treeswarm.registry.spec import Broker, parse_dht_peers
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode

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
def test_spec_names_a_kind_of_registry(spec: str, kind: str) -> None:
    assert registry_kind(spec) == kind


@pytest.mark.parametrize("spec", ["", "mqtt:broker", "http://x/y", "10.0.0.1", "host:port", "None", ","])
def test_invalid_spec_is_answered_with_examples(spec: str) -> None:
    with pytest.raises(
        BadRequest, match=r"names no registry: give a join code such as 'swarm:.*'dht:'.*mqtts://.*static:"
    ):
        registry_kind(spec)


def test_broker_is_parsed_from_its_address(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    assert Broker.parse("mqtt://broker/a/b") == Broker("broker", 1883, "a/b")
    broker = Broker.parse(f"mqtts://al%40ice:p%2Fw@[::1]:99/ns/?ca={ca}")
    assert broker == Broker("::1", 99, "ns", tls=True, user="al@ice", password="p/w", ca=ca)
    assert Broker.parse("mqtts://broker/ns").port == 8883
    assert str(broker) == "mqtts://[::1]:99/ns"
    assert "p/w" not in f"{broker} {broker!r}"


@pytest.mark.parametrize(
    ("spec", "message"),
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
def test_malformed_broker_address_is_refused(spec: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
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
async def test_errors_about_a_spec_contain_no_password(spec: str) -> None:
    transport = MemoryNetwork().transport()
    for open_call in (open_registry(spec, MODEL, FakeNode().id), client_registry(spec, MODEL, transport)):
        with pytest.raises(BadRequest) as raised:
            await open_call
        assert not any(part in str(raised.value) for part in ("5ec2e7", "c2e7", "al:"))


def test_shareable_spec_has_placeholders_for_credentials() -> None:
    shared = shareable_spec("mqtts://al%40ice:p%2Fw@[::1]:99/ns/deep?ca=/a@b.pem")
    assert shared == "mqtts://USER:PASSWORD@[::1]:99/ns/deep?ca=/a@b.pem"
    assert shareable_spec("mqtt://broker/ns") == "mqtt://broker/ns"


def test_dht_peers_are_multiaddresses() -> None:
    assert parse_dht_peers("dht:") == ()
    assert parse_dht_peers(f"dht:{MADDR}, {MADDR}") == (MADDR,)
    for spec in ("dht:10.0.0.1:4001", "dht:/ip4/10.0.0.1/tcp/4002", "dht:/unix/x"):
        with pytest.raises(BadRequest, match="no address in a DHT: give what a node prints"):
            parse_dht_peers(spec)


async def test_nodes_and_clients_open_different_registries() -> None:
    transport = MemoryNetwork().transport()
    assert isinstance(await open_registry("none", MODEL, FakeNode().id), MemoryRegistry)
    with pytest.raises(BadRequest, match="a node cannot announce itself in"):
        await open_registry("10.0.0.1:4001", MODEL, FakeNode().id)
    for spec in ("dht:", f"dht:{MADDR}", "none"):
        with pytest.raises(BadRequest, match="give the join code or HOST:PORT of any node"):
            await client_registry(spec, MODEL, transport)
    assert not peers_registry("static:10.0.0.1:1", transport, None).discover
    assert peers_registry("10.0.0.1:1,10.0.0.1:1", transport, None).addresses == ("10.0.0.1:1",)
