"""Real processes die, hang, are cut off, drained and paused during a generation: the text stays the same."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from tests.support.replicated_swarm import PROMPT, SPANS, Replica, ReplicatedSwarm, replicated_swarm

from treeswarm.errors import MissingBlocks, Refused
from treeswarm.keys import Identity
from treeswarm.protocol.node_messages import Manage, Managed
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
async def swarm() -> AsyncIterator[ReplicatedSwarm]:
    async with replicated_swarm() as running:
        yield running


async def kill(target: Replica, run: Run) -> None:
    target.send(signal.SIGKILL)


async def hang(target: Replica, run: Run) -> None:
    target.send(signal.SIGSTOP)


async def cut(target: Replica, run: Run) -> None:
    target.line.cut()


async def drain(target: Replica, run: Run) -> None:
    target.send(signal.SIGTERM)


# Disturbances that end no process come first: for every killed node another one has to be started.


@pytest.mark.parametrize("place", [0, 1, 2], ids=["head", "middle", "tail"])
async def test_cut_connections_lose_no_node(swarm: ReplicatedSwarm, place: int) -> None:
    await swarm.restore()
    disturbed = await swarm.survive(cut, place, **(SAMPLED if place == 1 else GREEDY))
    disturbed.check_all_kept()
    await disturbed.check_resumed(swarm, disturbed.target, *disturbed.others)


async def test_tail_keeps_the_session_when_its_control_stream_breaks(swarm: ReplicatedSwarm) -> None:
    """Answers come on the control stream: those under way when it breaks are requested again."""
    await swarm.restore()

    async def cut_control(target: Replica, run: Run) -> None:
        own_ports = {
            c.laddr.port for c in psutil.Process().net_connections() if c.raddr and c.raddr.port == target.line.port
        }
        assert target.line.cut(own_ports) > 0

    disturbed = await swarm.survive(cut_control, 2, **SAMPLED)
    disturbed.check_all_kept()
    await disturbed.check_resumed(swarm, disturbed.target, *disturbed.others)


@pytest.mark.parametrize(("place", "options"), [(0, SAMPLED), (2, GREEDY)], ids=["head", "tail"])
async def test_hanging_node_is_replaced_and_may_come_back(
    swarm: ReplicatedSwarm, place: int, options: dict[str, float]
) -> None:
    await swarm.restore()
    try:
        disturbed = await swarm.survive(hang, place, **options)
    finally:
        for replica in swarm.replicas:
            replica.send(signal.SIGCONT)
    disturbed.check_replaced()
    await disturbed.check_resumed(swarm)


async def test_paused_node_hands_sessions_over_and_resumes_on_order(swarm: ReplicatedSwarm) -> None:
    await swarm.restore()

    async def pause(target: Replica, run: Run) -> None:
        assert "nothing until `swarm-node resume`" in await run_order("pause", target.identity)

    disturbed = await swarm.survive(pause, 1, **SAMPLED)
    target = disturbed.target
    alone = ",".join(replica.address for replica in (target, *disturbed.others))
    try:
        disturbed.check_replaced("it asked to leave")
        await disturbed.check_resumed(swarm)
        async with asyncio.timeout(30):
            while state_of(swarm, target) != "paused":
                await swarm.client.view.wait_for_change(0.5)
        with pytest.raises(Refused, match="paused"):
            await swarm.client.describe_nodes([target.node.pinned])
        with pytest.raises(MissingBlocks, match=f"{target.span}"):
            async with SwarmClient(model="demo", peers=alone, tree_size=0, patience=0.5) as client:
                await client.generate(PROMPT, max_new_tokens=2)
    finally:  # whatever failed, the tests that follow need the node
        resumed = await run_order("resume", target.identity)
    assert "serves again" in resumed
    await swarm.wait_until_online(target)
    async with SwarmClient(model="demo", peers=alone, tree_size=0) as client:
        again = await client.generate(PROMPT, max_new_tokens=8, ignore_eos=True)
    assert again.token_ids == (await swarm.undisturbed_run(GREEDY)).token_ids[:8]


async def test_only_fresh_orders_signed_by_the_owner_are_obeyed(swarm: ReplicatedSwarm, tmp_path: Path) -> None:
    await swarm.restore()
    node = swarm.replicas[0].node
    owner, stranger = Identity.load_or_create(swarm.replicas[0].identity), Identity.load_or_create(tmp_path / "id")
    stamp = int(time.time() * 1e6)

    async def send_order(signer: Identity, action: str, stamp: int) -> object:
        transport = GrpcTransport(security=Security())
        try:
            stream = await transport.connect(node.pinned, StreamKind.CONTROL)
            await stream.send(Manage(action, stamp, signer.sign(order_bytes(action, stamp))))
            return await asyncio.wait_for(stream.receive(), 10)
        finally:
            await transport.close()

    with pytest.raises(Refused, match="not signed by this node's identity"):
        await send_order(stranger, "pause", stamp)
    assert isinstance(
        await send_order(owner, "resume", stamp), Managed
    )  # the node serves already, so there is nothing to do
    for old in (stamp, stamp - 1, stamp - 120_000_000):
        with pytest.raises(Refused, match="the order is old"):
            await send_order(owner, "resume", old)
    with pytest.raises(Refused, match="unknown order"):
        await send_order(owner, "dance", stamp + 1)
    assert "no node of yours runs here" in await run_order("pause", tmp_path / "id", status=1)
    assert state_of(swarm, swarm.replicas[0]) == "online"


@pytest.mark.parametrize(("place", "options"), [(0, GREEDY), (1, SAMPLED), (2, GREEDY)], ids=["head", "middle", "tail"])
async def test_killed_node_is_replaced(swarm: ReplicatedSwarm, place: int, options: dict[str, float]) -> None:
    await swarm.restore(SPANS[place])
    disturbed = await swarm.survive(kill, place, **options)
    disturbed.check_replaced()
    await disturbed.check_resumed(swarm)


@pytest.mark.parametrize(
    ("place", "options"), [(0, SAMPLED), (1, GREEDY), (2, SAMPLED)], ids=["head", "middle", "tail"]
)
async def test_terminated_node_is_left_in_time_and_exits_cleanly(
    swarm: ReplicatedSwarm, place: int, options: dict[str, float]
) -> None:
    await swarm.restore(SPANS[place])
    disturbed = await swarm.survive(drain, place, **options)
    disturbed.check_replaced("it asked to leave")
    await disturbed.check_resumed(swarm)
    assert await asyncio.wait_for(disturbed.target.node.process.wait(), 20) == 0
    assert b"Traceback" not in await disturbed.target.node.errors


async def test_node_that_joins_in_time_replaces_lost_ones(swarm: ReplicatedSwarm) -> None:
    """The blocks need not be the same: one node takes the place of the last two."""
    await swarm.restore(copies=1)
    starting: list[asyncio.Task[list[Replica]]] = []

    async def kill_all_but_heads(target: Replica, run: Run) -> None:
        for replica in [replica for replica in swarm.replicas if replica.span.start >= 3]:
            replica.send(signal.SIGKILL)
        starting.append(asyncio.create_task(swarm.start(Span(3, 8))))

    disturbed = await swarm.survive(kill_all_but_heads, 2, **SAMPLED)
    (joined,) = await starting[0]
    assert [str(hop.span) for hop in disturbed.chain.hops] == ["0:3", "3:8"]
    assert swarm.replicas_of(disturbed.chain)[1] is joined


def state_of(swarm: ReplicatedSwarm, replica: Replica) -> str:
    """Return the state of a node as the client knows it."""
    states = [s.record.state for s in swarm.client.view.snapshot if s.record.node == replica.node.ready["node"]]
    return str(states[0]) if states else "unknown"


async def run_order(action: str, identity: Path, *, status: int = 0) -> str:
    """Run an owner command of `swarm-node`, and return its output."""
    process = await asyncio.create_subprocess_exec(
        BIN / "swarm-node",
        action,
        "--identity",
        identity,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == status, errors.decode()
    return (output + errors).decode()
