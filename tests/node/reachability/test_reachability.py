"""How a node finds out where strangers find it, and what it does where they cannot."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from tests.support.port_peers import CONTROL, SOON_S, Peer, ask, peer, port_of, stranger

from treeswarm.protocol.messages import DialledBack, LeasePort, PortLeased
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm_node.reachability import reachability as place
from treeswarm_node.reachability.reachability import (
    AddressMonitor,
    Basis,
    DialResult,
    PublicAddress,
    ask_dial_back,
    decide_address,
)

HERE, THERE = "127.0.0.1:4001", "203.0.113.5:4001"
YES, NO = DialResult(True, THERE), DialResult(False)


@pytest.mark.parametrize(
    ("announced", "verdicts", "expected"),
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
def test_where_a_node_is(announced: str | None, verdicts: list[DialResult], expected: PublicAddress | None) -> None:
    assert decide_address(announced, HERE, verdicts) == expected


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], PublicAddress(THERE, Basis.ASSUMED, False)),
        ([DialResult(True, HERE)], PublicAddress(THERE, Basis.ASSUMED, True)),
        ([DialResult(True, HERE), DialResult(True, "[::1]:4001")], PublicAddress(THERE, Basis.ASSUMED, True)),
        ([DialResult(True, HERE), DialResult(True, HERE), DialResult(True, "198.51.100.1:4001")],
         PublicAddress("198.51.100.1:4001", Basis.DIALLED, True)),
        ([DialResult(True, HERE), NO], None),
    ],
)  # fmt: skip
def test_a_neighbour_on_the_same_machine_does_not_say_where_others_find_a_node(
    verdicts: list[DialResult], expected: PublicAddress | None
) -> None:
    assert decide_address(None, THERE, verdicts) == expected


@pytest.mark.parametrize(
    ("how", "reachable", "lends"),
    [
        (Basis.DIALLED, True, True),
        (Basis.ANNOUNCED, True, True),
        (Basis.ANNOUNCED, False, True),
        (Basis.LEASED, True, False),
        (Basis.ASSUMED, False, True),
        (Basis.HIDDEN, False, False),
    ],
)
def test_who_has_ports_to_lend(how: Basis, reachable: bool, lends: bool) -> None:
    assert PublicAddress(HERE, how, reachable).lends is lends


async def test_another_node_says_whether_it_reaches_this_one() -> None:
    async with peer() as asked, peer() as asking:
        own = f"0.0.0.0:{port_of(asking.address)}#{asking.pin}"
        assert await ask_dial_back(asking.transport, asked.address, own) == DialResult(True, asking.local)
        assert await ask_dial_back(asking.transport, asked.address, asking.address) == DialResult(True, asking.local)
        # Another node's address, a closed port, a host that is not the asker's.
        for wrong in (f"{asked.local}#{asking.pin}", "0.0.0.0:1", "192.0.2.1:4001"):
            assert await ask_dial_back(asking.transport, asked.address, wrong) == DialResult(False)
        # The node that is asked does not answer.
        assert await ask_dial_back(asking.transport, "127.0.0.1:1", own) is None


async def test_a_liar_does_not_choose_this_nodes_port() -> None:
    async def lie(kind: StreamKind, stream: Stream) -> None:
        await stream.receive()
        await stream.send(DialledBack(True, said))
        await stream.receive()

    async with peer() as asking:
        liar = await asking.transport.listen("127.0.0.1:0", lie)
        said = "127.0.0.1:25"
        assert await ask_dial_back(asking.transport, liar.address, "0.0.0.0:4001") == DialResult(False)
        said = "nonsense"
        assert await ask_dial_back(asking.transport, liar.address, "0.0.0.0:4001") is None
        await liar.close()


@contextlib.asynccontextmanager
async def finding(
    node: Peer, others: Callable[[], Sequence[Peer]], *, listening: str = "", announced: str | None = None
) -> AsyncIterator[Callable[[], Awaitable[PublicAddress]]]:
    """A monitor at work; the next place it settles on."""
    places: asyncio.Queue[PublicAddress] = asyncio.Queue()

    async def addresses() -> list[str]:
        return [other.address for other in others()]

    monitor = AddressMonitor(
        node.transport, listening or node.local, node.pin, addresses, places.put, announced, node.node.forwarded_ports
    )
    running = asyncio.create_task(monitor.run())
    try:
        yield lambda: asyncio.wait_for(places.get(), SOON_S)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def behind_a_router(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reaches anybody's own port."""

    async def no(transport: object, asked: str, own: str) -> DialResult:
        return NO

    monkeypatch.setattr(place, "ask_dial_back", no)
    monkeypatch.setattr(place, "RETRY_S", 0.05)
    monkeypatch.setattr(place, "SPREAD_S", 0.05)


