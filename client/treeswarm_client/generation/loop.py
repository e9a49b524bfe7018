"""The client's loop: draft, ship, draft on while it travels, walk, commit."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import Answer
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import Walk
from treeswarm_client.chain.chain import Chain
from treeswarm_client.chain.in_flight import Interrupted
from treeswarm_client.drafters.seam import NO_TREE, Drafter, DraftTree, Verification
from treeswarm_client.generation.append_builder import AppendBuilder, Shipment
from treeswarm_client.generation.round_in_flight import RoundInFlight
from treeswarm_client.generation.stats import StatsRecorder
from treeswarm_client.planner.policy import Round, TreePolicy

T = TypeVar("T")

# Drafting behind a tree on its way stops so often to ship what it found: about a forward of a small draft on a CPU, and
# one more message costs a node as much.
STRIDE_S = 0.005


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class GenerationLimits:
    """When a generation ends."""

    max_new_tokens: int
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Committed:
    """The tokens one traversal bought."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    traversal: int
    finish: FinishReason | None
    """Set where these are the last."""


@dataclass(eq=False)
class _Stride:
    """Some drafting behind a tree on its way: until its time is up, or nobody needs it any more."""

    clock: Callable[[], float]
    over: threading.Event
    ended: bool = False
    until: float | None = None
    """Its time begins when the drafter's thread first asks: that may have had to wait for a turn as long as this."""

    def __call__(self, _promise: float) -> bool:
        now = self.clock()
        self.until = now + STRIDE_S if self.until is None else self.until
        self.ended = self.ended or self.over.is_set() or now > self.until
        return self.ended


