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
from treeswarm_bench.benchmarks.disturbed.text import PERIOD, scripted_text
from treeswarm_bench.benchmarks.disturbed.world import Script

FIXED_SIZES = (0, 1, 4, 16, 64, 256)
# Where no guess is right, each node more is only slower.
POOR_SIZES = (0, 1, 4)
TEXT_LENGTHS = (32, 64, 128, 256)
# Tokens over which a fixed size is timed, by whether luck matters; after them all repeats itself.
TIMED_TOKENS = {True: PERIOD, False: 32}
# Rounds of a phase that do not count yet, and the fewest that say something after them.
SETTLING, FEWEST = 10, 6
# A tree pays where the best fixed size beats plain by this factor: there a plain round is a wrong "no".
PAYS = 1.2

# A text with noise is a matter of luck: each is played this often, with as many seeds of the noise, and all times are
# added up.
NOISE_TEXTS, NOISE_SEEDS = 4, 1000

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
            tokens = TIMED_TOKENS[good or condition.noisy]
            self._played[key] = play(condition, text, size, tokens=tokens, seed=seed)
        return _seconds_until(self._played[key], end) - _seconds_until(self._played[key], first)

    def by_size(self, part: "PhaseRounds", condition: Script, seed: int) -> dict[int, float]:
        """Return the seconds of every size for the rounds that count."""
        sizes = self.sizes if part.good else POOR_SIZES
        first, end = part.tokens
        return {
            size: self.seconds(condition, good=part.good, size=size, seed=seed, first=first, end=end) for size in sizes
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
    """Share of the time that trees cost on a text where none ever pays; None on other texts."""


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
    case, most = disturbed_case(fault, link), max(lengths)
    over_plain: dict[int, list[float]] = {n: [] for n in lengths}
    phases: dict[tuple[float, int], list[tuple[int, PhaseRounds]]] = {}
    for seed in seeds:
        lucks = [seed + NOISE_SEEDS * i for i in range(NOISE_TEXTS if case.script.noisy else 1)]
        script, words = case.script, scripted_text(text, seed)
        plain = [play(script, words, 0, tokens=most, seed=luck) for luck in lucks]
        texts = [
            play(script, words, size, tokens=10**6, until_s=case.until_s, at_least=most, seed=luck) for luck in lucks
        ]
        for n in lengths:
            over_plain[n].append(sum(p.seconds_for(n) for p in plain) / sum(t.seconds_for(n) for t in texts))
        for played in texts:
            for key, rounds in _phases(case, text, played):
                phases.setdefault(key, []).append((seed, rounds))
    verdicts = [_verdict(case, text, phases[key], fixed) for key in sorted(phases)]
    return CaseVerdict(fault, link, text, {n: min(ratios) for n, ratios in over_plain.items()}, verdicts)


def _phases(case: DisturbedCase, name: str, played: PlayedText) -> Iterator[tuple[tuple[float, int], PhaseRounds]]:
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


def _verdict(
    case: DisturbedCase, text: str, parts: Sequence[tuple[int, PhaseRounds]], fixed: FixedSizes
) -> PhaseVerdict:
    """Judge the same phase of all seeds together."""
    start_s, good = parts[0][1].start_s, parts[0][1].good
    condition = case.script.condition_at(start_s)
    by_seed = [fixed.by_size(part, condition, seed) for seed, part in parts]
    sums = {size: sum(seconds[size] for seconds in by_seed) for size in by_seed[0]}
    best = min(sums, key=lambda size: sums[size])
    spent_s = sum(part.seconds for _, part in parts)
    pays = sums[0] / sums[best] >= PAYS
    return PhaseVerdict(
        start_s=start_s,
        good=good,
        rounds=sum(len(part.rounds) for _, part in parts),
        best_size=best,
        best_over_plain=sums[0] / sums[best],
        ratio=sums[best] / spent_s,
        longest_wrong_no=max(part.longest_plain for _, part in parts) if pays else 0,
        exploring=_exploring_s(parts, by_seed) / spent_s if text == "poor" else None,
    )


def _seconds_until(played: PlayedText, tokens: int) -> float:
    """Return how long a text takes to `tokens` tokens if it repeats itself after its end."""
    times, rest = divmod(tokens, played.tokens)
    return times * played.seconds + played.seconds_for(rest)


def _exploring_s(parts: Sequence[tuple[int, PhaseRounds]], by_seed: Sequence[dict[int, float]]) -> float:
    """Return the seconds that rounds with a tree took beyond what plain rounds take for the same tokens."""
    lost_s = 0.0
    for (_, part), seconds in zip(parts, by_seed, strict=True):
        first, end = part.tokens
        per_token_s = seconds[0] / (end - first)
        trees = [each for each in part.settled if each.sent]
        lost_s += max(0.0, sum(each.seconds - each.tokens * per_token_s for each in trees))
    return lost_s


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}
