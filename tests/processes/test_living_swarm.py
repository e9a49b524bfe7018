"""Real processes die, hang, are cut off, drained and paused in mid-generation: the text stays what it was."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from tests.support.replicated_swarm import PROMPT, SPANS, Field, Replica, living_field

from treeswarm.errors import MissingBlocks, Refused
from treeswarm.keys import Identity
from treeswarm.protocol.messages import Manage, Managed
from treeswarm.protocol.spans import Span
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Security
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run
from treeswarm_node.membership.announcer import order_bytes

pytestmark = pytest.mark.asyncio(loop_scope="module")
BIN = Path(sys.executable).parent
GREEDY: dict[str, float] = {}
SAMPLED: dict[str, float] = {"temperature": 0.8, "seed": 5}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def living() -> AsyncIterator[Field]:
    async with living_field() as made:
        yield made


async def kill(hit: Replica, run: Run) -> None:
    hit.send(signal.SIGKILL)


async def hang(hit: Replica, run: Run) -> None:
    hit.send(signal.SIGSTOP)


async def cut(hit: Replica, run: Run) -> None:
    hit.line.cut()


async def drain(hit: Replica, run: Run) -> None:
    hit.send(signal.SIGTERM)


# Gentle ones first: every killed node costs the start of another one.


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
async def test_cut_connections_cost_no_node(living: Field, place: int) -> None:
    await living.whole()
    harmed = await living.survives(cut, place, **(SAMPLED if place == 1 else GREEDY))
    harmed.check_all_kept()
    await harmed.check_stayed(living, harmed.hit, *harmed.others)


async def test_a_tail_that_loses_its_client_for_a_moment_keeps_the_session(living: Field) -> None:
    """The answers come on the control stream: those under way when it breaks are asked for again."""
    await living.whole()

    async def cut_control(hit: Replica, run: Run) -> None:
        mine = {c.laddr.port for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == hit.line.port}
        assert hit.line.cut(mine) > 0

    harmed = await living.survives(cut_control, 2, **SAMPLED)
    harmed.check_all_kept()
    await harmed.check_stayed(living, harmed.hit, *harmed.others)


@pytest.mark.parametrize(("place", "options"), [(0, SAMPLED), (2, GREEDY)], ids=["head", "tail"])
async def test_a_node_that_hangs_is_left_and_may_come_back(
    living: Field, place: int, options: dict[str, float]
) -> None:
    await living.whole()
    try:
        harmed = await living.survives(hang, place, **options)
    finally:
        for one in living.replicas:
            one.send(signal.SIGCONT)
    harmed.check_replaced()
    await harmed.check_stayed(living)


async def test_paused_by_its_owner_a_node_hands_its_sessions_over_and_serves_again_when_told(living: Field) -> None:
    await living.whole()

    async def pause(hit: Replica, run: Run) -> None:
        assert "nothing until `swarm-node resume`" in await order("pause", hit.identity)

    harmed = await living.survives(pause, 1, **SAMPLED)
    hit = harmed.hit
    harmed.check_replaced("it asked to leave")
    await harmed.check_stayed(living)
    async with asyncio.timeout(30):
        while state_of(living, hit) != "paused":
            await living.client.view.wait_for_change(0.5)
    with pytest.raises(Refused, match="paused"):
        await living.client.describe_nodes([hit.node.pinned])
    alone = ",".join(one.address for one in (hit, *harmed.others))
    with pytest.raises(MissingBlocks, match=f"{hit.span}"):
        async with SwarmClient(model="demo", peers=alone, tree_size=0, patience=0.5) as client:
            await client.generate(PROMPT, max_new_tokens=2)
    assert "serves again" in await order("resume", hit.identity)
    await living.known(hit)
    async with SwarmClient(model="demo", peers=alone, tree_size=0) as client:
        again = await client.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    assert again.token_ids == (await living.unharmed(GREEDY)).token_ids[:8]


async def test_nobody_elses_orders_count_and_no_order_counts_twice(living: Field, tmp_path: Path) -> None:
    await living.whole()
    node = living.replicas[0].node
    mine, stranger = Identity.load_or_create(living.replicas[0].identity), Identity.load_or_create(tmp_path / "id")
    stamp = int(time.time() * 1e6)

    async def tell(signer: Identity, action: str, stamp: int) -> object:
        transport = GrpcTransport(security=Security())
        try:
            stream = await transport.connect(node.pinned, StreamKind.CONTROL)
            await stream.send(Manage(action, stamp, signer.sign(order_bytes(action, stamp))))
            return await asyncio.wait_for(stream.receive(), 10)
        finally:
            await transport.close()

    with pytest.raises(Refused, match="not signed by this node's identity"):
        await tell(stranger, "pause", stamp)
    assert isinstance(await tell(mine, "resume", stamp), Managed)  # of a node that serves: nothing to do
    for old in (stamp, stamp - 1, stamp - 120_000_000):
        with pytest.raises(Refused, match="the order is old"):
            await tell(mine, "resume", old)
    with pytest.raises(Refused, match="no order"):
        await tell(mine, "dance", stamp + 1)
    assert "no node of yours runs here" in await order("pause", tmp_path / "id", status=1)
    assert state_of(living, living.replicas[0]) == "online"


@pytest.mark.parametrize(("place", "options"), [(0, GREEDY), (1, SAMPLED), (2, GREEDY)], ids=["head", "middle", "tail"])
async def test_a_killed_node_is_replaced(living: Field, place: int, options: dict[str, float]) -> None:
    await living.whole(SPANS[place])
    harmed = await living.survives(kill, place, **options)
    harmed.check_replaced()
    await harmed.check_stayed(living)


@pytest.mark.parametrize(
    ("place", "options"), [(0, SAMPLED), (1, GREEDY), (2, SAMPLED)], ids=["head", "middle", "tail"]
)
async def test_a_node_told_to_end_is_left_in_time_and_ends_well(
    living: Field, place: int, options: dict[str, float]
) -> None:
    await living.whole(SPANS[place])
    harmed = await living.survives(drain, place, **options)
    harmed.check_replaced("it asked to leave")
    await harmed.check_stayed(living)
    assert await asyncio.wait_for(harmed.hit.node.process.wait(), 20) == 0
    assert b"Traceback" not in await harmed.hit.node.errors


async def test_without_a_replica_a_node_that_joins_in_time_is_used(living: Field) -> None:
    """Not the same blocks: one node takes the place of the last two."""
    await living.whole(copies=1)
    starting: list[asyncio.Task[list[Replica]]] = []

    async def kill_every_one(hit: Replica, run: Run) -> None:
        for one in [one for one in living.replicas if one.span.start >= 3]:
            one.send(signal.SIGKILL)
        starting.append(asyncio.create_task(living.start(Span(3, 8))))

    harmed = await living.survives(kill_every_one, 2, **SAMPLED)
    (joined,) = await starting[0]
    assert [str(hop.span) for hop in harmed.chain.hops] == ["0:3", "3:8"]
    assert living.hops(harmed.chain)[1] is joined


def state_of(living: Field, one: Replica) -> str:
    """As the client has heard."""
    known = [s.record.state for s in living.client.view.snapshot if s.record.node == one.node.ready["node"]]
    return str(known[0]) if known else "unknown"


async def order(action: str, identity: Path, *, status: int = 0) -> str:
    """The owner's command; what it says."""
    process = await asyncio.create_subprocess_exec(
        BIN / "swarm-node",
        action,
        "--identity",
        identity,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == status, errors.decode()
    return (said + errors).decode()
