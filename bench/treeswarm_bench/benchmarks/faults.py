"""Does a generation survive?  Real nodes are killed, stopped, cut off, filled up and drained at seeded moments."""

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
from treeswarm_bench.benchmarks.common import BenchSetup, spread
from treeswarm_bench.benchmarks.tcp_relay import Cuttable, cuttable
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
# A blow falls somewhere within a traversal.
TRAVERSAL_S = 0.25
# Each session of the hog's takes a page for its crown.
CROWN_ROOM = 64
HOPS = 3
PLACES = ("head", "middle", "tail")
# The replica that should take over has no room for so long.
FULL_S = 1.5
PATIENCE_S = 60.0
KNOWN_S = 30.0


@dataclass(eq=False)
class Replica:
    """A node process and the line to it."""

    span: Span
    node: LocalNode
    line: Cuttable
    ended: bool = False
    """Killed, or told to leave."""

    @property
    def process(self) -> asyncio.subprocess.Process:
        return self.node.process


@dataclass(frozen=True)
class Outcome:
    """One generation and what was done to it."""

    kind: str
    places: tuple[int, ...]
    at_token: int
    identical: bool
    error: str | None
    noticed: bool
    """Whether the client had to do anything: a node may die after its last append, or warn in time."""
    recovery_ms: float
    """From the blow to the first answer of the mended chain; 0 where nothing was noticed."""
    mend_ms: float
    """Of these, from the first sign in the client on: choosing, opening, resuming, replay and one traversal."""
    restart_ms: float
    """What a healthy chain needs from the prompt to the token where the blow fell."""
    kept: bool
    """Whether the nodes that were not hit stayed in the session, without opening it again."""

    def __str__(self) -> str:
        places = ", ".join(PLACES[place] for place in self.places)
        text = self.error or ("identical" if self.identical else "DIFFERENT")
        took = f"{self.recovery_ms:.0f} ms, mending {self.mend_ms:.0f} of them" if self.noticed else "not noticed"
        return (
            f"{self.kind} of {places} after {self.at_token} tokens: {text}, {took}; "
            f"from scratch {self.restart_ms:.0f} ms" + ("" if self.kept else "; survivors opened again")
        )


@dataclass(eq=False)
class Field:
    """The swarm that is being harmed."""

    swarm: LocalSwarm
    spans: Sequence[Span]
    stack: contextlib.AsyncExitStack
    replicas: list[Replica] = field(default_factory=list)
    join: str = "dht:"

    async def fill_up(self) -> None:
        """Every span has its replicas, running and ready."""
        await asyncio.gather(*(one.process.wait() for one in self.replicas if one.ended))
        self.replicas = [one for one in self.replicas if not one.ended]
        missing = [
            span for span in self.spans for _ in range(REPLICAS - sum(one.span == span for one in self.replicas))
        ]
        if not self.replicas:
            await self._start(missing.pop(0))
        self.join = str(self.replicas[0].node.ready["join"])
        await asyncio.gather(*(self._start(span) for span in missing))

    async def _start(self, span: Span) -> None:
        line = await self.stack.enter_async_context(cuttable())
        node = await self.swarm.start(
            "--blocks", str(span), "--registry", self.join, "--announce", f"127.0.0.1:{line.port}",
            host=HostCommand(listen=f"127.0.0.1:{line.inner}"),
        )  # fmt: skip
        self.replicas.append(Replica(span, node, line))

    def at(self, address: str) -> Replica:
        """By the address a chain knows it by."""
        bare = address.partition("#")[0]
        return next(one for one in self.replicas if one.node.address == bare)

    def spare_of(self, hit: Replica) -> Replica:
        return next(one for one in self.replicas if one.span == hit.span and one is not hit)


async def bench_faults(setup: BenchSetup, *, generations: int, seed: int) -> dict[str, Any]:
    """`generations` of `setup.tokens` tokens, each hit once, against the same prompts on a healthy chain."""
    spans = even_cuts(read_shape(resolve_model(setup.model)).blocks, HOPS)
    async with (
        local_swarm(setup.model, [], dtype=setup.dtype, emulate_link=LINK, flags=("--grace", "20")) as swarm,
        contextlib.AsyncExitStack() as stack,
    ):
        field_ = Field(swarm, spans, stack)
        await field_.fill_up()
        async with SwarmClient(
            model=setup.model,
            registry=",".join(one.node.pinned for one in field_.replicas),
            draft=setup.draft,
            tree_size=TREE_SIZE,
            emulate_link=LINK,
            patience=PATIENCE_S,
        ) as client:
            bench = _Bench(setup, client, field_, random.Random(seed), held_out_prompts(client, setup.prompts))
            await client.generate(bench.prompts[0], max_new_tokens=setup.tokens)  # connections and caches warm up once
            outcomes = []
            for number in range(generations):
                await field_.fill_up()
                await _known(client, field_)
                outcomes.append(await _one(bench, number, KINDS[number % len(KINDS)]))
                print(f"{number + 1} of {generations}: {outcomes[-1]}", file=sys.stderr, flush=True)
    return _summary(outcomes, setup, seed)


