"""A node finds the address under which others reach it, and leases a port if there is none."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from tests.support.port_peers import CONTROL, SOON_S, Peer, client_transport, peer, ping, port_of

from treeswarm.protocol.node_messages import DialledBack, LeasePort, PortLeased
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_node.reachability import reachability
from treeswarm_node.reachability.reachability import (
    AddressMonitor,
    Basis,
    DialResult,
    PublicAddress,
    ask_dial_back,
    decide_address,
    describe_address,
)

HERE, THERE = "127.0.0.1:4001", "203.0.113.5:4001"
YES, NO = DialResult(True, THERE), DialResult(False)


@pytest.mark.parametrize(
    ("announced", "results", "expected"),
    [
        (THERE, [], PublicAddress(THERE, Basis.ANNOUNCED, False)),
        ("203.0.113.5:0", [], PublicAddress(THERE, Basis.ANNOUNCED, False)),
        (THERE, [NO, NO], PublicAddress(THERE, Basis.ANNOUNCED, False)),
        (THERE, [NO, YES], PublicAddress(THERE, Basis.ANNOUNCED, True)),
        (None, [], PublicAddress(HERE, Basis.ASSUMED, False)),
        (None, [YES, YES, NO], PublicAddress(THERE, Basis.DIALLED, True)),
        (None, [YES], PublicAddress(THERE, Basis.DIALLED, True)),
        (None, [YES, NO], None),
        (None, [YES, NO, NO], None),
        (None, [YES, DialResult(True, "198.51.100.1:4001"), NO], None),
        (None, [NO], None),
    ],
)
def test_address_is_decided_by_owner_or_majority(
    announced: str | None, results: list[DialResult], expected: PublicAddress | None
) -> None:
    assert decide_address(announced, HERE, results) == expected


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([], PublicAddress(THERE, Basis.ASSUMED, False)),
        ([DialResult(True, HERE)], PublicAddress(THERE, Basis.ASSUMED, True)),
        ([DialResult(True, HERE), DialResult(True, "[::1]:4001")], PublicAddress(THERE, Basis.ASSUMED, True)),
        ([DialResult(True, HERE), DialResult(True, HERE), DialResult(True, "198.51.100.1:4001")],
         PublicAddress("198.51.100.1:4001", Basis.DIALLED, True)),
        ([DialResult(True, HERE), NO], None),
    ],
)  # fmt: skip
def test_loopback_answers_do_not_decide_a_public_address(
    results: list[DialResult], expected: PublicAddress | None
) -> None:
    assert decide_address(None, THERE, results) == expected


@pytest.mark.parametrize(
    ("basis", "reachable", "lends"),
    [
        (Basis.DIALLED, True, True),
        (Basis.ANNOUNCED, True, True),
        (Basis.ANNOUNCED, False, True),
        (Basis.LEASED, True, False),
        (Basis.ASSUMED, False, True),
        (Basis.HIDDEN, False, False),
    ],
)
def test_nodes_that_are_or_seem_reachable_lend_ports(basis: Basis, reachable: bool, lends: bool) -> None:
    assert PublicAddress(HERE, basis, reachable).lends is lends


def test_loopback_address_is_not_said_to_be_found_by_others() -> None:
    here = PublicAddress("127.0.0.1:4001", Basis.ASSUMED, False)
    assert describe_address(here) == "only programs on this machine find this node at 127.0.0.1:4001"
    there = PublicAddress("203.0.113.5:4001", Basis.DIALLED, True)
    assert describe_address(there) == "other machines find this node at 203.0.113.5:4001 (dialled)"


async def test_a_dial_back_reports_whether_the_node_is_reached() -> None:
    async with peer() as other, peer() as node:
        own = f"0.0.0.0:{port_of(node.address)}#{node.pin}"
        assert await ask_dial_back(node.transport, other.address, own) == DialResult(True, node.local)
        assert await ask_dial_back(node.transport, other.address, node.address) == DialResult(True, node.local)
        # Another node's address, a closed port, a host that is not the node's own.
        for wrong in (f"{other.local}#{node.pin}", "0.0.0.0:1", "192.0.2.1:4001"):
            assert await ask_dial_back(node.transport, other.address, wrong) == DialResult(False)
        # The other node does not answer.
        assert await ask_dial_back(node.transport, "127.0.0.1:1", own) is None


async def test_a_dial_back_reply_with_a_wrong_port_is_ignored() -> None:
    async def answer_falsely(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        await stream.send(DialledBack(True, claimed))
        await stream.receive()

    async with peer() as node:
        liar = await node.transport.listen("127.0.0.1:0", answer_falsely)
        claimed = "127.0.0.1:25"
        assert await ask_dial_back(node.transport, liar.address, "0.0.0.0:4001") == DialResult(False)
        claimed = "nonsense"
        assert await ask_dial_back(node.transport, liar.address, "0.0.0.0:4001") is None
        await liar.close()


@contextlib.asynccontextmanager
async def monitored(
    node: Peer, others: Callable[[], Sequence[Peer]], *, listening: str = "", announced: str | None = None
) -> AsyncIterator[Callable[[], Awaitable[PublicAddress]]]:
    """Run a monitor and yield a function that returns the next address it settles on."""
    addresses: asyncio.Queue[PublicAddress] = asyncio.Queue()

    async def lender_candidates() -> list[str]:
        return [other.address for other in others()]

    monitor = AddressMonitor(
        node.transport,
        listening=listening or node.local,
        pin=node.pin,
        lender_candidates=lender_candidates,
        on_address=addresses.put,
        announced=announced,
        forwarded_ports=node.node.forwarded_ports,
    )
    running = asyncio.create_task(monitor.run())
    try:
        yield lambda: asyncio.wait_for(addresses.get(), SOON_S)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def behind_a_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no node reach the own port of any other."""

    async def not_reached(transport: object, node: str, own: str) -> DialResult:
        return NO

    monkeypatch.setattr(reachability, "ask_dial_back", not_reached)
    monkeypatch.setattr(reachability, "RETRY_S", 0.05)
    monkeypatch.setattr(reachability, "SPREAD_S", 0.05)


