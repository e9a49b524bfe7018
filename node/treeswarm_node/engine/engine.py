"""Continuous batching: whatever waits when the device falls idle goes into its next forward.

All choices are made in the event loop, where the sessions live; the one device thread only computes.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode, HopTiming
from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession
from treeswarm.session.steps import Step
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.config import BatchBudget
from treeswarm_node.engine.counters import Counters
from treeswarm_node.engine.model_runner import Computed, Runner
from treeswarm_node.engine.scheduler import next_batch
from treeswarm_node.kv_cache.kv_store import SessionKV

log = logging.getLogger(__name__)

# How far the smoothed queue follows one append: some dozens of them are a second of a busy node.
QUEUE_STEP = 1 / 32

Done = Callable[[Step, Computed, HopTiming], None]
"""Called in the event loop with the step as it ran."""


@dataclass(frozen=True, eq=False)
class WaitingStep:
    """A step waiting for the device."""

    session: NodeSession
    kv: SessionKV
    span: Span
    step: Step
    done: Done
    arrived: float

    @property
    def rows(self) -> int:
        return self.step.rows

    @property
    def prefill(self) -> bool:
        return self.step.append.prefill

    @property
    def commits(self) -> bool:
        return self.step.commits


@dataclass(eq=False)
class Engine:
    """Owns the queue and the device thread.  `run` for ever; `submit` from the same loop."""

    runner: Runner
    budget: BatchBudget
    counters: Counters = field(default_factory=Counters)
    clock: Callable[[], float] = time.perf_counter
    """In the device thread."""
    _waiting: deque[WaitingStep] = field(default_factory=deque)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)
    _running: list[WaitingStep] = field(default_factory=list)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the running forward is over."""

    @property
    def waiting(self) -> int:
        """Steps that are not in a forward yet."""
        return len(self._waiting)

    def submit(self, work: WaitingStep) -> None:
        """Queue a step; the queue is bounded by the credits of the sessions."""
        self._waiting.append(work)
        self._arrival.set()

    def discard_waiting(self, session: NodeSession) -> None:
        """Forget a session's waiting steps."""
        self._waiting = deque(work for work in self._waiting if work.session is not session)

    async def wait_until_idle(self, session: NodeSession) -> None:
        """Wait until no running forward touches the session, so that its KV can be freed."""
        while any(work.session is session for work in self._running):
            await self._over.wait()

    async def run(self) -> None:
        """Batch, compute, hand out; until cancelled."""
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="device") as thread:
                while True:
                    await self._arrival.wait()
                    self._running = self._take()
                    if not self._running:
                        self._arrival.clear()
                        continue
                    await self._forward(thread)
        finally:
            self._ended()  # with the thread's last forward: whoever waits to free its rows may

    def _ended(self) -> list[WaitingStep]:
        """No forward runs any more; returns what was in it."""
        finished, self._running = self._running, []
        self._over.set()
        self._over = asyncio.Event()
        return finished

    def _timed_run(self, segments: Sequence[Segment]) -> tuple[list[Computed], int]:
        """In the device thread: the results, and the microseconds they took."""
        start = self.clock()
        results = self.runner.run(segments)
        return results, int((self.clock() - start) * 1e6)

    def _take(self) -> list[WaitingStep]:
        waiting = list(self._waiting)
        if not waiting:
            return []
        chosen = next_batch(waiting, self.budget)
        taken = set(chosen)
        self._waiting = deque(work for i, work in enumerate(waiting) if i not in taken)
        due = [replace(waiting[i], step=waiting[i].session.start(waiting[i].step)) for i in chosen]
        self.counters.skipped_rows += sum(waiting[i].rows for i in chosen) - sum(work.rows for work in due)
        return due

    async def _forward(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        segments = [Segment(work.kv, work.step, work.span) for work in self._running]
        try:
            results, compute_us = await loop.run_in_executor(thread, self._timed_run, segments)
        except Exception as error:  # a forward that fails costs its own sessions, never the node
            log.exception("a forward of %d steps failed", len(segments))
            compute_us = 0
            results = [Computed(error=Refused(f"the node failed to compute: {error}", FaultCode.INTERNAL))] * len(
                segments
            )
        finished = self._ended()
        sessions = len({id(work.session) for work in finished})
        self.counters.frames += len(finished)
        self.counters.forwards += 1
        self.counters.forward_sessions += sessions
        self.counters.compute_s += compute_us / 1e6
        for work, computed in zip(finished, results, strict=True):
            queued = int((started - work.arrived) * 1e6)
            self.counters.waited_s += started - work.arrived
            self.counters.rows += work.rows
            self.counters.tokens += len(work.step.commit_slots) + (work.rows if work.prefill else 0)
            self.counters.queue_s += QUEUE_STEP * (started - work.arrived - self.counters.queue_s)
            work.done(work.step, computed, HopTiming(queued, compute_us, work.rows, sessions))
