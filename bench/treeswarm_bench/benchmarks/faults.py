"""`swarm bench faults`: whether generations survive losses.

Real nodes are killed, stopped, cut off, filled up and drained at seeded moments.
"""

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import SwarmError
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.protocol.messages import Close, Description, NextHop, Open, Opened
from treeswarm.protocol.spans import Span
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Security
from treeswarm_bench.benchmarks.common import BenchSetup, percentiles
from treeswarm_bench.benchmarks.tcp_relay import CuttableRelay, cuttable_relay
from treeswarm_bench.benchmarks.texts import held_out_prompts
from treeswarm_client.client import SwarmClient
from treeswarm_client.discovery.failures import NodeFailures
from treeswarm_client.generation.run import Run
from treeswarm_client.local_swarm import HostCommand, LocalNode, LocalSwarm, even_cuts, local_swarm
from treeswarm_client.provenance import machine_provenance

KINDS = ("kill", "hang", "cut", "refusal", "drain", "two")
REPLICAS = 2
TREE_SIZE = 32
LINK_MS = 25.0
LINK = "delay=25ms"
# A fault falls at a random moment within a traversal.
TRAVERSAL_S = 0.25
# Each session that fills a node up takes a page for its crown.
CROWN_ROOM = 64
HOPS = 3
PLACES = ("head", "middle", "tail")
# Seconds for which the replica that should take over has no room.
FULL_S = 1.5
PATIENCE_S = 60.0
KNOWN_S = 30.0
# Least number of tokens that follow a fault.
LAST_TOKENS = 16


@dataclass(eq=False)
class Replica:
    """A node process and the relay in front of it."""

    span: Span
    node: LocalNode
    relay: CuttableRelay
    ended: bool = False
    """Whether it was killed, or signalled to leave."""

    @property
    def process(self) -> asyncio.subprocess.Process:
        return self.node.process


@dataclass(frozen=True)
class Outcome:
    """One generation and the fault during it."""

    kind: str
    places: tuple[int, ...]
    """Positions in the chain of the nodes that were hit."""
    at_token: int
    """Number of tokens before the fault."""
    identical: bool
    error: str | None
    noticed: bool
    """Whether the client had to do anything: a node may die after its last append, or warn in time."""
    recovery_ms: float
    """Milliseconds from the fault to the first answer of the repaired chain; 0 where nothing was noticed."""
    mend_ms: float
    """The part of `recovery_ms` from the first sign in the client on.

    It consists of choosing, opening, resuming, replay and one traversal.
    """
    restart_ms: float
    """Milliseconds that a healthy chain needs from the prompt to the token of the fault."""
    kept: bool
    """Whether the nodes that were not hit stayed in the session, without opening it again."""

    def __str__(self) -> str:
        places = ", ".join(PLACES[place] for place in self.places)
        text = self.error or ("identical" if self.identical else "DIFFERENT")
        taken = f"{self.recovery_ms:.0f} ms, repair {self.mend_ms:.0f} of them" if self.noticed else "not noticed"
        return (
            f"{self.kind} of {places} after {self.at_token} tokens: {text}, {taken}; "
            f"from scratch {self.restart_ms:.0f} ms" + ("" if self.kept else "; survivors opened again")
        )