@dataclass(eq=False, kw_only=True)
class Generation:
    """One prompt on one chain."""

    chain: Chain
    drafter: Drafter
    session: AppendBuilder
    limits: GenerationLimits
    policy: TreePolicy
    meter: StatsRecorder = field(default_factory=StatsRecorder)
    on_round: Callable[[Round], None] | None = None
    """Told of every tree that came back."""
    clock: Callable[[], float] = time.perf_counter
    _observed: "asyncio.Task[None]" = field(init=False)
    """The drafter knows what came of the last round."""
    _leaving: threading.Event = field(default_factory=threading.Event)
    """Whoever drafts may stop."""

    async def rounds(self, prompt: Sequence[int], settings: SamplingSettings) -> AsyncGenerator[Committed, None]:
        """Yield what each traversal commits, until a stop token or the limit."""
        self.policy.begin(self.chain.epoch.profiled_hops)
        begun = asyncio.create_task(self._apart(self.drafter.begin, prompt, settings))
        try:
            prefill, found = await self._traverse(self.session.prefill(prompt))
        finally:
            await begun
        news = self._commit(prefill, found)
        self._observe(Verification(NO_TREE, prefill.answers, (), found.bonus, prefill.alternatives))
        try:
            yield news
            while news.finish is None:
                tree = await self._draft()
                flight, found = await self._traverse(self.session.round(found.bonus, tree), first=len(tree))
                await self._observed
                self.session.accept(flight.shipment, found.accepted)
                news = self._commit(flight, found)
                self._observe(flight.verdict(found))
                yield news
                self.chain.reroute_if_faster(trunk=len(prompt) + self.meter.committed, rounds_left=self._rounds_left())
        finally:
            await self._observed

    # ---------------------------------------------------------------- drafting

    async def _draft(self) -> DraftTree:
        """What to ship first: no deeper than what may still be committed, since the mandatory node's answer is one
        token.  Where nothing is drafted, nobody waits for the drafter to observe the last round."""
        wanted = min(self.policy.nodes_to_draft(), self.chain.epoch.credit_rows - 1) if self._depth() else 0
        if not wanted:
            return self.policy.choose(NO_TREE)
        start = self.clock()
        await self._observed
        patience = self.policy.stop_drafting()
        tree = await self._apart(
            self.drafter.propose, wanted, self._depth(), lambda promise: patience(promise) or self._leaving.is_set()
        )
        self.meter.draft_s += self.clock() - start
        return self.policy.choose(tree)

    async def _draft_ahead(
        self, flight: RoundInFlight, on_their_way: "deque[asyncio.Future[Answer]]", most: int, over: threading.Event
    ) -> None:
        """Draft on below what travels, up to `most` nodes, and ship what is worth it, until the walk is over."""
        start = self.clock()
        await self._observed
        whole = False
        while not whole and not over.is_set():
            stride = _Stride(self.clock, over)
            wider = await self._apart(self.drafter.propose, most, self._depth(), stride)
            whole = not stride.ended
            if over.is_set():
                return
            # Once answers come, the walk may have left the branches that look best to the draft.
            if flight.landed:
                continue
            extended = self.policy.extension(flight.draft, wider, self.clock() - start)
            if 0 < len(extended) - len(flight.draft) <= self.chain.epoch.free_credit_rows:
                further = self.session.extend(flight.shipment, extended)
                answers = [await self.chain.append(append) for append in further.appends]
                # Only now: a walk that leads into these nodes must find their answers to wait for.
                flight.extend(further)
                on_their_way.extend(answers)

    def _observe(self, verdict: Verification) -> None:
        """Beside whatever comes next, until `_observed`."""
        self._observed = asyncio.create_task(self._apart(self.drafter.observe, verdict))

    async def _apart(self, job: Callable[..., T], *args: Any) -> T:
        """In a worker thread, and not left before it is done: the next generation's drafter may be this one."""
        running = asyncio.ensure_future(asyncio.to_thread(job, *args))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._leaving.set()
            await asyncio.wait({running})
            raise

    def _depth(self) -> int:
        """Levels below the mandatory token that may still be committed."""
        return self.limits.max_new_tokens - self.meter.committed - 1

    # ---------------------------------------------------------------- travelling

    async def _traverse(self, shipment: Shipment, *, first: int = 0) -> tuple[RoundInFlight, Walk]:
        """One request through the chain, which is mended as often as it breaks under way."""
        start = self.clock()
        broke: float | None = None
        flight = RoundInFlight(shipment)
        while True:
            try:
                found, first_s = await self._fly(flight)
                break
            except Interrupted:
                broke = broke or self.clock()
                trunk, tip = self.session.resumption(self.chain.epoch.answered)
                await self.chain.repair(trunk, tip)
                self.policy.begin(self.chain.epoch.profiled_hops)
                flight = RoundInFlight(self.session.again(flight.shipment, self.chain.epoch.number))
        seconds = self.clock() - start
        self.meter.add_traversal(seconds, flight.timings)
        if broke is None:
            self.chain.record_traversal(seconds)
        else:
            self.meter.recoveries.append((broke, self.clock()))
        if flight.shipment.draft is None:
            self.policy.learn_prefill(seconds, flight.timings, whole=broke is None)
        else:
            flown = Round(
                flight.draft, found, flight.landed - 1, first, seconds, first_s, flight.timings, broke is None
            )
            self.meter.add_walk(flown)
            if self.on_round is not None:
                self.on_round(flown)
            if (report := self.policy.learn(flown)) is not None:
                self.meter.reports.append(report)
        return flight, found

    async def _fly(self, flight: RoundInFlight) -> tuple[Walk, float]:
        """Ship, and take answers as they come until the walk is over; drafting goes on meanwhile.  Also returns when
        the last answer of the first shipment was here, in seconds, or 0.  Raises Interrupted."""
        start, first_s, first = self.clock(), 0.0, len(flight.shipment.asked)
        on_their_way: deque[asyncio.Future[Answer]] = deque()
        for append in flight.shipment.appends:
            on_their_way.append(await self.chain.append(append))
        async with self._drafting_ahead(flight, on_their_way):
            found: Walk | None = None
            while found is None:
                self._land(flight, await on_their_way.popleft())
                found = flight.found()
                if flight.landed == first:
                    first_s = self.clock() - start
        if on_their_way:
            self.chain.send_hint(*self.session.news(flight.shipment, found.accepted))
        return found, first_s

    def _land(self, flight: RoundInFlight, answer: Answer) -> None:
        try:
            flight.land(answer)
        except Malformed as error:
            # It, or a node before it that hid rows from it: the chain goes on without the one that we can name.
            self.chain.drop_node(self.chain.hops[-1], error)
            raise Interrupted(str(error)) from None

    @contextlib.asynccontextmanager
    async def _drafting_ahead(
        self, flight: RoundInFlight, on_their_way: "deque[asyncio.Future[Answer]]"
    ) -> AsyncGenerator[None, None]:
        most = 0 if flight.shipment.draft is None else self.policy.nodes_to_draft_in_flight()
        if not most:
            yield
            return
        over = threading.Event()
        drafting = asyncio.create_task(self._draft_ahead(flight, on_their_way, most, over))
        try:
            yield
        finally:
            over.set()
            start = self.clock()
            # A chain that broke meanwhile says so again to the next append.
            with contextlib.suppress(Interrupted):
                await drafting
            self.meter.draft_s += self.clock() - start

    # ---------------------------------------------------------------- committing

    def _commit(self, flight: RoundInFlight, found: Walk) -> Committed:
        tokens, logprobs = flight.said(found)
        end = self.limits.max_new_tokens - self.meter.committed
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.limits.stop_ids), len(tokens))
        kept = min(end, stop)
        self.meter.committed += kept
        finish: FinishReason | None = "length" if self.meter.committed >= self.limits.max_new_tokens else None
        if tokens[kept - 1] in self.limits.stop_ids:
            finish = "stop"
        return Committed(tuple(tokens[:kept]), tuple(logprobs[:kept]), self.meter.traversals, finish)

    def _rounds_left(self) -> float:
        return (self.limits.max_new_tokens - self.meter.committed) * self.meter.traversals / self.meter.committed
