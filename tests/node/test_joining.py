"""How a node finds its swarm through another node's own port, and does not stay where nobody talks to it."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from tests.support.swarm_keys import new_swarm_key

from treeswarm.errors import BadRequest, Refused, SwarmError, Unreachable
from treeswarm.keys import key_marker, read_swarm_key
from treeswarm.protocol.address import Address
from treeswarm.protocol.join_code import JoinCode
from treeswarm.protocol.messages import FaultCode, FindSwarm, Ping, Pong, SwarmFound
from treeswarm.registry.book import BookRegistry
from treeswarm.transport.memory import MemoryNetwork
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_bench.benchmarks.parts.fake_node import MODEL, FakeNode
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.config import ModelConfig, NetworkConfig, NodeConfig
from treeswarm_node.joining import (
    OpenedRegistry,
    begin_run,
    check_admission,
    check_code,
    find_swarm,
    joinable_spec,
    listen_address,
)
from treeswarm_node.membership.last_run import LastRun

PEER = "/ip4/127.0.0.1/tcp/4002/p2p/12D3KooW" + "A" * 44
OTHER = "/ip4/10.0.0.9/tcp/4002/p2p/12D3KooW" + "B" * 44
ASKED = Address("192.0.2.7", 4001)
LAST = LastRun("demo", port=4001, key_marker="0c3f1", registry="a:1", dht_peers=(PEER,), nodes=(f"c:1#{'0' * 32}",))


def test_the_host_that_answered_is_tried_before_those_that_it_knows() -> None:
    assert joinable_spec(ASKED, f"dht:{PEER},{OTHER}") == f"dht:{PEER.replace('127.0.0.1', '192.0.2.7')},{PEER},{OTHER}"
    named = joinable_spec(Address("node.example.org", 1), f"dht:{PEER}")
    assert named == f"dht:{PEER.replace('/ip4/127.0.0.1', '/dns/node.example.org')},{PEER}"
    assert joinable_spec(ASKED, "mqtt://broker/ours") == "mqtt://broker/ours"


@pytest.mark.parametrize(
    ("registry", "reason"),
    [
        ("", "announces itself nowhere.*nodes cannot join it"),
        ("dht:", "names no peer"),
        ("mqtts://USER:PASSWORD@broker/ours", "password of its own: give --registry mqtts://USER:PASSWORD@broker/ours"),
        ("10.0.0.1:4001", "announces itself nowhere"),
        ("dht:/etc/passwd", "no address in a DHT"),
        ("gopher://x", "names no registry"),
    ],
)
def test_a_node_that_cannot_be_joined_is_named_with_the_reason(registry: str, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        joinable_spec(ASKED, registry)


def test_a_broker_s_credentials_and_files_are_not_passed_on() -> None:
    mine = OpenedRegistry(BookRegistry(MODEL), "mqtts://me:secret@broker/ours?ca=/my/ca.pem")
    assert mine.shared_spec() == mine.join_spec("swarm:CODE") == "mqtts://USER:PASSWORD@broker/ours"
    free = OpenedRegistry(BookRegistry(MODEL), "mqtt://broker/ours")
    assert (free.shared_spec(), free.join_spec("swarm:CODE")) == ("mqtt://broker/ours", "swarm:CODE")
    alone = OpenedRegistry(BookRegistry(MODEL), "none")
    assert (alone.shared_spec(), alone.join_spec("swarm:CODE")) == ("", None)


Answer = Callable[[Stream], Awaitable[None]]


async def silent(stream: Stream) -> None:
    await asyncio.Event().wait()


async def refuse(stream: Stream) -> None:
    raise Refused("another swarm key", FaultCode.WRONG_SWARM_KEY)


async def answer(stream: Stream) -> None:
    while (message := await stream.receive()) is not None:
        match message:
            case FindSwarm():
                await stream.send(SwarmFound(f"dht:{OTHER}"))
            case Ping(stamp):
                await stream.send(Pong(stamp, 0, 0, 0))


def starting_until(ready_s: float) -> Answer:
    async def starting(stream: Stream) -> None:
        if asyncio.get_running_loop().time() < ready_s:
            raise Refused("this node has yet to find its own swarm", FaultCode.DRAINING)
        await answer(stream)

    return starting


async def listen(network: MemoryNetwork, address: str, behaviour: Answer) -> None:
    async def accept(kind: StreamKind, stream: Stream) -> None:
        await behaviour(stream)

    await network.transport().listen(address, accept)


def find(spec: str, last_run: LastRun | None = None, **nodes: Answer) -> tuple[str, float]:
    """Return what `find_swarm` finds among the nodes of these names, and after how many seconds."""

    async def main() -> tuple[str, float]:
        network = MemoryNetwork()
        for name, behaviour in nodes.items():
            await listen(network, f"{name}:1", behaviour)
        found = await find_swarm(network.transport(), spec, last_run)
        return found, asyncio.get_running_loop().time()

    return run_virtually(main())


def test_silent_nodes_before_a_living_one_cost_no_time() -> None:
    found, seconds = find("a:1,b:1,c:1,d:1,e:1", a=silent, b=silent, c=silent, d=silent, e=answer)
    assert found.endswith(OTHER)
    assert seconds < 0.2


def test_a_node_that_has_yet_to_find_its_swarm_is_asked_again() -> None:
    found, seconds = find("a:1", a=starting_until(0.5))
    assert found.endswith(OTHER)
    assert 1.0 <= seconds < 1.5


def test_nodes_of_the_last_run_are_asked_when_the_named_ones_are_gone() -> None:
    assert find("a:1", LAST, c=answer)[0].endswith(OTHER)
    assert find("c:1", LAST, c=answer)[0].endswith(OTHER)
    with pytest.raises(SwarmError):  # another swarm: asking nodes of the last one would join the two
        find("b:1", LAST, c=answer)


async def reply_with_another_key(stream: Stream) -> None:
    raise Refused("this is a private swarm", FaultCode.WRONG_SWARM_KEY)


def test_a_refusal_by_a_node_of_the_last_run_is_not_final() -> None:
    """Another program may have taken its port, while the named node is only late."""
    found, _ = find("a:1", LAST, a=starting_until(0.5), c=reply_with_another_key)
    assert found.endswith(OTHER)
    with pytest.raises(Unreachable):
        find("a:1", LAST, a=silent, c=reply_with_another_key)


def test_a_refusal_is_final_and_silence_is_named() -> None:
    with pytest.raises(Refused, match="another swarm key"):
        find("a:1,b:1", a=refuse)
    with pytest.raises(Unreachable, match="a:1 accepts connections and does not answer"):
        find("a:1", a=silent)


def admit(**nodes: Answer) -> None:
    """Check the admission of a node to a swarm of nodes of these names."""

    async def main() -> None:
        network, registry = MemoryNetwork(), BookRegistry(MODEL)
        for port, behaviour in enumerate(nodes.values(), start=4001):
            await listen(network, f"127.0.0.1:{port}", behaviour)
            await registry.add_records([FakeNode().record(port).sealed])
        own = FakeNode()
        await registry.add_records([own.record(5000).sealed])
        await check_admission(network.transport(), OpenedRegistry(registry, "dht:"), own.id)

    run_virtually(main())


def test_a_node_that_the_swarm_refuses_does_not_stay_alone() -> None:
    with pytest.raises(BadRequest, match="2 of 2 nodes of this swarm refuse this one: another swarm key"):
        admit(a=refuse, b=refuse)
    with pytest.raises(BadRequest, match="1 of 2 nodes"):
        admit(a=refuse, b=silent)


def test_one_node_that_answers_is_enough() -> None:
    admit(a=refuse, b=refuse, c=answer)
    admit(a=silent)
    admit()


def test_a_run_begins_with_what_the_last_one_knew() -> None:
    config = NodeConfig(ModelConfig("demo"), network=NetworkConfig(registry="a:1"))
    run = begin_run(config, "0.0.0.0:4009", "0c3f1", LAST)
    assert (run.port, run.automatic, run.registry, run.dht_peers, run.nodes) == (4009, True, "a:1", (PEER,), LAST.nodes)
    assert begin_run(config, "0.0.0.0:4009", "", LAST).nodes == ()


def test_the_port_of_the_last_run_is_taken_again_unless_the_owner_names_one() -> None:
    assert listen_address(NetworkConfig(), LastRun(port=4001)) == "0.0.0.0:4001"
    assert listen_address(NetworkConfig(), None) == "0.0.0.0:0"
    assert listen_address(NetworkConfig(listen="127.0.0.1:4005"), LastRun(port=4001)) == "127.0.0.1:4005"


def test_a_code_for_another_key_is_refused_before_anything_is_dialled(tmp_path: Path) -> None:
    paths = [tmp_path / "a.key", tmp_path / "b.key"]
    for path in paths:
        path.write_text(new_swarm_key())
        path.chmod(0o600)
    code = str(JoinCode(Address("a", 1, "0" * 32), key_marker(read_swarm_key(paths[0]))))
    unmarked = str(JoinCode(Address("a", 1, "0" * 32)))
    check_code(NetworkConfig(registry=code, swarm_key=paths[0]))
    check_code(NetworkConfig(registry=unmarked))
    for registry, key, reason in (
        (code, None, "private swarm, and no key is given: ask the person"),
        (code, paths[1], "the swarm key is not the one of a:1"),
        (unmarked, paths[0], "open swarm, and a swarm key is given: leave --swarm-key out"),
        (f"{unmarked},{code}", None, "private swarm"),
    ):
        with pytest.raises(BadRequest, match=reason):
            check_code(NetworkConfig(registry=registry, swarm_key=key))
