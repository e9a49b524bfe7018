"""Plain decoding and trees on the same text, nodes and load: two lanes that take turns.

Load changes within seconds on a machine that is not idle, so texts measured one after the other meet different loads.
Here both lanes write the same stretch of the text before either goes on, and only the lane that writes has the nodes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from treeswarm_client.generation.run import Run, Token, TreeSize
from treeswarm_client.generation.stats import Stats

LaneName = Literal["plain", "trees"]

# Number of tokens that a lane writes in one turn: about what one tree brings, so that the load can change least between
# the turns.  Over 25 ms links they take plain decoding about 0.5 s and trees 0.1 s (2026-11-30, 2 cores).
STRETCH_TOKENS = 4


class StartsRuns(Protocol):
    """What a comparison needs of a client."""

    def stream(self, prompt: str | Sequence[int], *, max_new_tokens: int, tree_size: TreeSize, ignore_eos: bool) -> Run:
        """Start a generation."""
        ...


@dataclass(eq=False)
class Lane:
    """One of the two generations, and the time in which it had the nodes."""

    name: LaneName
    run: Run
    seconds: float = 0.0
    """Seconds for which this lane wrote."""
    ended: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return len(self.run.token_ids)

    @property
    def stats(self) -> Stats:
        """Statistics over the time in which this lane wrote."""
        return self.run.recorder.summary(self.seconds)


OnToken = Callable[[Lane, Token], None]


def _ignore(lane: Lane, token: Token) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Comparison:
    """Both lanes after the comparison."""

    plain: Lane
    trees: Lane

    @property
    def ratio(self) -> float:
        """Tokens per second with trees, divided by those of plain decoding."""
        return self.trees.stats.tokens_per_second / self.plain.stats.tokens_per_second

    @property
    def same_text(self) -> bool:
        """Whether both lanes have the same tokens."""
        return self.plain.run.token_ids == self.trees.run.token_ids


@dataclass(eq=False)
class _Turns:
    """Gives the lanes their turns."""

    clock: Callable[[], float]
    on_token: OnToken

    async def write(self, lane: Lane, tokens: int) -> None:
        """Let one lane write until it has `tokens` tokens in all, or its text ends."""
        while not lane.ended and lane.tokens < tokens:
            start = self.clock()
            token = await anext(lane.run.tokens, None)
            if token is None:  # closing the chain is no part of the text
                lane.ended = True
                return
            lane.seconds += self.clock() - start
            self.on_token(lane, token)


async def compare_with_plain(
    client: StartsRuns,
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    tree_size: TreeSize = "auto",
    ignore_eos: bool = True,
    on_token: OnToken = _ignore,
    stretch: int = STRETCH_TOKENS,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Write the same text with plain decoding and with trees, in turns of `stretch` tokens, and measure both.

    The trees write the first token of all, so that they pay for connecting to the nodes.  The client must run two
    generations at once, and should not share prefixes between them: the second prompt would cost less.  It must not
    have written this text before, if its drafter remembers texts.  With `ignore_eos` no token ends the texts early.
    `on_token` is called with every token as it comes.  Raises what the client raises; then both generations are ended.
    """

    def start(name: LaneName, size: TreeSize) -> Lane:
        return Lane(name, client.stream(prompt, max_new_tokens=max_new_tokens, tree_size=size, ignore_eos=ignore_eos))

    plain, trees = start("plain", 0), start("trees", tree_size)
    turns = _Turns(clock, on_token)
    try:
        await turns.write(trees, 1)
        await turns.write(plain, 1)
        # One token more than there are: only asking for it ends a generation.
        for end in [*range(stretch, max_new_tokens, stretch), max_new_tokens + 1]:
            await turns.write(plain, end)
            await turns.write(trees, end)
    finally:
        for lane in (plain, trees):
            await lane.run.aclose()
    return Comparison(plain, trees)