async def test_a_reachable_node_announces_where_it_listens() -> None:
    async with peer() as other, peer() as node, monitored(node, lambda: [other]) as next_address:
        assert await next_address() == PublicAddress(node.local, Basis.DIALLED, True)
        assert other.port_lender.lease_count == 0


async def test_the_first_node_assumes_its_address_until_others_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reachability, "RETRY_S", 0.05)
    others: list[Peer] = []
    async with peer() as other, peer() as node, monitored(node, lambda: others) as next_address:
        assert await next_address() == PublicAddress(node.local, Basis.ASSUMED, False)
        others.append(other)
        assert await next_address() == PublicAddress(node.local, Basis.DIALLED, True)


@pytest.mark.usefixtures("behind_a_router")
async def test_the_owners_address_comes_first() -> None:
    async with peer() as other, peer() as node, monitored(node, lambda: [other], announced=THERE) as next_address:
        assert await next_address() == PublicAddress(THERE, Basis.ANNOUNCED, False)


@pytest.mark.usefixtures("behind_a_router")
async def test_a_hidden_node_leases_again_when_its_lender_leaves() -> None:
    async with (
        contextlib.AsyncExitStack() as first_stack,
        peer() as second,
        peer() as node,
        client_transport() as client,
    ):
        first = await first_stack.enter_async_context(peer())
        async with monitored(node, lambda: [first, second]) as next_address:
            leased = await next_address()
            assert (leased.basis, leased.reachable, leased.lends) == (Basis.LEASED, True, False)
            assert first.port_lender.lease_count == 1
            await ping(client, f"{leased.address}#{node.pin}")
            await first_stack.aclose()
            again = await next_address()
            assert again.basis is Basis.LEASED
            assert again.address != leased.address
            assert second.port_lender.lease_count == 1
            await ping(client, f"{again.address}#{node.pin}")
        async with asyncio.timeout(SOON_S):
            while second.port_lender.lease_count:
                await asyncio.sleep(0.01)


@pytest.mark.usefixtures("behind_a_router")
async def test_a_hidden_node_waits_until_some_node_lends_a_port() -> None:
    async with peer(reachable=False) as other, peer() as node, monitored(node, lambda: [other]) as next_address:
        assert await next_address() == PublicAddress(node.local, Basis.HIDDEN, False)
        other.port_lender.reachable = True
        assert (await next_address()).basis is Basis.LEASED


@pytest.mark.usefixtures("behind_a_router")
async def test_a_port_that_does_not_lead_here_is_not_announced() -> None:
    """A firewall may close the lent port, or the lender may answer at it itself."""

    async def pose(kind: StreamKind, stream: Stream) -> None:
        if kind is CONTROL and isinstance(await stream.receive(), LeasePort):
            await stream.send(PortLeased(port_of(lender.address), 1))
            await stream.receive()

    async with peer() as honest, peer() as poser, peer() as node:
        lender = await poser.transport.listen("127.0.0.1:0", pose)
        poser.local = lender.address
        async with monitored(node, lambda: [poser, honest]) as next_address:
            assert (await next_address()).basis is Basis.LEASED
            assert honest.port_lender.lease_count == 1
        await lender.close()


@pytest.mark.usefixtures("behind_a_router")
async def test_a_leased_port_is_checked_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is still leased, but no connection comes through any more."""
    monkeypatch.setattr(reachability, "CHECK_EVERY_S", 0.2)
    async with (
        peer() as first,
        peer() as second,
        peer() as node,
        monitored(node, lambda: [first, second]) as next_address,
    ):
        leased = await next_address()
        await asyncio.sleep(0.5)
        (lease,) = first.port_lender._leases
        assert lease.server is not None
        lease.server.close()
        again = await next_address()
        assert (again.basis, again.address != leased.address) == (Basis.LEASED, True)
        assert second.port_lender.lease_count == 1


async def test_nodes_that_cannot_answer_are_replaced_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_asked: list[str] = []

    async def answer_as_last(transport: object, other: str, own: str) -> DialResult | None:
        nodes_asked.append(other)
        return YES if other == "last" else None

    async def others() -> list[str]:
        return [*map(str, range(6)), "last"]

    async def ignore_address(_: PublicAddress) -> None: ...

    monkeypatch.setattr(reachability, "ask_dial_back", answer_as_last)
    async with client_transport() as transport:
        monitor = AddressMonitor(transport, HERE, "", others, ignore_address)
        assert await monitor.find_address() == PublicAddress(THERE, Basis.DIALLED, True)
    assert len(nodes_asked) == 7
