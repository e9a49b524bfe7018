"""A model cut in three, every cut served twice by real processes behind lines that can be cut."""

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
from treeswarm_bench.benchmarks.tcp_relay import Cuttable, cuttable
from treeswarm_client.chain.chain import Chain
from treeswarm_client.client import SwarmClient
from treeswarm_client.generation.run import Run
from treeswarm_client.local_swarm import HostCommand, LocalNode, LocalSwarm, even_cuts, local_swarm

SPANS = even_cuts(8, 3)
# Lines beyond the six that nodes stand behind at first: a client is told of them all before anybody is there.
SPARE_LINES = 8
LINK = "delay=5ms"
PROMPT = "class Queue:\n    def __init__(self"
TOKENS = 96
AT = 24
SILENT = "nothing heard"

Harm = Callable[["Replica", Run], Coroutine[Any, Any, None]]


@dataclass(eq=False)
class Replica:
    """A node and the line to it."""

    span: Span
    node: LocalNode
    line: Cuttable
    identity: Path
    """Where its keys are."""
    ended: bool = False

    @property
    def address(self) -> str:
        return self.node.address

    def send(self, number: signal.Signals) -> None:
        """A signal to the process; some end it."""
        self.ended |= number in {signal.SIGKILL, signal.SIGTERM}
        self.node.process.send_signal(number)


@dataclass(eq=False)
class Field:
    """`whole` before every test: then each span has two replicas again."""

    swarm: LocalSwarm
    client: SwarmClient
    lines: list[Cuttable]
    folder: Path
    replicas: list[Replica] = field(default_factory=list)
    _unharmed: dict[str, Run] = field(default_factory=dict)

    async def whole(self, *spans: Span, copies: int = 2) -> None:
        """Start what is missing of `spans` (by default, all)."""
        await asyncio.gather(*(one.node.process.wait() for one in self.replicas if one.ended))
        self.replicas = [one for one in self.replicas if not one.ended]
        missing = [
            span for span in spans or SPANS for _ in range(copies - sum(one.span == span for one in self.replicas))
        ]
        await self.start(*missing)
        await self.known(*self.replicas)

    async def start(self, *spans: Span) -> list[Replica]:
        """More nodes, each behind a line of its own."""
        lines = [self.lines.pop(0) for _ in spans]
        keys = [self.folder / f"{line.port}.pem" for line in lines]
        told = zip(spans, lines, keys, strict=True)
        started = await self.swarm.start_all(
            [("--blocks", str(s), "--announce", f"127.0.0.1:{w.port}", "--identity", str(k)) for s, w, k in told],
            [HostCommand(listen=f"127.0.0.1:{line.inner}") for line in lines],
        )
        new = [Replica(*one) for one in zip(spans, started, lines, keys, strict=True)]
        self.replicas += new
        return new

    async def known(self, *replicas: Replica) -> None:
        """Until the client has heard that these are online."""
        async with asyncio.timeout(30):
            while not {one.node.ready["node"] for one in replicas} <= self.online():
                await self.client.view.wait_for_change(0.5)
        view, back = self.client.view, {one.node.ready["node"] for one in replicas}
        # Nodes that are still down stay banned.
        view.bans = BanList({node: ban for node, ban in view.bans.bans.items() if node not in back})

    def online(self) -> set[str]:
        """Ids, as the client knows them."""
        return {s.record.node for s in self.client.view.snapshot if s.record.state == "online"}

    def at(self, address: str) -> Replica:
        """By the address a chain knows it by."""
        return next(one for one in self.replicas if one.address == address.partition("#")[0])

    def hops(self, chain: Chain | None) -> list[Replica]:
        """The nodes of a chain."""
        assert chain is not None
        return [self.at(hop.address) for hop in chain.hops]

    async def counters(self, replicas: Iterable[Replica]) -> dict[str, Description]:
        """By address."""
        described = await self.client.describe_nodes([one.node.pinned for one in replicas])
        return {address.partition("#")[0]: node for address, node in described.items()}

    async def unharmed(self, options: Mapping[str, Any]) -> Run:
        """What a run gives that nobody harms; made once."""
        while str(options) not in self._unharmed:
            run = await self.client.generate(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, **options)
            assert run.chain is not None
            if not run.chain.repairs:  # a busy machine may stall a node for long enough to lose it
                self._unharmed[str(options)] = run
        return self._unharmed[str(options)]

    async def survives(self, harm: Harm, place: int, **options: Any) -> "Harmed":
        """One run whose node at `place` is harmed after some tokens; its tokens must be those of the unharmed run."""
        expected = await self.unharmed(options)
        run = self.client.stream(PROMPT, max_new_tokens=TOKENS, ignore_eos=True, **options)
        hit, others, harming, before = None, list[Replica](), None, dict[str, Description]()
        async for _ in run:
            if hit is None and len(run.token_ids) >= AT:
                others = self.hops(run.chain)
                before = await self.counters(others)
                hit = others.pop(place)
                harming = asyncio.create_task(harm(hit, run))
        assert harming is not None
        assert hit is not None
        await harming
        assert run.token_ids == expected.token_ids
        assert run.text == expected.text
        assert run.chain is not None
        return Harmed(run, run.chain, hit, others, before)


@dataclass(frozen=True, eq=False)
class Harmed:
    """A run that was harmed, the node that was, the others it had then, and what all of them had counted before."""

    run: Run
    chain: Chain
    hit: Replica
    others: list[Replica]
    before: dict[str, Description]

    def check_replaced(self, why: str = "") -> None:
        """By the chain's own account: this node was let go for one reason, and another took its blocks.

        Nobody else was, but for one that a busy machine stalled for too long.
        """
        lost = {hop.address.partition("#")[0]: said for repair in self.chain.repairs for hop, said in repair.lost}
        assert why in lost.pop(self.hit.address), lost
        assert all(SILENT in said for said in lost.values()), lost
        assert self.hit.address not in self.now
        assert not missing_blocks([hop.span for hop in self.chain.hops], 8)

    def check_all_kept(self) -> None:
        """The chain was mended with the nodes it had."""
        assert self.chain.repairs
        lost = [said for repair in self.chain.repairs for _, said in repair.lost]
        assert all(SILENT in said for said in lost), lost

    @property
    def now(self) -> set[str]:
        """Who is in the chain at the end."""
        return {hop.address.partition("#")[0] for hop in self.chain.hops}

    async def check_stayed(self, field: Field, *replicas: Replica) -> None:
        """By the nodes' own account: they (by default, the others) did not open the session again: they went on."""
        stayed = [one for one in replicas or self.others if one.address in self.now]
        assert stayed
        after = await field.counters(stayed)
        for address, now in after.items():
            assert now.opened == self.before[address].opened
            assert now.resumed > self.before[address].resumed


@contextlib.asynccontextmanager
async def living_field() -> AsyncIterator[Field]:
    """The swarm and a client that knows where nodes are and where more may come."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="treeswarm-")))
        lines = [await stack.enter_async_context(cuttable()) for _ in range(2 * len(SPANS) + SPARE_LINES)]
        swarm = await stack.enter_async_context(local_swarm("demo", [], emulate_link=LINK, flags=("--grace", "20")))
        client = SwarmClient(
            model="demo",
            peers=",".join(f"127.0.0.1:{line.port}" for line in lines),
            draft="demo-draft",
            tree_size=16,
            emulate_link=LINK,
            patience=60.0,
        )
        made = Field(swarm, client, lines, folder)
        await made.start(*SPANS, *SPANS)
        await stack.enter_async_context(client)
        yield made
