"""What the map's viewers are told."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treeswarm.errors import RouteError
from treeswarm.session.walk import Walk
from treeswarm_bench.virtual_clock import run_virtually
from treeswarm_client.drafters.seam import DraftTree
from treeswarm_client.gateway.answers import token_text
from treeswarm_client.gateway.errors import Busy
from treeswarm_client.gateway.watchers import (
    AHEAD,
    KEEPALIVE_S,
    MAX_DRAWN_NODES,
    MAX_QUEUED_EVENTS,
    Watchers,
    round_as_dict,
)
from treeswarm_client.generation.run import Token
from treeswarm_client.planner.policy import Round


def decode(tokens: Sequence[int]) -> str:
    """Like sentencepiece: no space before the first word."""
    return " ".join(f"w{token}" for token in tokens)


def flown(parents: Sequence[int], accepted: Sequence[int] = (), first: int | None = None) -> Round:
    tree = DraftTree(
        np.array(parents, np.int64), np.arange(len(parents)), -np.arange(1, len(parents) + 1, dtype=np.float32)
    )
    return Round(
        tree, Walk(tuple(accepted), 99), len(parents), len(parents) if first is None else first, 0.05, 0.05, (), True
    )


def test_a_word_has_the_space_before_it() -> None:
    assert token_text(7, decode) == " w7"


def test_a_small_tree_is_drawn_whole() -> None:
    assert round_as_dict(flown([-1, 0, 0, 2], accepted=(0, 2), first=3), None) == {
        "nodes": 4,
        "first": 3,
        "parents": [-1, 0, 0, 2],
        "accepted": [0, 2],
        "ms": 50.0,
    }


def test_words_are_told_only_where_they_may_be() -> None:
    told = round_as_dict(flown([-1], accepted=(0,)), decode)
    assert (told["words"], told["bonus"]) == ([" w0"], " w99")


@given(st.integers(0, 2**32), st.integers(0, 3 * MAX_DRAWN_NODES))
def test_what_is_drawn_of_any_tree_is_a_tree_with_the_whole_walk(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    parents = [int(rng.integers(-1, i)) for i in range(size)]
    walk: list[int] = []
    at = int(rng.integers(-1, size)) if size else -1
    while at >= 0:
        walk.insert(0, at)
        at = parents[at]
    told = round_as_dict(flown(parents, walk), decode)
    assert told["nodes"] == size
    assert len(told["words"]) == len(told["parents"]) <= MAX_DRAWN_NODES + len(walk)
    assert all(-1 <= parent < i for i, parent in enumerate(told["parents"]))
    assert [told["words"][i] for i in told["accepted"]] == [f" w{node}" for node in walk]
    assert [told["parents"][i] for i in told["accepted"]] == [-1, *told["accepted"]][: len(walk)]


def test_a_generation_is_told_from_its_beginning_to_its_end() -> None:
    async def watch() -> list[dict[str, Any] | None]:
        watchers = Watchers(1)
        events = watchers.listen()
        watching = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        shown = watchers.generation(decode)
        shown.begin(12)
        for token in (5, 6):
            shown.said(Token(token, "", 0.0, token - 4))
        shown.round(flown([-1, 0], accepted=(0,)))
        shown.end("length")
        told = [await watching, await anext(events), await anext(events), await anext(events)]
        watchers.close()
        return [*told, *[event async for event in events]]

    begin, first, tree, end = run_virtually(watch())
    assert begin == {"kind": "begin", "id": 1, "prompt": 12}
    assert first is not None
    assert (first["kind"], first["bonus"]) == ("first", " w5")
    assert tree is not None
    assert (tree["kind"], tree["round"], tree["accepted"]) == ("round", 1, [0])
    assert end == {"kind": "end", "id": 1, "finish": "length"}


def test_who_comes_later_hears_of_the_swarm_and_of_what_is_under_way() -> None:
    async def watch() -> list[dict[str, Any] | None]:
        watchers = Watchers(2)
        early = watchers.listen()
        looked = asyncio.ensure_future(anext(early))

        async def look() -> dict[str, Any]:
            return {"kind": "overview", "models": []}

        looking = asyncio.ensure_future(watchers.poll_swarm(look))
        assert await looked == {"kind": "overview", "models": []}
        over, running = watchers.generation(None), watchers.generation(None)
        over.begin(1)
        running.begin(2)
        over.end("stop")
        late = watchers.listen()
        told = [await anext(late), await anext(late), await anext(late)]
        looking.cancel()
        return told

    overview, begun, quiet = run_virtually(watch())
    assert overview == {"kind": "overview", "models": []}
    assert begun == {"kind": "begin", "id": 2, "prompt": 2}
    assert quiet is None  # that nothing is new is told too


def test_a_look_that_fails_is_told_and_looked_again() -> None:
    async def watch() -> list[dict[str, Any] | None]:
        watchers = Watchers(1)
        looks = iter([RouteError("no broker"), None])

        async def look() -> dict[str, Any]:
            if error := next(looks, None):
                raise error
            return {"kind": "overview"}

        looking = asyncio.ensure_future(watchers.poll_swarm(look))
        events = watchers.listen()
        told = [await anext(events), await anext(events)]
        looking.cancel()
        return told

    assert run_virtually(watch()) == [{"kind": "waiting", "why": "no broker"}, {"kind": "overview"}]


def test_too_many_viewers_are_told_before_anything_is_sent() -> None:
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


def test_a_slow_viewer_misses_trees_and_hears_every_end() -> None:
    async def watch() -> list[str]:
        watchers = Watchers(1)
        events = watchers.listen()
        watching = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        shown = watchers.generation(None)
        shown.begin(1)
        for _ in range(2 * AHEAD):
            shown.round(flown([-1]))
        shown.end("stop")
        kinds = [event["kind"] for event in [await watching] if event]
        while kinds[-1] != "end":
            event = await anext(events)
            assert event is not None
            kinds.append(event["kind"])
        return kinds

    kinds = run_virtually(watch())
    assert kinds.count("round") < AHEAD
    assert (kinds[0], kinds[-1]) == ("begin", "end")


def test_a_viewer_who_does_not_read_is_let_go() -> None:
    async def watch() -> None:
        watchers = Watchers(1)
        watching = asyncio.ensure_future(anext(watchers.listen()))
        await asyncio.sleep(0)
        for _ in range(MAX_QUEUED_EVENTS + 1):
            watchers.generation(None).begin(1)
        with pytest.raises(StopAsyncIteration):
            await watching
        assert not watchers

    run_virtually(watch())
