"""Batch continuously: all steps that wait when the device becomes idle are candidates for its next forward.

All decisions are made in the event loop, where the sessions are; the single device thread only computes.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

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
from treeswarm_node.engine.step_rules import StepRules
from treeswarm_node.kv_cache.kv_store import SessionKV

log = logging.getLogger(__name__)

# Weight of one append in the moving average of the queueing time, which so covers some dozens of appends: about a
# second of a busy node.
QUEUE_SMOOTHING = 1 / 32

OnComputed = Callable[[Step, Computed, HopTiming], None]
"""Callback that the event loop runs with the step as it was computed, its result and its timing."""


@dataclass(frozen=True, eq=False)
class WaitingStep:
    """Holds a step that waits for the device."""

    session: NodeSession
    kv: SessionKV
    span: Span
    """Blocks to run."""
    step: Step
    on_computed: OnComputed
    arrived: float
    """Time at which the step arrived, in seconds of the event loop's clock."""
    speculates: bool = False
    """Whether the states of its rows are kept for a speculator."""
    sums_from: int | None = None
    """Position in the text from which rows get sums of taps for the next node, or None if none is sent on."""
    rules: StepRules | None = None
    """Rules for the logits of its answered rows, or None for none."""

    @property
    def segment(self) -> Segment:
        """The step as a part of a forward."""
        return Segment(self.kv, self.step, self.span, self.speculates, self.sums_from, self.rules)

    @property
    def rows(self) -> int:
        return self.step.rows

    @property
    def prefill(self) -> bool:
        return self.step.append.prefill

    @property
    def commits(self) -> bool:
        return self.step.commits


class SpareTimeJob(Protocol):
    """Work for the device that waits until no step does, in slices of a small forward each."""

    def begin(self) -> None:
        """Prepare the work; called in the event loop, right before the first slice."""
        ...

    def run_slice(self) -> bool:
        """Do the next slice in the device thread, and return whether it was the last one."""
        ...

    def finish(self) -> None:
        """Deliver the result; called in the event loop after the last slice, unless the job was discarded."""
        ...


