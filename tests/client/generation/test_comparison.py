"""Plain decoding and trees write the same text in turns, so that both meet the same load."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from treeswarm.errors import NodeLost
from treeswarm_client.generation.comparison import Comparison, Lane, compare_with_plain
from treeswarm_client.generation.run import Run, Token, TreeSize
from treeswarm_client.generation.stats import StatsRecorder

ROUND_S = 0.1
TOKENS_PER_TREE = 4


@dataclass
class FakeClient:
    """Writes one token per round without trees and four with them; a round takes as long as the load at its start
    says."""

    load: Callable[[float], float] = lambda now: 1.0
    text: Callable[[TreeSize, int], int] = lambda size, position: position
    fails_at: int | None = None
    now: float = 0.0
    open_runs: int = 0
    started: list[TreeSize] = field(default_factory=list)

    def stream(self, prompt: str | Sequence[int], *, max_new_tokens: int, tree_size: TreeSize, ignore_eos: bool) -> Run:
        recorder = StatsRecorder()
        run = Run(tokens=self._tokens(recorder, max_new_tokens, tree_size), prompt_ids=[1], recorder=recorder)
        self.started.append(tree_size)
        return self._noting(run)

    def _noting(self, run: Run) -> Run:
        inner = run.tokens

        async def tokens() -> AsyncGenerator[Token, None]:
            self.open_runs += 1
            try:
                async for token in inner:
                    run.token_ids.append(token.id)
                    yield token
                self.now += 5.0  # closing takes long, and is no part of the text
            finally:
                self.open_runs -= 1

        run.tokens = tokens()
        return run

    async def _tokens(self, recorder: StatsRecorder, count: int, size: TreeSize) -> AsyncGenerator[Token, None]:
        written = 0
        while written < count:
            if self.fails_at is not None and written >= self.fails_at:
                raise NodeLost("the node is gone", "127.0.0.1:1")
            seconds = ROUND_S * self.load(self.now)
            self.now += seconds
            recorder.add_traversal(seconds, ())
            brought = min(count - written, 1 if size == 0 else TOKENS_PER_TREE)
            recorder.committed += brought
            for i in range(brought):
                yield Token(self.text(size, written + i), "x", 0.0, recorder.traversals, brought - i - 1)
            written += brought


def compare(client: FakeClient, tokens: int = 96, **options: object) -> Comparison:
    work = compare_with_plain(client, "x", max_new_tokens=tokens, clock=lambda: client.now, **options)  # type: ignore[arg-type]
    return asyncio.run(work)


def test_each_lane_counts_only_its_own_time() -> None:
    client = FakeClient()
    result = compare(client)
    assert result.plain.seconds == pytest.approx(96 * ROUND_S)
    assert result.trees.seconds == pytest.approx(24 * ROUND_S)
    assert (result.plain.stats.traversals, result.trees.stats.traversals) == (96, 24)
    assert result.ratio == pytest.approx(TOKENS_PER_TREE)
    assert result.same_text
    assert client.open_runs == 0


@pytest.mark.parametrize(("start", "seconds"), [(0.0, 1.0), (3.0, 5.0), (0.0, 30.0), (9.0, 5.0)])
def test_a_burst_of_load_meets_both_lanes(start: float, seconds: float) -> None:
    client = FakeClient(load=lambda now: 3.0 if start <= now < start + seconds else 1.0)
    assert compare(client).ratio == pytest.approx(TOKENS_PER_TREE, rel=0.15)


def test_lanes_take_turns_of_a_stretch() -> None:
    written: list[str] = []
    compare(FakeClient(), 24, stretch=8, on_token=lambda lane, token: written.append(lane.name[0]))
    assert "".join(written) == "tp" + "p" * 7 + "t" * 7 + "p" * 8 + "t" * 8 + "p" * 8 + "t" * 8


def test_differing_texts_are_not_the_same_text() -> None:
    client = FakeClient(text=lambda size, position: 7 if size == 0 and position == 90 else position)
    assert not compare(client).same_text


@pytest.mark.parametrize("tokens", [1, 2, 11, 12, 13])
def test_short_texts_are_written_to_their_end(tokens: int) -> None:
    client = FakeClient()
    result = compare(client, tokens)
    assert (result.plain.tokens, result.trees.tokens) == (tokens, tokens)
    assert client.open_runs == 0


def test_an_error_ends_both_generations() -> None:
    client = FakeClient(fails_at=20)
    with pytest.raises(NodeLost):
        compare(client)
    assert client.open_runs == 0


def test_the_tree_size_is_passed_on() -> None:
    client = FakeClient()
    seen: list[Lane] = []
    compare(client, 4, tree_size=16, on_token=lambda lane, token: seen.append(lane))
    assert client.started == [0, 16]
    assert seen[0].name == "trees"
