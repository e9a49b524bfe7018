"""A node's lifecycle under difficulties: a pause must free memory, a load fails or takes too long."""

import asyncio
import contextlib
import gc
import itertools
import os
import signal
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from treeswarm.errors import BadRequest
from treeswarm.progress import CHECKING, PROVING
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node import lifecycle, serve
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.cli.running import _serve_until_stopped
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, load_stage
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.schedule import Schedule, wait_until_within
from treeswarm_node.serve import RunningNode, run_node

SOON_S = 60.0


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    flags = ["--blocks", "0:1", "--listen", "127.0.0.1:0", "--registry", "none", "--threads", "1"]
    flags += ["--kv-tokens", "1024", "--grace", "0", "--device", "cpu", "--dtype", "float32"]
    flags += ["--quantization", "none", "--activations", "native"]
    return read_config(["demo", *flags, "--identity", str(tmp_path / "id.pem")], {})


def _with_attention(config: NodeConfig, attention: str) -> NodeConfig:
    return replace(config, device=replace(config.device, attention=attention))


@contextlib.asynccontextmanager
async def obedient_node(config: NodeConfig) -> AsyncIterator[tuple[RunningNode, asyncio.Event]]:
    """Run a node that obeys orders, with the event that stops it."""
    stop = asyncio.Event()
    async with run_node(config) as running:
        task = asyncio.create_task(running.lifecycle.run(stop))
        try:
            yield running, stop
        finally:
            stop.set()
            await asyncio.wait_for(task, SOON_S)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.01)


async def give_orders(lifecycle: Lifecycle, *orders: str) -> None:
    for order in orders:
        await lifecycle.membership.orders.put(order)


async def test_pause_frees_the_stage_served_first(config: NodeConfig) -> None:
    async with obedient_node(config) as (running, _):
        node = running.lifecycle.node
        assert node.stage is not None
        references = [weakref.ref(part) for part in (node.stage, node.stage.engine, node.stage.store)]
        await give_orders(running.lifecycle, "pause")
        await wait_for(lambda: node.state is NodeState.PAUSED)
        gc.collect()
        assert [reference() for reference in references] == [None] * 3


async def test_failed_load_pauses_the_node_and_is_tried_again(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RuntimeError("CUDA out of memory"), OSError("no space left on device")]

    @contextlib.asynccontextmanager
    async def load_at_third_try(*args: Any) -> AsyncIterator[Any]:
        if failures:
            raise failures.pop()
        async with load_stage(*args) as stage:
            yield stage

    async with obedient_node(config) as (running, _):
        node, states = running.lifecycle.node, list[NodeState]()
        announce = running.lifecycle.membership.announce

        async def record_state() -> None:
            states.append(node.state)
            await announce()

        monkeypatch.setattr(running.lifecycle.membership, "announce", record_state)
        monkeypatch.setattr(lifecycle, "load_stage", load_at_third_try)
        monkeypatch.setattr(lifecycle, "LOAD_AGAIN_S", 0.05)
        await give_orders(running.lifecycle, "pause", "resume")
        await wait_for(lambda: not failures and node.state is NodeState.ONLINE)
        changes = [state for state, _ in itertools.groupby(states) if state is not NodeState.ONLINE]
        paused_and_tried = [NodeState.PAUSED, NodeState.JOINING]
        assert changes == [NodeState.DRAINING, *3 * paused_and_tried]


async def test_pause_by_the_owner_ends_the_retries(config: NodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = list[Span]()

    @contextlib.asynccontextmanager
    async def fail_to_load(config: NodeConfig, model: ModelInfo, span: Span, *rest: Any) -> AsyncIterator[Any]:
        attempts.append(span)
        raise RuntimeError("CUDA out of memory")
        yield

    async with obedient_node(config) as (running, _):
        monkeypatch.setattr(lifecycle, "load_stage", fail_to_load)
        monkeypatch.setattr(lifecycle, "LOAD_AGAIN_S", 0.2)
        await give_orders(running.lifecycle, "pause", "resume", "pause")
        await wait_for(lambda: len(attempts) == 1 and running.lifecycle.membership.orders.empty())
        await asyncio.sleep(0.5)
        assert len(attempts) == 1


@contextlib.asynccontextmanager
async def load_forever(*args: Any) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


async def test_stop_cancels_a_load(config: NodeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    async with obedient_node(config) as (running, stop):
        monkeypatch.setattr(lifecycle, "load_stage", load_forever)
        await give_orders(running.lifecycle, "pause", "resume")
        await wait_for(lambda: running.lifecycle.node.state is NodeState.JOINING)
        stop.set()
    assert running.lifecycle.node.state is NodeState.GONE


async def test_stop_during_the_first_load_withdraws_the_record(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    last_states = list[NodeState]()
    leave = Membership.leave

    async def leave_and_record(membership: Membership) -> None:
        await leave(membership)
        last_states.append(membership.make_record(1, 1).state)

    def stop_while_loading(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load_forever(*args)

    monkeypatch.setattr(Membership, "leave", leave_and_record)
    monkeypatch.setattr(lifecycle, "load_stage", stop_while_loading)
    assert await asyncio.wait_for(_serve_until_stopped(config, None), SOON_S) == signal.SIGTERM
    assert last_states == [NodeState.GONE]


@pytest.mark.parametrize(("attention", "name"), [("auto", "torch-sdpa"), ("flash", "torch-flash")])
async def test_stage_names_its_attention(config: NodeConfig, attention: str, name: str) -> None:
    async with load_stage(_with_attention(config, attention), ModelInfo.find("demo"), Span(0, 1)) as stage:
        assert stage.served.attention == name


async def test_stage_reports_its_tests_after_its_weights(config: NodeConfig) -> None:
    reports = list[tuple[int, int, str]]()
    model = ModelInfo.find("demo")
    async with load_stage(config, model, Span(0, 1), progress=lambda *report: reports.append(report)):
        assert reports[-3][2] == CHECKING
        assert reports[-2:] == [(0, 0, PROVING), (1, 1, PROVING)]


async def test_unsupported_attention_is_refused_before_announcing(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_device", lambda _: torch.device("mps"))
    with pytest.raises(BadRequest, match=r"no flash kernel for mps\): give --attention auto"):
        async with run_node(_with_attention(config, "flash")):
            pass


async def test_cancelled_load_stops_reading_tensors(config: NodeConfig) -> None:
    begun, resume, calls = threading.Event(), threading.Event(), list[int]()

    def slow(done: int, total: int, what: str) -> None:
        calls.append(done)
        begun.set()
        resume.wait(SOON_S)

    model = ModelInfo.find("demo")
    loading = asyncio.create_task(load_stage(config, model, Span(0, 2), progress=slow).__aenter__())
    await asyncio.to_thread(begun.wait, SOON_S)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    calls_before = len(calls)
    resume.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert loading.cancelled()
    assert len(calls) == calls_before


def test_node_waits_for_its_hours() -> None:
    async def waited_until() -> float:
        loop = asyncio.get_running_loop()
        began = datetime(2026, 1, 1, 20, 0)
        hours = Schedule.parse("22:00-07:00")
        await wait_until_within(hours, lambda: began + timedelta(seconds=loop.time()))
        waited = loop.time()
        await wait_until_within(hours, lambda: began + timedelta(seconds=loop.time()))
        assert loop.time() == waited
        return waited

    assert 7200 <= run_virtually(waited_until()) < 7230
