"""The machines of a simulation and their places, drawn once before it starts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treeswarm.topology.coordinates import Coordinate, distances, update
from treeswarm_bench.simulate import config

Points = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SimulatedHosts:
    """The hosts of all nodes that ever live.  Each array has shape [nodes], `place` has [nodes, 3]."""

    ids: NDArray[np.str_]
    """Node ids as in records."""
    rate: NDArray[np.float64]
    """Block-rows computed per second."""
    length: NDArray[np.int64]
    """Number of blocks that fit into memory."""
    cache: NDArray[np.int64]
    """Number of positions for which the KV cache has room."""
    place: Points
    """True places, float64, in the form of `coordinates.as_points`."""

    def __len__(self) -> int:
        return len(self.ids)


def draw_hosts(count: int, blocks: int, random: np.random.Generator) -> SimulatedHosts:
    """Draw `count` hosts for a model of `blocks` blocks."""
    length = random.lognormal(np.log(config.MEDIAN_LENGTH), config.LENGTH_SIGMA, count).round()
    return SimulatedHosts(
        ids=np.array([f"{number:010x}" for number in random.integers(2**40, size=count)]),
        rate=random.lognormal(np.log(config.MEDIAN_RATE), config.RATE_SIGMA, count),
        length=np.clip(length, 1, blocks).astype(np.int64),
        cache=random.lognormal(np.log(config.MEDIAN_CACHE), config.CACHE_SIGMA, count).astype(np.int64),
        place=draw_places(count, random),
    )


def draw_places(count: int, random: np.random.Generator) -> Points:
    """Draw places, float64 [count, 3]: a spot near the centre of a region, and the delay of an access line."""
    region = random.choice(len(config.REGIONS), size=count, p=config.REGION_SHARES)
    spot = np.array(config.REGIONS)[region] + random.normal(0, config.REGION_SPREAD_S, (count, 2))
    return np.column_stack([spot, random.exponential(config.ACCESS_S, count)])


def locate(place: Points, places: Points, coordinates: Sequence[Coordinate], random: np.random.Generator) -> Coordinate:
    """Return the coordinate that a new host at `place` [3] learns from round trips to hosts at `places` [n, 3].

    `coordinates` are those of these n hosts.
    """
    own = Coordinate()
    rtts = distances(place[None], places)[0] * random.lognormal(0, config.RTT_NOISE, len(places))
    for coordinate, rtt_s in zip(coordinates, rtts.tolist(), strict=True):
        own = update(own, coordinate, rtt_s)
    return own


def first_coordinates(place: Points, random: np.random.Generator) -> list[Coordinate]:
    """Return the coordinates of hosts at `place` [n, 3] that came one after another.

    The first few measure each other until their coordinates settle; each later one measures some of those before it.
    """
    first = place[: config.SAMPLES * 2]
    coordinates = [Coordinate()] * len(first)
    rtts = distances(first, first)
    for _ in range(100):
        for host, other in enumerate(random.permutation(len(first)).tolist()):
            if host != other:
                noise = float(random.lognormal(0, config.RTT_NOISE))
                coordinates[host] = update(coordinates[host], coordinates[other], float(rtts[host, other]) * noise)
    for host in range(len(first), len(place)):
        measured = random.integers(host, size=config.SAMPLES)
        of_measured = [coordinates[other] for other in measured.tolist()]
        coordinates.append(locate(place[host], place[measured], of_measured, random))
    return coordinates
