"""Machines and where they stand: drawn once, before anything happens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.topology.coordinates import Coordinate, distances, update
from treeswarm_bench.simulate import config

Points = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Hosts:
    """All nodes that ever live, [nodes] each.  `place` [nodes, 3]: where they truly are, as `coordinates.as_points`."""

    ids: NDArray[np.str_]
    rate: NDArray[np.float64]
    length: NDArray[np.int64]
    cache: NDArray[np.int64]
    place: Points

    def __len__(self) -> int:
        return len(self.ids)


def draw_hosts(count: int, blocks: int, random: np.random.Generator) -> Hosts:
    length = random.lognormal(np.log(config.MEDIAN_LENGTH), config.LENGTH_SIGMA, count).round()
    return Hosts(
        ids=np.array([f"{number:010x}" for number in random.integers(2**40, size=count)]),
        rate=random.lognormal(np.log(config.MEDIAN_RATE), config.RATE_SIGMA, count),
        length=np.clip(length, 1, blocks).astype(np.int64),
        cache=random.lognormal(np.log(config.MEDIAN_CACHE), config.CACHE_SIGMA, count).astype(np.int64),
        place=draw_places(count, random),
    )


def draw_places(count: int, random: np.random.Generator) -> Points:
    """float64 [count, 3]: a region, a spot near its centre, and an access line."""
    region = random.choice(len(config.REGIONS), size=count, p=config.REGION_SHARES)
    spot = np.array(config.REGIONS)[region] + random.normal(0, config.REGION_SPREAD_S, (count, 2))
    return np.column_stack([spot, random.exponential(config.ACCESS_S, count)])


def locate(place: Points, places: Points, known: Sequence[Coordinate], random: np.random.Generator) -> Coordinate:
    """The coordinate a newcomer at `place` [3] learns from round trips to hosts at `places` [n, 3]."""
    mine = Coordinate()
    rtts = distances(place[None], places)[0] * random.lognormal(0, config.RTT_NOISE, len(places))
    for theirs, rtt_s in zip(known, rtts.tolist(), strict=True):
        mine = update(mine, theirs, rtt_s)
    return mine


def first_coordinates(place: Points, random: np.random.Generator) -> list[Coordinate]:
    """Of hosts [n, 3] that came one after another: the first few settle among themselves, the others ask some."""
    first = place[: config.SAMPLES * 2]
    known = [Coordinate()] * len(first)
    rtts = distances(first, first)
    for _ in range(100):
        for mine, theirs in enumerate(random.permutation(len(first)).tolist()):
            if mine != theirs:
                noise = float(random.lognormal(0, config.RTT_NOISE))
                known[mine] = update(known[mine], known[theirs], float(rtts[mine, theirs]) * noise)
    for newcomer in range(len(first), len(place)):
        asked = random.integers(newcomer, size=config.SAMPLES)
        known.append(locate(place[newcomer], place[asked], [known[one] for one in asked.tolist()], random))
    return known
