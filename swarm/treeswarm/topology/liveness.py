"""Which nodes one node believes to be dead, and which it probes to find out.  Pure: `now` is the time of any clock.

A record outlives its node by minutes, so the nodes whose loss would leave blocks without a holder are watched.

* Nothing but probes of one's own counts.  A report by a client, another node or a broker is a reason to probe, no more:
  a false report costs one ping.
* A node is dead after PROOFS probes in a row that it did not answer, if another node answered meanwhile: otherwise the
  fault may lie with the network of the node that probes.
* A newer record, or an answer, and the node lives again.  Until then it is probed again, more and more rarely.
* A node whose death would leave blocks without a holder is watched by WATCHERS others, chosen by a hash.
* When a node is silent, other holders of its blocks are probed until one answers for every block: several holders may
  have died together.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from treeswarm.topology.tables import DRAINING, ONLINE, Ints, PlacementTable

# One lost packet or one long stall is not a death; two probes in a row, the second with a longer deadline, are.
PROOFS = 2
# Each watched node then answers WATCHERS pings per this time: two thousand bytes per second at most.
WATCH_EVERY_S = 4.0
# One watcher may be blind or dishonest and two may fail at once; a fourth only costs pings.
WATCHERS = 3
# Seconds until the probe that confirms a failed one, then twice as long each time.
CONFIRM_S, LONGEST_PAUSE_S = 1.0, 30.0
# Number of other holders that are probed at once for a block that lost one: the first answer ends the search.  If none
# answers, so many times as many as were silent follow: eight of eight silent are hardly a coincidence, and each step
# costs the seconds in which a dark machine does not answer.
VERIFIED_AT_ONCE = 8
# So many handshakes at once fit into a home's uplink; the client's prober has the same limit.
AT_ONCE = 32
# A false report about a node makes it answer one more ping per this time.
REPORT_EVERY_S = 4.0


@dataclass(frozen=True)
class Silence:
    """Probes of one node that it did not answer, since it last did."""

    generation: int
    """Generation of the node's record when it was first silent."""
    failures: int
    since: float
    """Time at which the first of these probes began."""
    probe_at: float
    """Time of the next probe."""


def _empty() -> "Mapping[str, float]":
    return MappingProxyType({})


@dataclass(frozen=True)
class Liveness:
    """What one node knows of the life of others, by node id.  Immutable: methods return a new value."""

    silences: Mapping[str, Silence] = field(default_factory=lambda: MappingProxyType({}))
    answered_at: Mapping[str, float] = field(default_factory=_empty)
    """Time at which each node last answered a probe."""
    reported: frozenset[str] = frozenset()
    """Nodes that were reported as lost, and not probed since."""

    def with_answer(self, node: str, now: float) -> "Liveness":
        """Return what is known after `node` answered a probe."""
        silences = {name: silence for name, silence in self.silences.items() if name != node}
        answers = MappingProxyType({**self.answered_at, node: now})
        return Liveness(MappingProxyType(silences), answers, self.reported - {node})

    def with_silence(self, node: str, generation: int, began: float, now: float) -> "Liveness":
        """Return what is known after a probe of `node` from `began` to `now` failed."""
        before = self.silences.get(node)
        if before is None or before.generation != generation:
            before = Silence(generation, 0, began, now)
        # A refused connection takes a moment and a lost one seconds: those seconds count as a pause.
        pause_s = min(CONFIRM_S * 2.0 ** min(before.failures, 8), LONGEST_PAUSE_S)
        silence = replace(before, failures=before.failures + 1, probe_at=max(now, began + pause_s))
        return replace(
            self, silences=MappingProxyType({**self.silences, node: silence}), reported=self.reported - {node}
        )

    def with_report(self, node: str, now: float) -> "Liveness":
        """Return what is known after someone reported that `node` is lost; unchanged if it answered just now."""
        if now - self.answered_at.get(node, -np.inf) < REPORT_EVERY_S or node in self.silences:
            return self
        return replace(self, reported=self.reported | {node})

    def known_as(self, generations: Mapping[str, int]) -> "Liveness":
        """Return what still holds of nodes with records of these generations.

        A node with a newer record than at its death may be a new process: it counts as living and is probed at once.
        """
        renewed = {n for n, silence in self.silences.items() if generations.get(n, 0) > silence.generation}
        gone = self.silences.keys() - generations.keys()
        if not renewed and not gone and (self.answered_at.keys() | self.reported) <= generations.keys():
            return self
        silences = {n: silence for n, silence in self.silences.items() if n not in renewed | gone}
        answered_at = {n: at for n, at in self.answered_at.items() if n in generations}
        reported = self.reported & generations.keys() | renewed
        return Liveness(MappingProxyType(silences), MappingProxyType(answered_at), reported)

    @property
    def dead(self) -> frozenset[str]:
        """The nodes that are proven dead."""
        return frozenset(
            node
            for node, silence in self.silences.items()
            if silence.failures >= PROOFS and self._heard_since(silence.since)
        )

    def _heard_since(self, since: float) -> bool:
        return any(at >= since for at in self.answered_at.values())


