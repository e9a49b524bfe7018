"""Viewers of the map receive the swarm, and generations from their beginning to their end."""

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.rounds import decode, make_round

from treeswarm.errors import RouteError
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.gateway.answers.token_text import token_text
from treeswarm_client.gateway.browser.watchers import (
    KEEPALIVE_S,
    MAX_DRAWN_NODES,
    MAX_QUEUED_EVENTS,
    MAX_QUEUED_ROUNDS,
    Watchers,
    round_as_dict,
)
from treeswarm_client.gateway.errors import Busy
from treeswarm_client.generation.run import Token


def test_token_text_has_the_space_before_it() -> None:
    assert token_text(7, decode) == " w7"


def test_small_tree_is_sent_whole() -> None:
    assert round_as_dict(make_round([-1, 0, 0, 2], accepted=(0, 2), first=3), None) == {
        "nodes": 4,
        "first": 3,
        "parents": [-1, 0, 0, 2],
        "accepted": [0, 2],
        "ms": 50.0,
    }


def test_words_are_sent_only_with_a_decoder() -> None:
    event = round_as_dict(make_round([-1], accepted=(0,)), decode)
    assert (event["words"], event["bonus"]) == ([" w0"], " w99")


@given(st.integers(0, 2**32), st.integers(0, 3 * MAX_DRAWN_NODES))
def test_reduced_tree_is_a_tree_with_the_whole_walk(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(-1, i)) for i in range(size)]
    walk: list[int] = []
    at = int(rng.integers(-1, size)) if size else -1
    while at >= 0:
        walk.insert(0, at)
        at = parents[at]
    event = round_as_dict(make_round(parents, walk), decode)
    assert event["nodes"] == size
    assert len(event["words"]) == len(event["parents"]) <= MAX_DRAWN_NODES + len(walk)
    assert all(-1 <= parent < i for i, parent in enumerate(event["parents"]))
    assert [event["words"][i] for i in event["accepted"]] == [f" w{node}" for node in walk]
    assert [event["parents"][i] for i in event["accepted"]] == [-1, *event["accepted"]][: len(walk)]


def test_generation_is_sent_from_beginning_to_end() -> None:
    async def watch() -> list[dict[str, Any] | None]:
        watchers = Watchers(1)
        events = watchers.listen()
        watching = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        watched = watchers.add_generation(decode)
        watched.begin(12)
        for token in (5, 6):
            watched.add_token(Token(token, "", 0.0, token - 4))
        watched.add_round(make_round([-1, 0], accepted=(0,)))
        watched.end("length")
        received = [await watching, await anext(events), await anext(events), await anext(events)]
        watchers.close()
        return [*received, *[event async for event in events]]

    begin, first, tree, end = run_virtually(watch())
    assert begin == {"kind": "begin", "id": 1, "prompt": 12}
    assert first is not None
    assert (first["kind"], first["bonus"]) == ("first", " w5")
    assert tree is not None
    assert (tree["kind"], tree["round"], tree["accepted"]) == ("round", 1, [0])
    assert end == {"kind": "end", "id": 1, "finish": "length"}


def test_late_viewer_gets_overview_and_running_generations() -> None:
    async def watch() -> list[dict[str, Any] | None]:
        watchers = Watchers(2)
        early = watchers.listen()
        first = asyncio.ensure_future(anext(early))

        async def read_overview() -> dict[str, Any]:
            return {"kind": "overview", "models": []}

        polling = asyncio.ensure_future(watchers.poll_swarm(read_overview))
        assert await first == {"kind": "overview", "models": []}
        ended, running = watchers.add_generation(None), watchers.add_generation(None)
        ended.begin(1)
        running.begin(2)
        ended.end("stop")
        late = watchers.listen()
        received = [await anext(late), await anext(late), await anext(late)]
        polling.cancel()
        return received

    overview, begin, quiet = run_virtually(watch())
    assert overview == {"kind": "overview", "models": []}
    assert begin == {"kind": "begin", "id": 2, "prompt": 2}
    assert quiet is None  # an interval without events


def test_failed_look_is_reported_and_repeated() -> None:
    async def watch() -> list[dict[str, Any] | None]:
        watchers = Watchers(1)
        results = iter([RouteError("no broker"), None])

        async def read_overview() -> dict[str, Any]:
            if error := next(results, None):
                raise error
            return {"kind": "overview"}

        polling = asyncio.ensure_future(watchers.poll_swarm(read_overview))
        events = watchers.listen()
        received = [await anext(events), await anext(events)]
        polling.cancel()
        return received

    assert run_virtually(watch()) == [{"kind": "waiting", "why": "no broker"}, {"kind": "overview"}]


def test_too_many_viewers_are_refused_at_once() -> None:
    async def watch() -> None:
        watchers = Watchers(1)
        events = watchers.listen()
        watching = asyncio.ensure_future(anext(events))
        await asyncio.sleep(KEEPALIVE_S / 2)
        with pytest.raises(Busy, match="close some"):
            watchers.listen()
        watchers.close()
        with pytest.raises(StopAsyncIteration):
            await watching
        watchers.listen()  # there is room again

    run_virtually(watch())


def test_slow_viewer_misses_rounds_but_no_end() -> None:
    async def watch() -> list[str]:
        watchers = Watchers(1)
        events = watchers.listen()
        watching = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        watched = watchers.add_generation(None)
        watched.begin(1)
        for _ in range(2 * MAX_QUEUED_ROUNDS):
            watched.add_round(make_round([-1]))
        watched.end("stop")
        kinds = [event["kind"] for event in [await watching] if event]
        while kinds[-1] != "end":
            event = await anext(events)
            assert event is not None
            kinds.append(event["kind"])
        return kinds

    kinds = run_virtually(watch())
    assert kinds.count("round") < MAX_QUEUED_ROUNDS
    assert (kinds[0], kinds[-1]) == ("begin", "end")


def test_viewer_who_does_not_read_is_disconnected() -> None:
    async def watch() -> None:
        watchers = Watchers(1)
        watching = asyncio.ensure_future(anext(watchers.listen()))
        await asyncio.sleep(0)
        for _ in range(MAX_QUEUED_EVENTS + 1):
            watchers.add_generation(None).begin(1)
        with pytest.raises(StopAsyncIteration):
            await watching
        assert not watchers

    run_virtually(watch())
