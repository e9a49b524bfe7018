"""Does a generation survive?  Real nodes are killed, stopped, cut off, filled up and drained at seeded moments."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import SwarmError
from treeswarm.messages import Close, Description, Open, Opened
from treeswarm.model_files import read_shape, resolve_model
from treeswarm.spans import Span
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Security
from treeswarm_client.bench.common import BenchSetup, provenance_of_machine, spread
from treeswarm_client.bench.cuttable import Cuttable, cuttable
from treeswarm_client.bench.texts import held_out_prompts
from treeswarm_client.client import Run, SwarmClient
from treeswarm_client.local_swarm import LocalNode, LocalSwarm, Place, even_cuts, local_swarm

KINDS = ("kill", "hang", "cut", "refusal", "drain", "two")
REPLICAS = 2
TREE_SIZE = 32
LINK = "delay=25ms"
HOPS = 3
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
    recovery_ms: float
    """From the blow to the next token."""
    noticed_ms: float | None
    """Of these, from the first sign in the client on; None where it noticed nothing, or was warned in time."""
    restart_ms: float
    """What a healthy chain needs from the prompt to the token where the blow fell."""
    kept: bool
    """Whether the nodes that were not hit stayed in the session, without opening it again."""


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
            place=Place(listen=f"127.0.0.1:{line.inner}"),
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
    random_ = random.Random(seed)
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
            prompts = held_out_prompts(client, setup.prompts)
            outcomes = []
            kinds = itertools.cycle(KINDS)
            for number in range(generations):
                await field_.fill_up()
                await _known(client, field_)
                prompt = prompts[number % len(prompts)]
                sampling = {"temperature": 0.8, "seed": number} if number % 2 else {}
                outcomes.append(await _one(setup, client, field_, prompt, next(kinds), random_, sampling))
    return _summary(outcomes, setup, seed)


async def _one(
    setup: BenchSetup,
    client: SwarmClient,
    field_: Field,
    prompt: Sequence[int],
    kind: str,
    random_: random.Random,
    sampling: dict[str, Any],
) -> Outcome:
    options = {"max_new_tokens": setup.tokens, "ignore_eos": True, **sampling}
    healthy, healthy_at = await _timed(client.stream(prompt, **options))
    before = await _opened(client, field_)
    at_token = random_.randrange(1, setup.tokens - 8)
    run = client.stream(prompt, **options)
    hit_at, next_at, error, hits, mends = 0.0, 0.0, None, list[Replica](), 0
    undo = contextlib.AsyncExitStack()
    async with undo:
        try:
            async for _ in run:
                now = time.perf_counter()
                if hit_at and not next_at and now > hit_at:
                    next_at = now
                if not hit_at and len(run.token_ids) >= at_token:
                    await asyncio.sleep(random_.uniform(0.0, 0.1))
                    assert run.chain is not None
                    mends = len(run.chain.repairs)
                    hits = _choose(run, field_, kind, random_)
                    hit_at = time.perf_counter()
                    await _hit(kind, hits, field_, client, undo)
        except SwarmError as failure:
            error = f"{type(failure).__name__}: {failure}"
    assert run.chain is not None
    noticed = run.meter.recoveries_s
    return Outcome(
        kind=kind,
        places=tuple(sorted(field_.spans.index(one.span) for one in hits)),
        at_token=at_token,
        identical=run.token_ids == healthy.token_ids,
        error=error,
        recovery_ms=1e3 * (next_at - hit_at),
        noticed_ms=1e3 * noticed[0] if noticed else None,
        restart_ms=1e3 * healthy_at[at_token - 1],
        kept=await _survivors_kept(client, field_, before, run, hits) if mends is not None else False,
    )


async def _timed(run: Run) -> tuple[Run, list[float]]:
    """A whole generation, and the seconds from its start to each token."""
    start, at = time.perf_counter(), []
    async for _ in run:
        at.append(time.perf_counter() - start)
    return run, at


def _choose(run: Run, field_: Field, kind: str, random_: random.Random) -> list[Replica]:
    assert run.chain is not None
    chain = [field_.at(hop.address) for hop in run.chain.hops]
    return random_.sample(chain, 2 if kind == "two" else 1)


async def _hit(
    kind: str, hits: list[Replica], field_: Field, client: SwarmClient, undo: contextlib.AsyncExitStack
) -> None:
    for one in hits:
        one.ended = kind in {"kill", "two", "drain", "refusal"}
        match kind:
            case "kill" | "two":
                os.kill(one.process.pid, signal.SIGKILL)
            case "hang":
                os.kill(one.process.pid, signal.SIGSTOP)
                undo.callback(os.kill, one.process.pid, signal.SIGCONT)
            case "cut":
                one.line.cut()
            case "drain":
                os.kill(one.process.pid, signal.SIGTERM)
            case "refusal":
                spare = field_.spare_of(one)
                hogging = asyncio.create_task(_hog(client, spare.node.pinned))
                undo.push_async_callback(asyncio.gather, hogging)
                await asyncio.sleep(0.05)  # on loopback the hog is first
                os.kill(one.process.pid, signal.SIGKILL)


async def _hog(client: SwarmClient, address: str) -> None:
    """Takes all the room that a node has, for a while."""
    transport = GrpcTransport(security=Security())
    stream = await transport.connect(address, StreamKind.CONTROL)
    session = os.urandom(16)
    try:
        (described,) = (await client.describe_nodes([address])).values()
        room = min(described.trunk_free - 128, described.max_positions)
        while room > 0 and isinstance(await _open(stream, described, os.urandom(16), room), Opened):
            described = next(iter((await client.describe_nodes([address])).values()))
            room = min(described.trunk_free - 128, described.max_positions)
        await asyncio.sleep(FULL_S)
        await stream.send(Close(session))
    finally:
        await transport.close()


async def _open(stream: Any, node: Description, session: bytes, room: int) -> Any:
    tail = node.span.end == node.blocks
    from treeswarm.messages import NextHop  # noqa: PLC0415

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
            await client.view.changed(0.5)
    client.view.forgive()


async def _opened(client: SwarmClient, field_: Field) -> dict[str, int]:
    """How many sessions each node has opened since it started, by address."""
    described = await client.describe_nodes([one.node.pinned for one in field_.replicas])
    return {address.partition("#")[0]: node.opened for address, node in described.items()}


async def _survivors_kept(
    client: SwarmClient, field_: Field, before: dict[str, int], run: Run, hits: Sequence[Replica]
) -> bool:
    """By their own counters: the nodes of the chain that were not hit opened the session once."""
    assert run.chain is not None
    hit = {one.node.address for one in hits}
    stayed = [hop.address.partition("#")[0] for hop in run.chain.hops]
    living = [a for a in stayed if a not in hit and a in before]
    now = await client.describe_nodes([one.node.pinned for one in field_.replicas if one.node.address in living])
    return all(node.opened - before[address.partition("#")[0]] == 1 for address, node in now.items())


def _summary(outcomes: Sequence[Outcome], setup: BenchSetup, seed: int) -> dict[str, Any]:
    done = [one for one in outcomes if one.error is None]
    rings_ms = (HOPS + 1) * 25.0
    return {
        "bench": "faults",
        "seed": seed,
        "generations": len(outcomes),
        "tokens": setup.tokens,
        "identical": sum(one.identical for one in outcomes),
        "failed": len(outcomes) - len(done),
        "survivors_kept": sum(one.kept for one in outcomes),
        "recovery_ms": percentiles([one.recovery_ms for one in done]),
        "baseline_restart_ms": percentiles([one.restart_ms for one in done]),
        "ring_ms": rings_ms,
        "by_kind": {
            kind: {
                "generations": len(mine),
                "identical": sum(one.identical for one in mine),
                "recovery_ms": percentiles([one.recovery_ms for one in mine if one.error is None]),
                "noticed_ms": percentiles([one.noticed_ms for one in mine if one.noticed_ms is not None]),
                "baseline_restart_ms": percentiles([one.restart_ms for one in mine]),
            }
            for kind in KINDS
            if (mine := [one for one in outcomes if one.kind == kind])
        },
        "errors": [one.error for one in outcomes if one.error],
        "different": [
            {"kind": one.kind, "places": one.places, "at_token": one.at_token} for one in done if not one.identical
        ],
        "places": {
            name: sum(place in one.places for one in outcomes) for place, name in enumerate(("head", "middle", "tail"))
        },
        "well": len(done) == len(outcomes) and all(one.identical for one in outcomes),
        "provenance": provenance_of_machine() | {"model": setup.model, "dtype": setup.dtype, "link": LINK},
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p95, by nearest rank."""
    ranked = sorted(values)
    return {f"p{p}": ranked[min(len(ranked) - 1, int(len(ranked) * p / 100))] for p in (50, 95)} if ranked else {}


__all__ = ["bench_faults", "percentiles", "spread"]