@dataclass(eq=False)
class FaultySwarm:
    """The swarm into which faults are injected."""

    swarm: LocalSwarm
    spans: Sequence[Span]
    stack: contextlib.AsyncExitStack
    replicas: list[Replica] = field(default_factory=list)
    registry: str = "dht:"

    async def fill_up(self) -> None:
        """Start nodes until every span has its replicas, and wait until they are ready."""
        await asyncio.gather(*(replica.process.wait() for replica in self.replicas if replica.ended))
        self.replicas = [replica for replica in self.replicas if not replica.ended]
        missing = [
            span
            for span in self.spans
            for _ in range(REPLICAS - sum(replica.span == span for replica in self.replicas))
        ]
        if not self.replicas:
            await self._start(missing.pop(0))
        self.registry = str(self.replicas[0].node.ready["join"])
        await asyncio.gather(*(self._start(span) for span in missing))

    async def _start(self, span: Span) -> None:
        relay = await self.stack.enter_async_context(cuttable_relay())
        flags = ("--blocks", str(span), "--registry", self.registry, "--announce", f"127.0.0.1:{relay.port}")
        node = await self.swarm.start(*flags, host=HostCommand(listen=f"127.0.0.1:{relay.inner}"))
        self.replicas.append(Replica(span, node, relay))

    def at(self, address: str) -> Replica:
        """Return the replica at an address, as a chain names it."""
        host_and_port = address.partition("#")[0]
        return next(replica for replica in self.replicas if replica.node.address == host_and_port)

    def other_replica(self, hit: Replica) -> Replica:
        """Return the other replica of the same span."""
        return next(replica for replica in self.replicas if replica.span == hit.span and replica is not hit)


async def bench_faults(setup: BenchSetup, *, generations: int, seed: int) -> dict[str, Any]:
    """Run `generations` of `setup.tokens` tokens, each with one fault, and compare with the same on a healthy chain."""
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, HOPS)
    async with (
        local_swarm(setup.model, [], dtype=setup.dtype, emulate_link=LINK, flags=("--grace", "20")) as nodes,
        contextlib.AsyncExitStack() as stack,
    ):
        swarm = FaultySwarm(nodes, spans, stack)
        await swarm.fill_up()
        async with SwarmClient(
            model=setup.model,
            registry=",".join(replica.node.pinned for replica in swarm.replicas),
            draft=setup.draft,
            tree_size=TREE_SIZE,
            emulate_link=LINK,
            patience=PATIENCE_S,
        ) as client:
            bench = FaultBench(setup, client, swarm, random.Random(seed), held_out_prompts(client, setup.prompts))
            await client.generate(bench.prompts[0], max_new_tokens=setup.tokens)  # warms up connections and caches
            outcomes = []
            for number in range(generations):
                await swarm.fill_up()
                await _until_all_known(client, swarm)
                outcomes.append(await bench.run_generation(number, KINDS[number % len(KINDS)]))
                print(f"{number + 1} of {generations}: {outcomes[-1]}", file=sys.stderr, flush=True)
    return _summary(outcomes, setup, seed)


@dataclass(frozen=True)
class InjectedFault:
    """When a fault was injected, and into which of the chain's nodes."""

    at: float
    hits: list[Replica]
    others: list[Replica]
    opened: dict[str, int]
    """Number of sessions that each node had opened before, by address."""


