"""Judge played texts: against plain decoding, and against the best fixed size that hindsight chooses for each phase.

A phase is a stretch of time between changes of the script, and of the text between changes of its quality.  The best
fixed size is the one that takes the same tokens of the same text in the least time if the phase lasted for ever.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from treeswarm_bench.benchmarks.disturbed.cases import DisturbedCase, disturbed_case
from treeswarm_bench.benchmarks.disturbed.play import PlayedRound, PlayedText, Size, play
from treeswarm_bench.benchmarks.disturbed.text import scripted_text
from treeswarm_bench.benchmarks.disturbed.world import Script

FIXED_SIZES = (0, 1, 4, 16, 64, 256)
# Where no guess is right, each node more is only slower.
POOR_SIZES = (0, 1, 4)
TEXT_LENGTHS = (32, 64, 128, 256)
# Tokens over which a fixed size is timed; beyond them its mean rate holds.
TIMED_TOKENS = {True: 256, False: 32}
# Rounds of a phase that do not count yet, and the fewest that say something after them.
SETTLING, FEWEST = 10, 6
# A tree pays where the best fixed size beats plain by this factor: there a plain round is a wrong "no".
PAYS = 1.2

LEAST_OF_BEST, LEAST_OF_PLAIN = 0.9, 0.95
MOST_WRONG_NO, MOST_EXPLORING = 8, 0.03


@dataclass(eq=False)
class FixedSizes:
    """Texts of fixed sizes under conditions that last for ever, each played once."""

    sizes: Sequence[int] = field(default_factory=lambda: FIXED_SIZES)
    _played: dict[tuple[Script, bool, int, int], PlayedText] = field(default_factory=dict)

    def seconds(self, condition: Script, *, good: bool, size: int, seed: int, first: int, end: int) -> float:
        """Return how long one size takes for the tokens `first` to `end` of a text."""
        key = (condition, good, size, seed)
        if key not in self._played:
            text = scripted_text("good" if good else "poor", seed)
            self._played[key] = play(condition, text, size, tokens=TIMED_TOKENS[good], seed=seed)
        played = self._played[key]
        known = min(end, played.tokens)
        beyond_s = (end - max(first, known)) * played.seconds / played.tokens
        return beyond_s + max(0.0, played.seconds_for(known) - played.seconds_for(first)) if first < known else beyond_s

    def by_size(self, segment: "PhaseRounds", condition: Script, seed: int) -> dict[int, float]:
        """Return the seconds of every size for the tokens of a segment."""
        sizes = self.sizes if segment.good else POOR_SIZES
        first, end = segment.tokens
        return {
            size: self.seconds(condition, good=segment.good, size=size, seed=seed, first=first, end=end)
            for size in sizes
        }


@dataclass(frozen=True)
class PhaseRounds:
    """The rounds of one text in one phase."""

    start_s: float
    good: bool
    rounds: Sequence[PlayedRound]
    """All its rounds."""

    @property
    def settled(self) -> Sequence[PlayedRound]:
        """The rounds that count."""
        return self.rounds[SETTLING:]

    @property
    def tokens(self) -> tuple[int, int]:
        """First and end of the tokens of the rounds that count."""
        return self.settled[0].first, self.settled[-1].first + self.settled[-1].tokens

    @property
    def seconds(self) -> float:
        return self.settled[-1].end_s - self.settled[0].start_s

    @property
    def longest_plain(self) -> int:
        """Most rounds in a row that sent no tree."""
        longest = current = 0
        for each in self.rounds:
            current = 0 if each.sent else current + 1
            longest = max(longest, current)
        return longest


@dataclass(frozen=True)
class PhaseVerdict:
    """How the planner did in one phase, over all seeds."""

    start_s: float
    """Time of the script at which the phase began."""
    good: bool
    """Whether the draft was right often."""
    rounds: int
    best_size: int
    best_over_plain: float
    """Rate of the best fixed size over plain decoding's."""
    ratio: float
    """The planner's rate over that of the best fixed size."""
    longest_wrong_no: int
    """Most plain rounds in a row although trees paid."""
    exploring: float | None
    """Share of the time that trees cost although none paid; None where trees paid."""