async def test_a_node_that_others_reach_is_where_it_listens() -> None:
    async with peer() as other, peer() as node, finding(node, lambda: [other]) as next_place:
        assert await next_place() == PublicAddress(node.local, Basis.DIALLED, True)
        assert other.port_lender.lease_count == 0


async def test_the_first_node_of_a_swarm_takes_its_word_until_somebody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "RETRY_S", 0.05)
    others: list[Peer] = []
    async with peer() as other, peer() as node, finding(node, lambda: others) as next_place:
        assert await next_place() == PublicAddress(node.local, Basis.ASSUMED, False)
        others.append(other)
        assert await next_place() == PublicAddress(node.local, Basis.DIALLED, True)


@pytest.mark.usefixtures("behind_a_router")
async def test_the_owners_word_comes_first() -> None:
    async with peer() as other, peer() as node, finding(node, lambda: [other], announced=THERE) as next_place:
        assert await next_place() == PublicAddress(THERE, Basis.ANNOUNCED, False)


@pytest.mark.usefixtures("behind_a_router")
async def test_a_hidden_node_rents_and_rents_elsewhere_when_its_landlord_goes() -> None:
    async with contextlib.AsyncExitStack() as first_stack, peer() as second, peer() as node, stranger() as client:
        first = await first_stack.enter_async_context(peer())
        async with finding(node, lambda: [first, second]) as next_place:
            rented = await next_place()
            assert (rented.basis, rented.reachable, rented.lends) == (Basis.LEASED, True, False)
            assert first.port_lender.lease_count == 1
            await ask(client, f"{rented.address}#{node.pin}")
            await first_stack.aclose()
            again = await next_place()
            assert again.basis is Basis.LEASED
            assert again.address != rented.address
            assert second.port_lender.lease_count == 1
            await ask(client, f"{again.address}#{node.pin}")
        async with asyncio.timeout(SOON_S):
            while second.port_lender.lease_count:
                await asyncio.sleep(0.01)


@pytest.mark.usefixtures("behind_a_router")
async def test_a_hidden_node_passes_over_those_who_lend_nothing_and_waits_for_one() -> None:
    async with peer(reachable=False) as mean, peer() as node, finding(node, lambda: [mean]) as next_place:
        assert await next_place() == PublicAddress(node.local, Basis.HIDDEN, False)
        mean.port_lender.reachable = True
        assert (await next_place()).basis is Basis.LEASED


@pytest.mark.usefixtures("behind_a_router")
async def test_a_port_that_does_not_lead_here_is_not_told_of() -> None:
    """A landlord whose lent ports a firewall closes, or that answers at them itself."""

    async def pose(kind: StreamKind, stream: Stream) -> None:
        if kind is CONTROL and isinstance(await stream.receive(), LeasePort):
            await stream.send(PortLeased(port_of(landlord.address), 1))
            await stream.receive()

    async with peer() as honest, peer() as poser, peer() as node:
        landlord = await poser.transport.listen("127.0.0.1:0", pose)
        poser.local = landlord.address
        async with finding(node, lambda: [poser, honest]) as next_place:
            assert (await next_place()).basis is Basis.LEASED
            assert honest.port_lender.lease_count == 1
        await landlord.close()


@pytest.mark.usefixtures("behind_a_router")
async def test_a_rented_port_is_dialled_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """ThrottledRunner still, but nobody comes through any more."""
    monkeypatch.setattr(place, "CHECK_EVERY_S", 0.2)
    async with (
        peer() as first,
        peer() as second,
        peer() as node,
        finding(node, lambda: [first, second]) as next_place,
    ):
        rented = await next_place()
        await asyncio.sleep(0.5)
        (tenancy,) = first.port_lender._tenancies
        assert tenancy.server is not None
        tenancy.server.close()
        again = await next_place()
        assert (again.basis, again.address != rented.address) == (Basis.LEASED, True)
        assert second.port_lender.lease_count == 1


async def test_those_who_rent_themselves_are_not_asked_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def say(transport: object, other: str, own: str) -> DialResult | None:
        asked.append(other)
        return YES if other == "last" else None

    async def others() -> list[str]:
        return [*map(str, range(6)), "last"]

    async def settled(_: PublicAddress) -> None: ...

    monkeypatch.setattr(place, "ask_dial_back", say)
    async with stranger() as transport:
        monitor = AddressMonitor(transport, HERE, "", others, settled)
        assert await monitor.find_address() == PublicAddress(THERE, Basis.DIALLED, True)
    assert len(asked) == 7
