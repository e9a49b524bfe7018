"""A model in three spans, each hosted twice by real processes behind lines that tests can cut."""

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treeswarm.protocol.messages import Description
from treeswarm.protocol.spans import Span, missing_blocks
from treeswarm.topology.bans import BanList
from treeswarm_bench.benchmarks.tcp_relay import CuttableRelay, cuttable_relay
from treeswarm_client.chain.chain import Chain
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run
from treeswarm_client.local_swarm import HostCommand, LocalNode, LocalSwarm, even_cuts, local_swarm

SPANS = even_cuts(8, 3)
# Lines beyond those of the first six nodes.  A client is given all their addresses before nodes are started there.
SPARE_LINES = 8
LINK = "delay=5ms"
PROMPT = "class Queue:\n    def __init__(self"
TOKENS = 96
# Number of tokens after which a run is disturbed.
DISTURB_AT = 24
SILENT = "nothing heard"

Disturb = Callable[["Replica", Run], Coroutine[Any, Any, None]]


@dataclass(eq=False)
class Replica:
    """A node, and the line to it."""

    span: Span
    node: LocalNode
    line: CuttableRelay
    identity: Path
    """File with its keys."""
    ended: bool = False
    """Whether it was sent a signal that ends it."""

    @property
    def address(self) -> str:
        """The node's address, without a pin."""
        return self.node.address

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.ended |= number in {signal.SIGKILL, signal.SIGTERM}
        self.node.process.send_signal(number)


@dataclass(eq=False)
class ReplicatedSwarm:
    """A swarm and one client of it; `restore` gives each span two replicas again."""

    swarm: LocalSwarm
    client: SwarmClient
    lines: list[CuttableRelay]
    """Lines that no node uses yet."""
    folder: Path
    replicas: list[Replica] = field(default_factory=list)
    _undisturbed: dict[str, Run] = field(default_factory=dict)

    async def restore(self, *spans: Span, copies: int = 2) -> None:
        """Start replicas so that each of `spans` (by default, all) has `copies`."""
        await asyncio.gather(*(replica.node.process.wait() for replica in self.replicas if replica.ended))
        self.replicas = [replica for replica in self.replicas if not replica.ended]
        present = [replica.span for replica in self.replicas]
        missing = [span for span in spans or SPANS for _ in range(copies - present.count(span))]
        await self.start(*missing)
        await self.wait_until_online(*self.replicas)

    async def start(self, *spans: Span) -> list[Replica]:
        """Start more nodes, each behind a line of its own."""
        lines = [self.lines.pop(0) for _ in spans]
        identities = [self.folder / f"{line.port}.pem" for line in lines]
        nodes = await self.swarm.start_all(
            [
                ("--blocks", str(span), "--announce", f"127.0.0.1:{line.port}", "--identity", str(identity))
                for span, line, identity in zip(spans, lines, identities, strict=True)
            ],
            [HostCommand(listen=f"127.0.0.1:{line.inner}") for line in lines],
        )
        replicas = [Replica(*parts) for parts in zip(spans, nodes, lines, identities, strict=True)]
        self.replicas += replicas
        return replicas

    async def wait_until_online(self, *replicas: Replica) -> None:
        """Wait until the client knows that these replicas are online, and clear their bans."""
        nodes = {replica.node.ready["node"] for replica in replicas}
        async with asyncio.timeout(30):
            while not nodes <= self.online_nodes():
                await self.client.view.wait_for_change(0.5)
        view = self.client.view
        # Nodes that are still down stay banned.
        failures = view.failures
        failures.bans = BanList({node: ban for node, ban in failures.bans.bans.items() if node not in nodes})

    def online_nodes(self) -> set[str]:
        """Return the ids of the nodes that the client knows as online."""
        return {s.record.node for s in self.client.view.snapshot if s.record.state == "online"}

    def replica_at(self, address: str) -> Replica:
        """Return the replica at an address, with or without a pin."""
        return next(replica for replica in self.replicas if replica.address == address.partition("#")[0])

    def replicas_of(self, chain: Chain | None) -> list[Replica]:
        """Return the replicas that serve a chain, in order."""
        assert chain is not None
        return [self.replica_at(hop.address) for hop in chain.hops]

    async def describe(self, replicas: Iterable[Replica]) -> dict[str, Description]:
        """Return the descriptions that nodes give of themselves, by address."""
        described = await self.client.describe_nodes([replica.node.pinned for replica in replicas])
        return {address.partition("#")[0]: node for address, node in described.items()}

    async def undisturbed_run(self, options: Mapping[str, Any]) -> Run:
        """Return a run that nothing disturbed; generated once for each set of options."""
        while str(options) not in self._undisturbed:
            run = await self.client.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, **options)
            assert run.chain is not None
            if not run.chain.repairs:  # a busy machine may stall a node for long enough to lose it
                self._undisturbed[str(options)] = run
        return self._undisturbed[str(options)]

    async def survive(self, disturb: Disturb, place: int, **options: Any) -> "DisturbedRun":
        """Disturb the node at `place` during a run, whose tokens must be those of the undisturbed run."""
        expected = await self.undisturbed_run(options)
        run = self.client.stream(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, **options)
        target, others, disturbing, before = None, list[Replica](), None, dict[str, Description]()
        async for _ in run:
            if target is None and len(run.token_ids) >= DISTURB_AT:
                others = self.replicas_of(run.chain)
                before = await self.describe(others)
                target = others.pop(place)
                disturbing = asyncio.create_task(disturb(target, run))
        assert disturbing is not None
        assert target is not None
        await disturbing
        assert run.token_ids == expected.token_ids
        assert run.text == expected.text
        assert run.chain is not None
        return DisturbedRun(run, run.chain, target, others, before)