async def _one(bench: "_Bench", number: int, kind: str) -> Outcome:
    """One generation, hit once: at a random token, and then at a random moment of the traversal under way."""
    setup, client, field_, random_ = bench.setup, bench.client, bench.harmed, bench.random
    prompt = bench.prompts[number % len(bench.prompts)]
    options: dict[str, Any] = {"max_new_tokens": setup.tokens, "ignore_eos": True}
    options |= {"temperature": 0.8, "seed": number % len(bench.prompts)} if number % 2 else {}
    healthy, healthy_at = await bench.healthy(prompt, options)
    at_token = random_.randrange(1, setup.tokens - 16)
    run, error = client.stream(prompt, **options), None
    blow: asyncio.Task[Blow] | None = None
    async with contextlib.AsyncExitStack() as undo:
        try:
            async for _ in run:
                if blow is None and len(run.token_ids) >= at_token:
                    blow = asyncio.create_task(_strike(kind, run, field_, client, undo, random_))
        except SwarmError as failure:
            error = f"{type(failure).__name__}: {failure}"
        assert blow is not None
        struck = await blow
    mended = [(noticed, ended) for noticed, ended in run.recorder.recoveries if ended > struck.at]
    noticed, ended = mended[0] if mended else (struck.at, struck.at)
    return Outcome(
        kind=kind,
        places=tuple(sorted(field_.spans.index(one.span) for one in struck.hits)),
        at_token=at_token,
        identical=run.token_ids == healthy.token_ids,
        error=error,
        noticed=bool(mended),
        recovery_ms=1e3 * (ended - struck.at),
        mend_ms=1e3 * (ended - noticed),
        restart_ms=1e3 * healthy_at[at_token - 1],
        kept=await _survivors_kept(client, run, struck),
    )


@dataclass(frozen=True)
class Blow:
    """What was done, when, and to which of the chain's nodes."""

    at: float
    hits: list[Replica]
    others: list[Replica]
    opened: dict[str, int]
    """Sessions that every node had opened before, by address."""


@dataclass(eq=False)
class _Bench:
    setup: BenchSetup
    client: SwarmClient
    harmed: Field
    random: random.Random
    prompts: Sequence[Sequence[int]]
    _healthy: dict[str, tuple[Run, list[float]]] = field(default_factory=dict)

    async def healthy(self, prompt: Sequence[int], options: dict[str, Any]) -> tuple[Run, list[float]]:
        """The same generation on a chain that nobody harms; made once."""
        key = f"{list(prompt)} {options}"
        if key not in self._healthy:
            self._healthy[key] = await _timed(self.client.stream(prompt, **options))
        return self._healthy[key]


async def _timed(run: Run) -> tuple[Run, list[float]]:
    """A whole generation, and the seconds from its start to each token."""
    start, at = time.perf_counter(), []
    async for _ in run:
        at.append(time.perf_counter() - start)
    return run, at


async def _strike(
    kind: str,
    run: Run,
    field_: Field,
    client: SwarmClient,
    undo: contextlib.AsyncExitStack,
    random_: random.Random,
) -> Blow:
    opened = await _opened(client, field_)
    await asyncio.sleep(random_.uniform(0.0, TRAVERSAL_S))
    assert run.chain is not None
    chain = [field_.at(hop.address) for hop in run.chain.hops]
    hits = random_.sample(chain, 2 if kind == "two" else 1)
    at = await _hit(kind, hits, field_, client, undo)
    return Blow(at, hits, [one for one in chain if one not in hits], opened)


async def _hit(
    kind: str, hits: list[Replica], field_: Field, client: SwarmClient, undo: contextlib.AsyncExitStack
) -> float:
    """Returns when."""
    if kind == "refusal":  # whoever should take over has no room at first
        full = asyncio.Event()
        hogging = asyncio.create_task(_hog(client, field_.spare_of(hits[0]).node.pinned, full))
        undo.push_async_callback(asyncio.gather, hogging)
        await full.wait()
    at = time.perf_counter()
    for one in hits:
        one.ended = kind in {"kill", "two", "drain", "refusal"}
        match kind:
            case "kill" | "two" | "refusal":
                os.kill(one.process.pid, signal.SIGKILL)
            case "hang":
                os.kill(one.process.pid, signal.SIGSTOP)
                undo.callback(os.kill, one.process.pid, signal.SIGCONT)
            case "cut":
                one.line.cut()
            case "drain":
                os.kill(one.process.pid, signal.SIGTERM)
    return at