@dataclass(frozen=True)
class CaseVerdict:
    """How the planner did in one case on one kind of text."""

    fault: str
    link: str
    text: str
    over_plain: dict[int, float]
    """The least rate over plain decoding's under the same script, of any seed, by length of the text."""
    phases: Sequence[PhaseVerdict]

    @property
    def least_of_plain(self) -> float:
        return min(self.over_plain.values())

    @property
    def least_of_best(self) -> float:
        return min((phase.ratio for phase in self.phases), default=1.0)

    @property
    def longest_wrong_no(self) -> int:
        return max((phase.longest_wrong_no for phase in self.phases), default=0)

    @property
    def exploring(self) -> float:
        return max((phase.exploring or 0.0 for phase in self.phases), default=0.0)

    @property
    def broken(self) -> list[str]:
        """The bounds that do not hold."""
        kept = {
            "plain": self.least_of_plain >= LEAST_OF_PLAIN,
            "best": self.least_of_best >= LEAST_OF_BEST,
            "no": self.longest_wrong_no <= MOST_WRONG_NO,
            "exploring": self.exploring <= MOST_EXPLORING,
        }
        return [name for name, holds in kept.items() if not holds]

    @property
    def badness(self) -> float:
        """How far the worst bound is missed; 1 where it is just held."""
        return min(self.least_of_plain / LEAST_OF_PLAIN, self.least_of_best / LEAST_OF_BEST)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "fault": self.fault,
            "link": self.link,
            "text": self.text,
            "broken": self.broken,
            "over_plain": {str(n): round(ratio, 3) for n, ratio in self.over_plain.items()},
            "of_best": round(self.least_of_best, 3),
            "longest_wrong_no": self.longest_wrong_no,
            "exploring": round(self.exploring, 4),
            "phases": [_rounded(asdict(phase)) for phase in self.phases],
        }


def judge(
    fault: str,
    link: str,
    text: str,
    *,
    seeds: Sequence[int],
    fixed: FixedSizes,
    size: Size = "auto",
    lengths: Sequence[int] = TEXT_LENGTHS,
) -> CaseVerdict:
    """Play a case with every seed, and judge it."""
    case = disturbed_case(fault, link)
    texts = [_play_case(case, text, size, seed, max(lengths)) for seed in seeds]
    plain = [_play_case(case, text, 0, seed, max(lengths), to_the_end=False) for seed in seeds]
    over_plain = {
        n: min(p.seconds_for(n) / t.seconds_for(n) for p, t in zip(plain, texts, strict=True)) for n in lengths
    }
    segments = [list(_segments(case, text, played)) for played in texts]
    keys = sorted({key for each in segments for key, _ in each})
    phases = []
    for key in keys:
        ofs = [(seed, dict(each)[key]) for seed, each in zip(seeds, segments, strict=True) if key in dict(each)]
        phases.append(_verdict(case, ofs, fixed))
    return CaseVerdict(fault, link, text, over_plain, [phase for phase in phases if phase is not None])


def _play_case(
    case: DisturbedCase, name: str, size: Size, seed: int, tokens: int, *, to_the_end: bool = True
) -> PlayedText:
    """Play at least `tokens` tokens, and with `to_the_end` the whole script too."""
    return play(
        case.script,
        scripted_text(name, seed),
        size,
        tokens=tokens if not to_the_end else 10**6,
        until_s=case.until_s if to_the_end else np.inf,
        at_least=tokens,
        seed=seed,
    )


def _segments(case: DisturbedCase, name: str, played: PlayedText) -> Iterator[tuple[tuple[float, int], PhaseRounds]]:
    """Yield the phases of a text that have enough rounds, by their start and the stretch of the text."""
    starts = case.script.changes_s
    stretches = scripted_text(name, 0).stretches(played.tokens)
    for start_s, end_s in zip(starts, [*starts[1:], np.inf], strict=True):
        for first, end, good in stretches:
            rounds = [
                each
                for each in played.rounds
                if start_s <= each.start_s and each.end_s <= end_s and first <= each.first
                if each.first + each.tokens <= end
            ]
            if len(rounds) >= SETTLING + FEWEST:
                yield (start_s, first), PhaseRounds(start_s, good, rounds)


def _verdict(case: DisturbedCase, segments: Sequence[tuple[int, PhaseRounds]], fixed: FixedSizes) -> PhaseVerdict:
    """Judge the same phase of all seeds together."""
    start_s, good = segments[0][1].start_s, segments[0][1].good
    condition = case.script.condition_at(start_s)
    by_seed = [fixed.by_size(segment, condition, seed) for seed, segment in segments]
    sums = {size: sum(seconds[size] for seconds in by_seed) for size in by_seed[0]}
    best = min(sums, key=lambda size: sums[size])
    spent_s = sum(segment.seconds for _, segment in segments)
    pays = sums[0] / sums[best] >= PAYS
    return PhaseVerdict(
        start_s=start_s,
        good=good,
        rounds=sum(len(segment.rounds) for _, segment in segments),
        best_size=best,
        best_over_plain=sums[0] / sums[best],
        ratio=sums[best] / spent_s,
        longest_wrong_no=max(segment.longest_plain for _, segment in segments) if pays else 0,
        exploring=None if best else _exploring_s(segments, by_seed) / spent_s,
    )


def _exploring_s(segments: Sequence[tuple[int, PhaseRounds]], by_seed: Sequence[dict[int, float]]) -> float:
    """Return the seconds that rounds with a tree took beyond what plain rounds take for the same tokens."""
    lost_s = 0.0
    for (_, segment), seconds in zip(segments, by_seed, strict=True):
        first, end = segment.tokens
        per_token_s = seconds[0] / (end - first)
        trees = [each for each in segment.settled if each.sent]
        lost_s += max(0.0, sum(each.seconds - each.tokens * per_token_s for each in trees))
    return lost_s


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
