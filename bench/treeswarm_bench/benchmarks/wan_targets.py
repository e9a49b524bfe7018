"""What the figures of `swarm bench wan` must show, and whether they do.  Pure: each verdict is computed from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from treeswarm_bench.benchmarks.statistics import Ratio, Samples, least_of, mean_of, miss_share, paired

FIXED = ("plain", "chain-8", "tree-16", "tree-64", "tree-256")
"""What a user could set once and for all."""


@dataclass(frozen=True)
class Place:
    """Where something was measured."""

    cell: str
    text: str
    temperature: float

    def __str__(self) -> str:
        return f"{self.cell}, {self.text}, T={self.temperature:g}"


Measured = Mapping[Place, Mapping[str, Samples]]
"""By place and strategy."""


@dataclass(frozen=True)
class Aim:
    """A figure is to be at least so much."""

    name: str
    at_least: float

    def of(self, value: Ratio, per: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As measured."""
        told = {"name": self.name, "at_least": self.at_least, **value.as_dict(), "met": value.value >= self.at_least}
        return told | ({"per": dict(per)} if per else {})


def checks(measured: Measured, ring_s: Mapping[str, float]) -> dict[str, Any]:
    """All that could be computed, and the names of what could not; `ring_s` by cell."""
    found = [check for checker in CHECKERS for check in checker(measured, ring_s)]
    return {
        "checks": [check for check in found if "met" in check],
        "not_measured": [check["name"] for check in found if "met" not in check],
    }


# ---------------------------------------------------------------- each


def _against_best(measured: Measured, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    best = {
        place: least_of([paired(by["auto"], by[name]) for name in FIXED if name in by])
        for place, by in _with(measured, "auto", "plain")
    }
    return [_over(Aim("auto / best fixed setting, least of all places", 0.95), best, least_of)]


def _against_each(measured: Measured, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        _over(Aim(f"auto / {name}, mean of all places", 1.15), _ratios(measured, "auto", name), mean_of)
        for name in FIXED
    ]


def _against_plain(measured: Measured, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    return [_over(Aim("auto / plain, least of all places", 0.95), _ratios(measured, "auto", "plain"), least_of)]


def _headline(measured: Measured, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    here = {place: by for place, by in measured.items() if place == Place("25ms", "code", 0.0)}
    return [
        _over(Aim("auto / plain, 25ms, code, greedy", 4.0), _ratios(here, "auto", "plain"), mean_of),
        _over(Aim("auto / star, 25ms, code, greedy", 6.0), _ratios(here, "auto", "star"), mean_of),
    ]


def _against_sync(measured: Measured, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    return [_over(Aim("auto / auto-sync, mean of all places", 1.0), _ratios(measured, "auto", "auto-sync"), mean_of)]


def _bound_by_misses(measured: Measured, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    found = []
    for cell, aim in (("25ms", 0.85), ("100ms", 0.92)):
        shares = {
            place: miss_share(by["auto"], ring_s[cell]) for place, by in _with(measured, "auto") if place.cell == cell
        }
        check = Aim(f"misses × ring latency / time of auto, {cell}, code, greedy", aim)
        headline = Place(cell, "code", 0.0)
        per = {str(place): share for place, share in shares.items()}
        if headline in shares:
            found.append(check.of(Ratio(shares[headline], np.empty(0)), per))
        else:
            found.append({"name": check.name})
    return found


def _sampled(measured: Measured, ring_s: Mapping[str, float]) -> list[dict[str, Any]]:
    ratios = {
        place: paired(by["auto"], measured[Place(place.cell, place.text, 0.0)]["auto"])
        for place, by in _with(measured, "auto")
        if place.temperature == 1.0 and place.text == "code" and Place(place.cell, place.text, 0.0) in measured
    }
    return [_over(Aim("auto at T=1 / greedy, code, mean of all cells", 0.7), ratios, mean_of)]


CHECKERS: tuple[Callable[[Measured, Mapping[str, float]], list[dict[str, Any]]], ...] = (
    _against_best,
    _against_each,
    _against_plain,
    _headline,
    _against_sync,
    _bound_by_misses,
    _sampled,
)

# ---------------------------------------------------------------- helpers


def _with(measured: Measured, *names: str) -> list[tuple[Place, Mapping[str, Samples]]]:
    return [(place, by) for place, by in measured.items() if all(name in by for name in names)]


def _ratios(measured: Measured, over: str, under: str) -> dict[Place, Ratio]:
    return {place: paired(by[over], by[under]) for place, by in _with(measured, over, under)}


def _over(aim: Aim, ratios: Mapping[Place, Ratio], together: Callable[[Sequence[Ratio]], Ratio]) -> dict[str, Any]:
    if not ratios:
        return {"name": aim.name}
    return aim.of(together(list(ratios.values())), {str(place): ratio.value for place, ratio in ratios.items()})