async def _hog(client: SwarmClient, address: str, full: asyncio.Event) -> None:
    """Takes all the room that a node has, for a while."""
    transport = GrpcTransport(security=Security())
    try:
        stream = await transport.connect(address, StreamKind.CONTROL)
        taken: list[bytes] = []
        while (node := (await client.describe_nodes([address]))[address]).trunk_free > CROWN_ROOM:
            taken.append(os.urandom(16))
            room = min(node.trunk_free - CROWN_ROOM, node.max_positions)
            if not isinstance(await _open(stream, node, taken[-1], room), Opened):
                break
        full.set()
        await asyncio.sleep(FULL_S)
        for session in taken:
            await stream.send(Close(session))
    finally:
        full.set()
        await transport.close()


async def _open(stream: Any, node: Description, session: bytes, room: int) -> Any:
    tail = node.span.end == node.blocks
    after = None if tail else NextHop("127.0.0.1:9", bytes(16))
    await stream.send(Open(PROTOCOL_VERSION, session, 0, node.span, node.numerics, room, 1, bytes(16), after))
    return await stream.receive()


async def _known(client: SwarmClient, field_: Field) -> None:
    """Wait until the client has heard of every replica, and forgives those that came back."""
    wanted = {one.node.ready["node"] for one in field_.replicas}
    async with asyncio.timeout(KNOWN_S):
        while True:
            online = {s.record.node for s in client.view.snapshot if s.record.state == "online"}
            if wanted <= online:
                break
            await client.view.wait_for_change(0.5)
    client.view.failures = NodeFailures()


async def _opened(client: SwarmClient, field_: Field) -> dict[str, int]:
    """How many sessions each node has opened since it started, by address."""
    described = await client.describe_nodes([one.node.pinned for one in field_.replicas])
    return {address.partition("#")[0]: node.opened for address, node in described.items()}


async def _survivors_kept(client: SwarmClient, run: Run, blow: Blow) -> bool:
    """By the counters of the nodes that were not hit: the same process is in the chain to the end, and has opened no
    session since the blow."""
    assert run.chain is not None
    final = {hop.address.partition("#")[0] for hop in run.chain.hops}
    now = await client.describe_nodes([one.node.pinned for one in blow.others])
    opened = {address.partition("#")[0]: node.opened for address, node in now.items()}
    return all(
        one.node.address in final and opened[one.node.address] == blow.opened[one.node.address] for one in blow.others
    )


def _summary(outcomes: Sequence[Outcome], setup: BenchSetup, seed: int) -> dict[str, Any]:
    done = [one for one in outcomes if one.error is None]
    noticed = [one for one in done if one.noticed]
    return {
        "bench": "faults",
        "seed": seed,
        "generations": len(outcomes),
        "tokens": setup.tokens,
        "identical": sum(one.identical for one in outcomes),
        "failed": len(outcomes) - len(done),
        "survivors_kept": sum(one.kept for one in outcomes),
        "noticed": len(noticed),
        "recovery_ms": percentiles([one.recovery_ms for one in noticed]),
        "mend_ms": percentiles([one.mend_ms for one in noticed]),
        "baseline_restart_ms": percentiles([one.restart_ms for one in noticed]),
        "ring_ms": (HOPS + 1) * LINK_MS,
        "by_kind": {
            kind: {
                "generations": len(mine),
                "identical": sum(one.identical for one in mine),
                "noticed": sum(one.noticed for one in mine),
                "recovery_ms": percentiles([one.recovery_ms for one in mine if one.noticed]),
                "mend_ms": percentiles([one.mend_ms for one in mine if one.noticed]),
                "baseline_restart_ms": percentiles([one.restart_ms for one in mine if one.noticed]),
            }
            for kind in KINDS
            if (mine := [one for one in outcomes if one.kind == kind])
        },
        "errors": [one.error for one in outcomes if one.error],
        "different": [
            {"kind": one.kind, "places": one.places, "at_token": one.at_token} for one in done if not one.identical
        ],
        "places": {name: sum(place in one.places for one in outcomes) for place, name in enumerate(PLACES)},
        "well": len(done) == len(outcomes) and all(one.identical for one in outcomes),
        "provenance": machine_provenance() | {"model": setup.model, "dtype": setup.dtype, "link": LINK},
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p95, by nearest rank."""
    ranked = sorted(values)
    return {f"p{p}": ranked[min(len(ranked) - 1, int(len(ranked) * p / 100))] for p in (50, 95)} if ranked else {}


__all__ = ["bench_faults", "percentiles", "spread"]