@dataclass(eq=False)
class Engine:
    """Owns the queue of steps and the device thread.

    `run` must be running all the time; `submit` is called from the same event loop.
    """

    runner: Runner
    budget: BatchBudget
    counters: Counters = field(default_factory=Counters)
    clock: Callable[[], float] = time.perf_counter
    """Clock of the device thread, in seconds."""
    share: float = 1.0
    """Share of the time in which jobs may use the device; the runner keeps to it by itself."""
    _waiting: deque[WaitingStep] = field(default_factory=deque)
    _arrival: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a step arrives."""
    _running: list[WaitingStep] = field(default_factory=list)
    """Steps of the running forward."""
    _jobs: dict[int, SpareTimeJob] = field(default_factory=dict)
    """Jobs that wait or are under way, by the id of their session, oldest first."""
    _begun: set[SpareTimeJob] = field(default_factory=set)
    """Jobs of which a slice was run."""
    _forward_done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the running forward has ended, and then replaced."""

    @property
    def waiting(self) -> int:
        """Number of steps that are not in a forward yet."""
        return len(self._waiting)

    def submit(self, step: WaitingStep) -> None:
        """Add a step to the queue, whose length the credits of the sessions limit."""
        self._waiting.append(step)
        self._arrival.set()

    def submit_job(self, session: NodeSession, job: SpareTimeJob) -> None:
        """Let a job run when no step waits.  It replaces the session's last job, if that is not finished."""
        self._discard_job(session)
        self._jobs[id(session)] = job
        self._arrival.set()

    def discard_waiting(self, session: NodeSession) -> None:
        """Remove a session's steps from the queue, and its job."""
        self._waiting = deque(step for step in self._waiting if step.session is not session)
        self._discard_job(session)

    def _discard_job(self, session: NodeSession) -> None:
        job = self._jobs.pop(id(session), None)
        if job is not None:
            self._begun.discard(job)

    async def wait_until_idle(self, session: NodeSession) -> None:
        """Wait until no running forward uses the session, so that its KV rows can be freed."""
        while any(step.session is session for step in self._running):
            await self._forward_done.wait()

    async def run(self) -> None:
        """Choose a batch, compute it and deliver the results, again and again until cancelled."""
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="device") as thread:
                while True:
                    await self._arrival.wait()
                    self._running = self._take_batch()
                    if self._running:
                        await self._forward(thread)
                    elif self._jobs:
                        await self._run_slice(thread)
                    else:
                        self._arrival.clear()
        finally:
            # The executor has waited for the thread's last forward: wake those that wait to free its rows.
            self._end_forward()

    def _end_forward(self) -> list[WaitingStep]:
        """Mark the running forward as ended, and return its steps."""
        finished, self._running = self._running, []
        self._forward_done.set()
        self._forward_done = asyncio.Event()
        return finished

    def _run_timed(self, segments: Sequence[Segment]) -> tuple[list[Computed], int]:
        """Return the results and the microseconds they took; runs in the device thread."""
        start = self.clock()
        results = self.runner.run(segments)
        return results, int((self.clock() - start) * 1e6)

    def _take_batch(self) -> list[WaitingStep]:
        """Remove the steps of the next batch from the queue, and return them without the rows that died meanwhile."""
        waiting = list(self._waiting)
        if not waiting:
            return []
        chosen = next_batch(waiting, self.budget)
        taken = set(chosen)
        self._waiting = deque(step for i, step in enumerate(waiting) if i not in taken)
        batch = [replace(waiting[i], step=waiting[i].session.start(waiting[i].step)) for i in chosen]
        self.counters.skipped_rows += sum(waiting[i].rows for i in chosen) - sum(step.rows for step in batch)
        return batch

    async def _run_slice(self, thread: ThreadPoolExecutor) -> None:
        """Run one slice of the oldest job.  Steps that arrive meanwhile wait for no more than that."""
        session, job = next(iter(self._jobs.items()))
        is_last = False
        try:
            if job not in self._begun:
                job.begin()
                self._begun.add(job)
            is_last = await asyncio.get_running_loop().run_in_executor(thread, self._run_throttled, job)
        except Exception:  # what nobody waits for must not end the node
            log.exception("a job in the device's spare time failed")
            self._begun.discard(job)
            if self._jobs.get(session) is job:
                del self._jobs[session]
            return
        if is_last and self._jobs.get(session) is job:
            del self._jobs[session]
            self._begun.discard(job)
            job.finish()

    def _run_throttled(self, job: SpareTimeJob) -> bool:
        """Run a slice in the device thread, and rest so that other programs can use the device."""
        start = self.clock()
        is_last = job.run_slice()
        if self.share < 1.0:
            time.sleep((self.clock() - start) * (1.0 / self.share - 1.0))
        return is_last

    async def _forward(self, thread: ThreadPoolExecutor) -> None:
        """Compute the batch in `_running` and deliver its results."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        segments = [step.segment for step in self._running]
        try:
            results, compute_us = await loop.run_in_executor(thread, self._run_timed, segments)
        except Exception as error:  # a forward that fails ends its own sessions, never the node
            log.exception("a forward of %d steps failed: their sessions end", len(segments))
            compute_us = 0
            failure = Computed(error=Refused(f"the node failed to compute: {error}", FaultCode.INTERNAL))
            results = [failure] * len(segments)
        finished = self._end_forward()
        sessions = len({id(step.session) for step in finished})
        self.counters.frames += len(finished)
        self.counters.forwards += 1
        self.counters.forward_sessions += sessions
        self.counters.compute_s += compute_us / 1e6
        for step, computed in zip(finished, results, strict=True):
            waited_s = started - step.arrived
            self.counters.waited_s += waited_s
            self.counters.rows += step.rows
            self.counters.tokens += len(step.step.commit_slots) + (step.rows if step.prefill else 0)
            self.counters.queue_s += QUEUE_SMOOTHING * (waited_s - self.counters.queue_s)
            timing = HopTiming(int(waited_s * 1e6), compute_us, step.rows, sessions)
            step.on_computed(step.step, computed, timing)