@dataclass(eq=False)
class FaultBench:
    """A client, the swarm it uses, and the seeded choice of faults."""

    setup: BenchSetup
    client: SwarmClient
    swarm: FaultySwarm
    random: random.Random
    prompts: Sequence[Sequence[int]]
    _healthy: dict[str, tuple[Run, list[float]]] = field(default_factory=dict)

    async def run_generation(self, number: int, kind: str) -> Outcome:
        """Run one generation with a fault after a random token, at a random moment of the traversal under way."""
        setup, prompt_number = self.setup, number % len(self.prompts)
        prompt = self.prompts[prompt_number]
        options: dict[str, Any] = {"max_new_tokens": setup.tokens, "ignore_eos": True}
        options |= {"temperature": 0.8, "seed": prompt_number} if number % 2 else {}
        healthy, healthy_at = await self._run_healthy(prompt, options)
        at_token = self.random.randrange(1, setup.tokens - LAST_TOKENS)
        run, error = self.client.stream(prompt, **options), None
        injecting: asyncio.Task[InjectedFault] | None = None
        async with contextlib.AsyncExitStack() as undo:
            try:
                async for _ in run:
                    if injecting is None and len(run.token_ids) >= at_token:
                        injecting = asyncio.create_task(self._inject_at_random_moment(kind, run, undo))
            except SwarmError as failure:
                error = f"{type(failure).__name__}: {failure}"
            assert injecting is not None
            fault = await injecting
        repairs = [(noticed, ended) for noticed, ended in run.recorder.recoveries if ended > fault.at]
        noticed, ended = repairs[0] if repairs else (fault.at, fault.at)
        return Outcome(
            kind=kind,
            places=tuple(sorted(self.swarm.spans.index(replica.span) for replica in fault.hits)),
            at_token=at_token,
            identical=run.token_ids == healthy.token_ids,
            error=error,
            noticed=bool(repairs),
            recovery_ms=1e3 * (ended - fault.at),
            mend_ms=1e3 * (ended - noticed),
            restart_ms=1e3 * healthy_at[at_token - 1],
            kept=await _survivors_kept(self.client, run, fault),
        )

    async def _run_healthy(self, prompt: Sequence[int], options: dict[str, Any]) -> tuple[Run, list[float]]:
        """Run the same generation without a fault, once; return it and the seconds from its start to each token."""
        key = f"{list(prompt)} {options}"
        if key not in self._healthy:
            start, at = time.perf_counter(), []
            run = self.client.stream(prompt, **options)
            async for _ in run:
                at.append(time.perf_counter() - start)
            self._healthy[key] = run, at
        return self._healthy[key]

    async def _inject_at_random_moment(self, kind: str, run: Run, undo: contextlib.AsyncExitStack) -> InjectedFault:
        opened = await _sessions_opened(self.client, self.swarm.replicas)
        await asyncio.sleep(self.random.uniform(0.0, TRAVERSAL_S))
        assert run.chain is not None
        chain = [self.swarm.at(hop.address) for hop in run.chain.hops]
        hits = self.random.sample(chain, 2 if kind == "two" else 1)
        at = await self._inject(kind, hits, undo)
        return InjectedFault(at, hits, [replica for replica in chain if replica not in hits], opened)

    async def _inject(self, kind: str, hits: list[Replica], undo: contextlib.AsyncExitStack) -> float:
        """Inject a fault and return its time."""
        if kind == "refusal":  # The replica that should take over has no room at first.
            full = asyncio.Event()
            spare = self.swarm.other_replica(hits[0]).node.pinned
            filling = asyncio.create_task(_occupy(self.client, spare, full))
            undo.push_async_callback(asyncio.gather, filling)
            await full.wait()
        at = time.perf_counter()
        for replica in hits:
            replica.ended = kind in {"kill", "two", "drain", "refusal"}
            match kind:
                case "kill" | "two" | "refusal":
                    os.kill(replica.process.pid, signal.SIGKILL)
                case "hang":
                    os.kill(replica.process.pid, signal.SIGSTOP)
                    undo.callback(os.kill, replica.process.pid, signal.SIGCONT)
                case "cut":
                    replica.relay.cut()
                case "drain":
                    os.kill(replica.process.pid, signal.SIGTERM)
        return at


async def _occupy(client: SwarmClient, address: str, full: asyncio.Event) -> None:
    """Take all the room of a node for FULL_S seconds; set `full` once it is taken."""
    transport = GrpcTransport(security=Security())
    try:
        stream = await transport.connect(address, StreamKind.CONTROL)
        sessions: list[bytes] = []
        while (node := (await client.describe_nodes([address]))[address]).trunk_free > CROWN_ROOM:
            sessions.append(os.urandom(16))
            room = min(node.trunk_free - CROWN_ROOM, node.max_positions)
            if not isinstance(await _open(stream, node, sessions[-1], room), Opened):
                break
        full.set()
        await asyncio.sleep(FULL_S)
        for session in sessions:
            await stream.send(Close(session))
    finally:
        full.set()
        await transport.close()


