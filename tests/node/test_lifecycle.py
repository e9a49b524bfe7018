"""A node's life when something is in the way: a pause that must free memory, a load that fails or takes too long."""

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
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.spans import Span
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_node import lifecycle, serve
from treeswarm_node.cli.arguments import read_config
from treeswarm_node.cli.main import _serve_until_stopped
from treeswarm_node.config import NodeConfig
from treeswarm_node.engine.loaded_stage import ModelInfo, load_stage
from treeswarm_node.lifecycle import Lifecycle
from treeswarm_node.membership.announcer import Membership
from treeswarm_node.schedule import Schedule, until_within
from treeswarm_node.serve import Serving, serving

SOON_S = 60.0


@pytest.fixture
def config(tmp_path: Path) -> NodeConfig:
    flags = ["--blocks", "0:1", "--listen", "127.0.0.1:0", "--registry", "none", "--threads", "1"]
    flags += ["--kv-tokens", "1024", "--grace", "0"]
    return read_config(["demo", *flags, "--identity", str(tmp_path / "id.pem")], {})


def _with_attention(config: NodeConfig, attention: str) -> NodeConfig:
    return replace(config, device=replace(config.device, attention=attention))


@contextlib.asynccontextmanager
async def living(config: NodeConfig) -> AsyncIterator[tuple[Serving, asyncio.Event]]:
    """A node that serves and obeys."""
    stop = asyncio.Event()
    async with serving(config) as served:
        life = asyncio.create_task(served.life.live(stop))
        try:
            yield served, stop
        finally:
            stop.set()
            await asyncio.wait_for(life, SOON_S)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not holds():
            await asyncio.sleep(0.01)


async def order(life: Lifecycle, *orders: str) -> None:
    for one in orders:
        await life.membership.orders.put(one)


async def test_paused_a_node_keeps_nothing_of_what_it_served_first(config: NodeConfig) -> None:
    async with living(config) as (served, _):
        node = served.life.node
        assert node.stage is not None
        kept = [weakref.ref(one) for one in (node.stage, node.stage.engine, node.stage.store)]
        await order(served.life, "pause")
        await until(lambda: node.state is NodeState.PAUSED)
        gc.collect()
        assert [one() for one in kept] == [None] * 3


async def test_a_node_that_cannot_load_stays_paused_and_tries_again(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [RuntimeError("CUDA out of memory"), OSError("no space left on device")]

    @contextlib.asynccontextmanager
    async def at_last(*args: Any) -> AsyncIterator[Any]:
        if failures:
            raise failures.pop()
        async with load_stage(*args) as stage:
            yield stage

    async with living(config) as (served, _):
        node, told = served.life.node, list[NodeState]()
        announce = served.life.membership.announce

        async def heard() -> None:
            told.append(node.state)
            await announce()

        monkeypatch.setattr(served.life.membership, "announce", heard)
        monkeypatch.setattr(lifecycle, "load_stage", at_last)
        monkeypatch.setattr(lifecycle, "LOAD_AGAIN_S", 0.05)
        await order(served.life, "pause", "resume")
        await until(lambda: not failures and node.state is NodeState.ONLINE)
        changes = [state for state, _ in itertools.groupby(told) if state is not NodeState.ONLINE]
        paused_and_tried = [NodeState.PAUSED, NodeState.JOINING]
        assert changes == [NodeState.DRAINING, *3 * paused_and_tried]


async def test_an_owner_who_pauses_is_not_served_again_by_a_retry(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = list[Span]()

    @contextlib.asynccontextmanager
    async def never(config: NodeConfig, model: ModelInfo, span: Span, *rest: Any) -> AsyncIterator[Any]:
        tried.append(span)
        raise RuntimeError("CUDA out of memory")
        yield

    async with living(config) as (served, _):
        monkeypatch.setattr(lifecycle, "load_stage", never)
        monkeypatch.setattr(lifecycle, "LOAD_AGAIN_S", 0.2)
        await order(served.life, "pause", "resume", "pause")
        await until(lambda: len(tried) == 1 and served.life.membership.orders.empty())
        await asyncio.sleep(0.5)
        assert len(tried) == 1


@contextlib.asynccontextmanager
async def for_ever(*args: Any) -> AsyncIterator[Any]:
    await asyncio.Event().wait()
    yield


async def test_told_to_stop_a_node_does_not_wait_for_what_it_loads(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with living(config) as (served, stop):
        monkeypatch.setattr(lifecycle, "load_stage", for_ever)
        await order(served.life, "pause", "resume")
        await until(lambda: served.life.node.state is NodeState.JOINING)
        stop.set()
    assert served.life.node.state is NodeState.GONE


async def test_told_to_stop_while_it_first_loads_a_node_says_that_it_is_gone(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list[NodeState]()
    leave = Membership.leave

    async def noticed(membership: Membership) -> None:
        await leave(membership)
        left.append(membership.make_record(1, 1).state)

    def stopping(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return for_ever(*args)

    monkeypatch.setattr(Membership, "leave", noticed)
    monkeypatch.setattr(lifecycle, "load_stage", stopping)
    await asyncio.wait_for(_serve_until_stopped(config, None), SOON_S)
    assert left == [NodeState.GONE]


@pytest.mark.parametrize(("wanted", "name"), [("auto", "torch-reference"), ("flash", "torch-flash")])
async def test_a_node_says_which_attention_it_computes_with(config: NodeConfig, wanted: str, name: str) -> None:
    async with load_stage(_with_attention(config, wanted), ModelInfo.find("demo"), Span(0, 1)) as stage:
        assert stage.served.attention == name


async def test_an_attention_that_cannot_be_is_refused_before_anything_is_announced(
    config: NodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_device", lambda _: torch.device("mps"))
    with pytest.raises(BadRequest, match=r"no flash kernel for mps\): give --attention auto"):
        async with serving(_with_attention(config, "flash")):
            pass


async def test_a_load_that_nobody_waits_for_ends(config: NodeConfig) -> None:
    begun, goes_on, calls = threading.Event(), threading.Event(), list[int]()

    def slow(done: int, total: int, what: str) -> None:
        calls.append(done)
        begun.set()
        goes_on.wait(SOON_S)

    model = ModelInfo.find("demo")
    loading = asyncio.create_task(load_stage(config, model, Span(0, 2), progress=slow).__aenter__())
    await asyncio.to_thread(begun.wait, SOON_S)
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    so_far = len(calls)
    goes_on.set()
    await asyncio.get_running_loop().shutdown_default_executor()
    assert loading.cancelled()
    assert len(calls) == so_far


def test_a_node_waits_for_its_hours() -> None:
    async def waited_until() -> float:
        loop = asyncio.get_running_loop()
        began = datetime(2026, 1, 1, 20, 0)
        hours = Schedule.parse("22:00-07:00")
        await until_within(hours, lambda: began + timedelta(seconds=loop.time()))
        waited = loop.time()
        await until_within(hours, lambda: began + timedelta(seconds=loop.time()))
        assert loop.time() == waited
        return waited

    assert 7200 <= run_virtually(waited_until()) < 7230
