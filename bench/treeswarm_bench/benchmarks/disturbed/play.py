"""Play one text in a scripted world: the product's generation loop, policy and drafter over a scripted chain."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_bench.benchmarks.disturbed.chain import ScriptedChain
from treeswarm_bench.benchmarks.disturbed.text import LENGTH, ScriptedText, scripted_drafter
from treeswarm_bench.benchmarks.disturbed.world import ROW_BYTES, Script, World
from treeswarm_bench.benchmarks.wan.strategies import WrappedDrafter
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_bench.virtual_clock import VirtualClockLoop, no_time, run_virtually
from treeswarm_client.drafters.seam import DraftTree, ShouldStop, never_stop
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.loop import Generation, GenerationLimits
from treeswarm_client.planner.policy import AutoPolicy, PlannerMemory, Round, TreePolicy

SEGMENT_ROWS = 256
# Trees that the end of a text cuts off reach this far beyond it.
MARGIN = 64

Size = int | Literal["auto"]


@dataclass(frozen=True)
class PlayedRound:
    """One round of a text."""

    start_s: float
    """Time since the script began at which the round began."""
    end_s: float
    first: int
    """Number of tokens of the text before it."""
    tokens: int
    """Number of tokens that it brought."""
    sent: int
    """Number of draft nodes sent, extensions included."""
    drafted: int
    """Number of draft nodes known to the policy."""
    reason: str

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class PlayedText:
    """All rounds of a text, in order."""

    rounds: Sequence[PlayedRound]

    @cached_property
    def _reached(self) -> tuple[list[int], list[float]]:
        ends = [(each.first + each.tokens, each.end_s) for each in self.rounds]
        return [0, *(tokens for tokens, _ in ends)], [0.0, *(end_s for _, end_s in ends)]

    @property
    def tokens(self) -> int:
        return self._reached[0][-1]

    @property
    def seconds(self) -> float:
        return self._reached[1][-1]

    def seconds_for(self, tokens: float) -> float:
        """Return when the text had that many tokens, straight between the ends of rounds."""
        return float(np.interp(tokens, *self._reached))

    def tokens_at(self, seconds: float) -> int:
        """Return the number of tokens of the rounds that had ended by then."""
        tokens, times = self._reached
        return tokens[bisect_right(times, seconds) - 1]


@dataclass(frozen=True, eq=False)
class FirstTreeSeen(WrappedDrafter):
    """Tells the world when the first tree is drafted."""

    world: World

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        tree = self.inner.propose(size, depth, should_stop)
        self.world.drafting_first = False
        return tree


@dataclass(eq=False)
class _Recorder:
    """Collects the rounds of a generation."""

    world: World
    rounds: list[PlayedRound] = field(default_factory=list)
    sent: int = 0

    def on_round(self, finished: Round) -> None:
        self.sent = len(finished.draft)

    @property
    def tokens(self) -> int:
        return self.rounds[-1].first + self.rounds[-1].tokens if self.rounds else 0

    def add(self, tokens: int, drafted: int, reason: str) -> None:
        last = self.rounds[-1] if self.rounds else None
        start_s, first = (last.end_s, last.first + last.tokens) if last else (0.0, 0)
        self.rounds.append(PlayedRound(start_s, self.world.now, first, tokens, self.sent, drafted, reason))


def play(
    script: Script,
    text: ScriptedText,
    size: Size,
    *,
    tokens: int,
    until_s: float = np.inf,
    at_least: int = 0,
    seed: int = 0,
) -> PlayedText:
    """Play a text with one size of trees, or with the planner's.

    It ends after `tokens` tokens, or at `until_s` of the script if it has `at_least` tokens then.
    """
    tokens = min(tokens, LENGTH - MARGIN)

    def is_over(so_far: _Recorder) -> bool:
        return so_far.world.now >= until_s and so_far.tokens >= at_least

    return run_virtually(_play(script, text, size, tokens, is_over, seed), work_s=None)


async def _play(
    script: Script,
    text: ScriptedText,
    size: Size,
    tokens: int,
    is_over: Callable[[_Recorder], bool],
    seed: int,
) -> PlayedText:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualClockLoop)
    loop.meter = no_time
    world = World(script, loop, seed)
    chain = ScriptedChain(text, world)
    chain.start()
    recorder = _Recorder(world)
    generation = Generation(
        chain=chain,  # type: ignore[arg-type]
        drafter=FirstTreeSeen(scripted_drafter(text, world), world),
        builder=AppendBuilder(SamplingSettings(), SEGMENT_ROWS, chain.epoch.number, 0),
        limits=GenerationLimits(tokens + 1, frozenset()),  # the prompt's traversal brings one
        policy=policy_of_size(size, world),
        on_round=recorder.on_round,
        clock=loop.clock,
    )
    try:
        async with aclosing(generation.rounds(text.prompt, SamplingSettings())) as rounds:
            async for committed in rounds:
                if committed.traversal == 1:
                    chain.begin_script()
                    continue
                reports = generation.recorder.reports
                told = reports[-1] if reports else None
                recorder.add(len(committed.tokens), told.drafted if told else 0, told.reason if told else "")
                if is_over(recorder):
                    break
    finally:
        await chain.close()
    return PlayedText(tuple(recorder.rounds))


def policy_of_size(size: Size, world: World) -> TreePolicy:
    if size != "auto":
        return FixedSizePolicy(size)
    return AutoPolicy(PlannerMemory(), ROW_BYTES, SEGMENT_ROWS, clock=world.loop.clock)
