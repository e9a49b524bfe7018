"""Jobs run in the device's spare time: no step waits for more than one slice."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tests.node.conftest import append_of

from treeswarm.protocol.spans import Span
from treeswarm.session.session import NodeSession, SessionTerms
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.config import BatchBudget
from treeswarm_node.engine.engine import Engine, WaitingStep
from treeswarm_node.engine.model_runner import Computed


@dataclass
class LoggingRunner:
    log: list[str]

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        self.log.append("step")
        return [Computed(tokens=np.zeros(1, np.int64)) for _ in segments]


@dataclass(eq=False)
class LoggingJob:
    log: list[str]
    name: str = "a"
    slices: int = 3
    fails: bool = False
    after: list[asyncio.Event] = field(default_factory=list)

    def begin(self) -> None:
        self.log.append(f"begin {self.name}")

    def run_slice(self) -> bool:
        if self.fails:
            raise RuntimeError("a head that does not fit")
        self.log.append(f"slice {self.name}")
        self.slices -= 1
        return not self.slices

    def finish(self) -> None:
        self.log.append(f"finish {self.name}")


def session() -> NodeSession:
    return NodeSession(SessionTerms(1, 16, 4, 100, 9, 0))


def step_of(owner: NodeSession, done: asyncio.Event) -> WaitingStep:
    (step,) = owner.receive(append_of(0, 1, [0], [5], prefill=True))
    kv: object = None
    return WaitingStep(owner, kv, Span(0, 1), step, lambda *_: done.set(), 0.0)  # type: ignore[arg-type]


def run(scenario: str) -> list[str]:
    """Play a scenario on an engine, and return what happened in order."""
    log: list[str] = []

    async def play() -> None:
        engine = Engine(LoggingRunner(log), BatchBudget(64, 64))
        running = asyncio.create_task(engine.run())
        first, second, done = session(), session(), asyncio.Event()
        engine.submit_job(first, LoggingJob(log, fails=scenario == "failing"))
        if scenario == "replaced":
            engine.submit_job(first, LoggingJob(log, "b"))
        elif scenario == "discarded":
            engine.discard_waiting(first)
        elif scenario == "two":
            engine.submit_job(second, LoggingJob(log, "b", slices=1))
        if scenario in ("step waits", "failing"):
            engine.submit(step_of(second, done))
            await done.wait()
        await asyncio.sleep(1.0)
        if scenario == "step between":
            log.clear()
            engine.submit_job(first, LoggingJob(log, slices=1000))
            while not log:
                await asyncio.sleep(0)
            log.append("submitted")
            engine.submit(step_of(second, done))
            await done.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    run_virtually(play())
    return log


def test_a_waiting_step_goes_first() -> None:
    assert run("step waits") == ["step", "begin a", "slice a", "slice a", "slice a", "finish a"]


def test_a_step_waits_for_one_slice_at_most() -> None:
    log = run("step between")
    between = log[log.index("submitted") + 1 : log.index("step")]
    assert between in ([], ["slice a"])


def test_a_newer_job_of_a_session_replaces_the_older() -> None:
    assert run("replaced") == ["begin b", "slice b", "slice b", "slice b", "finish b"]


def test_a_discarded_job_does_not_run() -> None:
    assert run("discarded") == []


def test_the_oldest_job_is_finished_first() -> None:
    assert run("two")[-3:] == ["begin b", "slice b", "finish b"]


def test_a_job_that_fails_ends_nothing_else() -> None:
    assert run("failing") == ["step", "begin a"]