def nodes_to_probe(liveness: Liveness, own: str, swarm: PlacementTable, blocks: int, now: float) -> list[str]:
    """Return the nodes that the node `own` should probe now, the most urgent first.

    These are the nodes that it watches: nobody can delay their probes by reports of many other nodes.  `swarm` holds
    all nodes with a record but `own`, dead ones included.
    """
    listed = set(swarm.nodes.tolist())
    due = [n for n, silence in liveness.silences.items() if n in listed and silence.probe_at <= now]
    due += sorted(liveness.reported & listed)
    due += _doubted(liveness, swarm)
    first = watched_by(own, without(swarm, liveness.dead), blocks)
    due += [
        n for n in first if n not in liveness.silences and now - liveness.answered_at.get(n, -np.inf) >= WATCH_EVERY_S
    ]
    if due and (reference := _reference(liveness, swarm, due)):
        due.append(reference)
        first.append(reference)
    return sorted(dict.fromkeys(due), key=lambda n: n not in first)


def probes_at_once(liveness: Liveness) -> int:
    """Return how many probes may run at the same time.

    A probe of a node that lives costs a handshake, and so many at once fit into a home's uplink.  A probe of a silent
    one costs a few packets, and where many are silent the next ones probably are.
    """
    return AT_ONCE + VERIFIED_AT_ONCE * len(liveness.silences)


def suspects(liveness: Liveness, swarm: PlacementTable) -> frozenset[str]:
    """Return the silent nodes, and with enough of them also the holders of their blocks that have yet to answer."""
    silent = frozenset(liveness.silences)
    return silent | frozenset(_doubted(liveness, swarm)) if len(silent) >= VERIFIED_AT_ONCE // 2 else silent


def without(swarm: PlacementTable, dead: Collection[str]) -> PlacementTable:
    """Return the table without the nodes `dead`; the table itself if it has none of them."""
    gone = np.isin(swarm.nodes, list(dead)) if dead else np.zeros(len(swarm.nodes), np.bool_)
    return swarm.select(~gone) if gone.any() else swarm


def sole_holders(swarm: PlacementTable, blocks: int) -> Ints:
    """Return the indices of the nodes that alone serve some block, or alone are about to."""
    holders = np.flatnonzero(swarm.state != DRAINING)
    steps = np.zeros(blocks + 1, np.int64)
    np.add.at(steps, np.minimum(swarm.start[holders], blocks), 1)
    np.add.at(steps, np.minimum(swarm.end[holders], blocks), -1)
    alone = np.concatenate([[0], (steps.cumsum()[:blocks] == 1).cumsum()])
    counts = alone[np.minimum(swarm.end[holders], blocks)] - alone[np.minimum(swarm.start[holders], blocks)]
    alone_somewhere: Ints = holders[counts > 0]
    return alone_somewhere


def watched_by(own: str, swarm: PlacementTable, blocks: int) -> list[str]:
    """Return the sole holders that the node `own` watches.  It need not be part of `swarm`."""
    watched = []
    others = _hashes(swarm.nodes[swarm.state == ONLINE].tolist())
    mine = _hashes([own])  # An array of one: scalars would warn where the product overflows, which is intended.
    for index in sole_holders(swarm, blocks).tolist():
        name = str(swarm.nodes[index])
        key = _hashes([name])
        # An online holder is among the others; its hash with itself is 0, so it comes first.
        if name != own and int(((others ^ key) * ODD < (mine ^ key) * ODD).sum()) <= WATCHERS:
            watched.append(name)
    return watched


# Knuth's multiplicative hash: the top bits of the product depend on all bits of the key.
ODD = np.uint64(0x9E3779B97F4A7C15)


def _hashes(nodes: list[str]) -> NDArray[np.uint64]:
    digests = [hashlib.blake2b(node.encode(), digest_size=8).digest() for node in nodes]
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.uint64)


def _doubted(liveness: Liveness, swarm: PlacementTable) -> list[str]:
    """Return holders of the silent nodes' blocks, until one has answered for every block since the silence began."""
    doubted: list[str] = []
    for node in sorted(liveness.silences):
        position = np.flatnonzero(swarm.nodes == node)
        if not len(position):
            continue
        since, first, last = liveness.silences[node].since, int(swarm.start[position[0]]), int(swarm.end[position[0]])
        holders = np.flatnonzero((swarm.start < last) & (first < swarm.end) & (swarm.state == ONLINE))
        names = swarm.nodes[holders].tolist()
        at_once = VERIFIED_AT_ONCE * max(1, sum(name in liveness.silences for name in names))
        served = np.zeros(last - first, np.bool_)
        asked = np.zeros(last - first, np.int64)
        for index, name in zip(holders.tolist(), names, strict=True):
            if liveness.answered_at.get(name, -np.inf) >= since:
                served[max(0, int(swarm.start[index]) - first) : int(swarm.end[index]) - first] = True
        for index, name in zip(holders.tolist(), names, strict=True):
            part = slice(max(0, int(swarm.start[index]) - first), int(swarm.end[index]) - first)
            if name not in liveness.silences and (~served[part] & (asked[part] < at_once)).any():
                asked[part] += 1
                doubted.append(name)
    return doubted


def _reference(liveness: Liveness, swarm: PlacementTable, due: Collection[str]) -> str | None:
    """Return a node whose answer shows that the network of this node works, or None if one has answered already."""
    silent = [silence.since for silence in liveness.silences.values()]
    if not silent or any(at >= max(silent) for at in liveness.answered_at.values()):
        return None
    candidates = [n for n in swarm.nodes.tolist() if n not in liveness.silences and n not in due]
    return min(candidates, key=lambda n: -liveness.answered_at.get(n, 0.0), default=None)
