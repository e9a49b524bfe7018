"""Goals for the figures of `swarm bench wan`, and whether the figures meet them.  Pure computation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treeswarm_bench.benchmarks.wan.statistics import Ratio, Samples, least_of, mean_of, miss_share, paired

FIXED = ("plain", "chain-8", "tree-16", "tree-64", "tree-256")
"""Settings that a user could choose once and for all."""


@dataclass(frozen=True)
class MatrixCase:
    """One case of the matrix: where something was measured."""

    cell: str
    text: str
    temperature: float

    def __str__(self) -> str:
        return f"{self.cell}, {self.text}, T={self.temperature:g}"


SamplesByCase = Mapping[MatrixCase, Mapping[str, Samples]]
"""Samples by case and strategy."""


@dataclass(frozen=True)
class Goal:
    """A figure's name, and the least value that it should have."""

    name: str
    at_least: float

    def check(self, value: Ratio, per: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the measured value and whether it meets the goal, for JSON; `per` holds its parts."""
        verdict = {"name": self.name, "at_least": self.at_least, **value.as_dict(), "met": value.value >= self.at_least}
        return verdict | ({"per": dict(per)} if per else {})


def check_goals(measured: SamplesByCase, ring_s: Mapping[str, float]) -> dict[str, Any]:
    """Return all checks that could be computed, and the names of the others; `ring_s` is by cell, in seconds."""
    checks = [check for checker in CHECKERS for check in checker(measured, ring_s)]
    return {
        "checks": [check for check in checks if "met" in check],
        "not_measured": [check["name"] for check in checks if "met" not in check],
    }


# ---------------------------------------------------------------- each goal


def _against_best(measured: SamplesByCase, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    best = {
        case: least_of([paired(samples["auto"], samples[name]) for name in FIXED if name in samples])
        for case, samples in _with(measured, "auto", "plain")
    }
    return [_check_ratios(Goal("auto / best fixed setting, least of all places", 0.95), best, least_of)]


def _against_each(measured: SamplesByCase, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        _check_ratios(Goal(f"auto / {name}, mean of all places", 1.15), _ratios(measured, "auto", name), mean_of)
        for name in FIXED
    ]


def _against_plain(measured: SamplesByCase, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    goal = Goal("auto / plain, least of all places", 0.95)
    return [_check_ratios(goal, _ratios(measured, "auto", "plain"), least_of)]


def _headline(measured: SamplesByCase, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    here = {case: samples for case, samples in measured.items() if case == MatrixCase("25ms", "code", 0.0)}
    return [
        _check_ratios(Goal("auto / plain, 25ms, code, greedy", 4.0), _ratios(here, "auto", "plain"), mean_of),
        _check_ratios(Goal("auto / star, 25ms, code, greedy", 6.0), _ratios(here, "auto", "star"), mean_of),
    ]


def _against_sync(measured: SamplesByCase, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    goal = Goal("auto / auto-sync, mean of all places", 1.0)
    return [_check_ratios(goal, _ratios(measured, "auto", "auto-sync"), mean_of)]


def _bound_by_misses(measured: SamplesByCase, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    checks = []
    for cell, at_least in (("25ms", 0.85), ("100ms", 0.92)):
        shares = {
            case: miss_share(samples["auto"], ring_s[cell])
            for case, samples in _with(measured, "auto")
            if case.cell == cell
        }
        goal = Goal(f"misses × ring latency / time of auto, {cell}, code, greedy", at_least)
        headline = MatrixCase(cell, "code", 0.0)
        per = {str(case): share for case, share in shares.items()}
        if headline in shares:
            checks.append(goal.check(Ratio(shares[headline], np.empty(0)), per))
        else:
            checks.append({"name": goal.name})
    return checks


def _sampled(measured: SamplesByCase, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    ratios = {}
    for case, samples in _with(measured, "auto"):
        greedy = MatrixCase(case.cell, case.text, 0.0)
        if case.temperature == 1.0 and case.text == "code" and greedy in measured:
            ratios[case] = paired(samples["auto"], measured[greedy]["auto"])
    return [_check_ratios(Goal("auto at T=1 / greedy, code, mean of all cells", 0.7), ratios, mean_of)]


CHECKERS: tuple[Callable[[SamplesByCase, Mapping[str, float]], list[dict[str, Any]]], ...] = (
    _against_best,
    _against_each,
    _against_plain,
    _headline,
    _against_sync,
    _bound_by_misses,
    _sampled,
)

# ---------------------------------------------------------------- helpers


def _with(measured: SamplesByCase, *strategies: str) -> list[tuple[MatrixCase, Mapping[str, Samples]]]:
    """Return the cases in which all these strategies were measured."""
    return [(case, samples) for case, samples in measured.items() if all(name in samples for name in strategies)]


def _ratios(measured: SamplesByCase, over: str, under: str) -> dict[MatrixCase, Ratio]:
    return {case: paired(samples[over], samples[under]) for case, samples in _with(measured, over, under)}


def _check_ratios(
    goal: Goal, ratios: Mapping[MatrixCase, Ratio], together: Callable[[Sequence[Ratio]], Ratio]
) -> dict[str, Any]:
    if not ratios:
        return {"name": goal.name}
    return goal.check(together(list(ratios.values())), {str(case): ratio.value for case, ratio in ratios.items()})