async def _open(stream: Any, node: Description, session: bytes, room: int) -> Any:
    """Open a session of `room` rows, and return the node's reply."""
    is_tail = node.span.end == node.blocks
    next_hop = None if is_tail else NextHop("127.0.0.1:9", bytes(16))
    await stream.send(Open(PROTOCOL_VERSION, session, 0, node.span, node.numerics, room, 1, bytes(16), next_hop))
    return await stream.receive()


async def _until_all_known(client: SwarmClient, swarm: FaultySwarm) -> None:
    """Wait until the client knows every replica; then clear its bans, since replicas that failed are new.

    Raises TimeoutError after KNOWN_S seconds.
    """
    expected = {replica.node.ready["node"] for replica in swarm.replicas}
    async with asyncio.timeout(KNOWN_S):
        while True:
            online = {s.record.node for s in client.view.snapshot if s.record.state == "online"}
            if expected <= online:
                break
            await client.view.wait_for_change(0.5)
    client.view.failures = NodeFailures()


async def _sessions_opened(client: SwarmClient, replicas: Sequence[Replica]) -> dict[str, int]:
    """Return how many sessions each node has opened since it started, by address."""
    described = await client.describe_nodes([replica.node.pinned for replica in replicas])
    return {address.partition("#")[0]: node.opened for address, node in described.items()}


async def _survivors_kept(client: SwarmClient, run: Run, fault: InjectedFault) -> bool:
    """Return whether every node that was not hit stayed, by the nodes' own counters.

    It is in the chain to the end, the same process as before, and has opened no session since the fault.
    """
    assert run.chain is not None
    final = {hop.address.partition("#")[0] for hop in run.chain.hops}
    opened = await _sessions_opened(client, fault.others)
    return all(
        replica.node.address in final and opened[replica.node.address] == fault.opened[replica.node.address]
        for replica in fault.others
    )


def _summary(outcomes: Sequence[Outcome], setup: BenchSetup, seed: int) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.error is None]
    noticed = [outcome for outcome in done if outcome.noticed]
    return {
        "bench": "faults",
        "seed": seed,
        "generations": len(outcomes),
        "tokens": setup.tokens,
        "identical": sum(outcome.identical for outcome in outcomes),
        "failed": len(outcomes) - len(done),
        "survivors_kept": sum(outcome.kept for outcome in outcomes),
        "noticed": len(noticed),
        "recovery_ms": percentiles([outcome.recovery_ms for outcome in noticed]),
        "mend_ms": percentiles([outcome.mend_ms for outcome in noticed]),
        "baseline_restart_ms": percentiles([outcome.restart_ms for outcome in noticed]),
        "ring_ms": (HOPS + 1) * LINK_MS,
        "by_kind": {
            kind: _summary_of_kind(of_kind)
            for kind in KINDS
            if (of_kind := [outcome for outcome in outcomes if outcome.kind == kind])
        },
        "errors": [outcome.error for outcome in outcomes if outcome.error],
        "different": [
            {"kind": outcome.kind, "places": outcome.places, "at_token": outcome.at_token}
            for outcome in done
            if not outcome.identical
        ],
        "places": {name: sum(place in outcome.places for outcome in outcomes) for place, name in enumerate(PLACES)},
        "well": len(done) == len(outcomes) and all(outcome.identical for outcome in outcomes),
        "provenance": machine_provenance() | {"model": setup.model, "dtype": setup.dtype, "link": LINK},
    }


def _summary_of_kind(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    noticed = [outcome for outcome in outcomes if outcome.noticed]
    return {
        "generations": len(outcomes),
        "identical": sum(outcome.identical for outcome in outcomes),
        "noticed": len(noticed),
        "recovery_ms": percentiles([outcome.recovery_ms for outcome in noticed]),
        "mend_ms": percentiles([outcome.mend_ms for outcome in noticed]),
        "baseline_restart_ms": percentiles([outcome.restart_ms for outcome in noticed]),
    }