@dataclass(frozen=True, eq=False)
class DisturbedRun:
    """A run during which one node was disturbed."""

    run: Run
    chain: Chain
    target: Replica
    """The node that was disturbed."""
    others: list[Replica]
    """The other nodes that the chain had then."""
    before: dict[str, Description]
    """Descriptions of all these nodes from before the disturbance, by address."""

    def check_replaced(self, reason: str = "") -> None:
        """Check by the chain's repairs that it dropped the target for `reason`, and another node took its blocks.

        No other node was dropped, except for one that a busy machine stalled for too long.
        """
        lost = {hop.address.partition("#")[0]: words for repair in self.chain.repairs for hop, words in repair.lost}
        assert self.target.address in lost, self.chain.repairs
        assert reason in lost.pop(self.target.address), lost
        assert all(SILENT in words for words in lost.values()), lost
        assert self.target.address not in self.final_addresses
        assert not missing_blocks([hop.span for hop in self.chain.hops], 8)

    def check_all_kept(self) -> None:
        """Check that the chain was repaired with the nodes it had."""
        assert self.chain.repairs
        lost = [words for repair in self.chain.repairs for _, words in repair.lost]
        assert all(SILENT in words for words in lost), lost

    @property
    def final_addresses(self) -> set[str]:
        """Addresses of the nodes in the chain at the end."""
        return {hop.address.partition("#")[0] for hop in self.chain.hops}

    async def check_resumed(self, swarm: ReplicatedSwarm, *replicas: Replica) -> None:
        """Check by the nodes' own counters that `replicas` (by default, the others) resumed the session.

        They did not open it again.
        """
        kept = [replica for replica in replicas or self.others if replica.address in self.final_addresses]
        assert kept
        for address, after in (await swarm.describe(kept)).items():
            assert after.opened == self.before[address].opened
            assert after.resumed > self.before[address].resumed


@contextlib.asynccontextmanager
async def replicated_swarm() -> AsyncIterator[ReplicatedSwarm]:
    """Run the swarm, and a client that knows the addresses of all lines, used and spare."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="treeswarm-")))
        lines = [await stack.enter_async_context(cuttable_relay()) for _ in range(2 * len(SPANS) + SPARE_LINES)]
        swarm = await stack.enter_async_context(local_swarm("demo", [], emulate_link=LINK, flags=("--grace", "20")))
        client = SwarmClient(
            model="demo",
            peers=",".join(f"127.0.0.1:{line.port}" for line in lines),
            draft="demo-draft",
            tree_size=16,
            emulate_link=LINK,
            patience=60.0,
        )
        replicated = ReplicatedSwarm(swarm, client, lines, folder)
        await replicated.start(*SPANS, *SPANS)
        await stack.enter_async_context(client)
        yield replicated
