"""Failures of nodes as one client saw them, and how long it avoids each node.  Pure except for chance."""

import random
from collections.abc import Collection
from dataclasses import dataclass, field

from treeswarm.errors import Refused, SwarmError
from treeswarm.protocol.messages import FaultCode
from treeswarm.topology.bans import BanList
from treeswarm_client.discovery.route import FORGOTTEN

# A node that was full a moment ago: a generation ends somewhere every few seconds.
FULL_S = 3.0
FULL = {FaultCode.FULL, FaultCode.TOO_MANY, FaultCode.OUT_OF_ROOM}


@dataclass(eq=False)
class NodeFailures:
    """The nodes that one client avoids, and why.  Times are seconds of the loop's clock."""

    bans: BanList = BanList()
    full_until: dict[str, float] = field(default_factory=dict)
    """Time until which each node that refused for lack of room is avoided, by node id."""
    errors: dict[str, str] = field(default_factory=dict)
    """Text of each node's last error, by node id."""

    def add(self, node: str, error: SwarmError, now: float) -> None:
        """Avoid a node that failed: longer with each failure, and only some seconds if it was full.

        A node that has forgotten a session is not avoided.
        """
        code = error.code if isinstance(error, Refused) else None
        self.errors[node] = str(error)
        if code in FULL:
            self.full_until[node] = now + FULL_S * random.uniform(0.5, 1.5)
        elif code not in FORGOTTEN:
            self.bans = self.bans.with_failure(node, now)

    def add_traversal(self, nodes: Collection[str], now: float) -> None:
        """Learn that `nodes` computed and forwarded a traversal; `topology.bans` says what that clears."""
        for node in nodes:
            self.bans = self.bans.with_answer(node, now)

    def full(self, now: float) -> set[str]:
        """Return the ids of nodes that refused lately for lack of room."""
        return {node for node, until in self.full_until.items() if now < until}

    def last_resort(self, now: float) -> frozenset[str]:
        """Return the ids of banned nodes that may be tried where no other node serves."""
        return self.bans.last_resort(now)

    def banned(self, now: float) -> Collection[str]:
        """Return the ids of nodes that are banned."""
        return self.bans.banned(now)
