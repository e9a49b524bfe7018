"""Notice while a node runs that other nodes have another swarm key: then neither side can use the other's blocks.

A swarm may become private, or change its key, after a node has joined it.  Both sides learn that when they visit each
other: the one that dials is refused, or refuses, and so does the other one in turn.
"""

import logging
from dataclasses import dataclass, field

from treeswarm.errors import Refused
from treeswarm.protocol.messages import FaultCode
from treeswarm.protocol.records import NodeRecord

log = logging.getLogger(__name__)

# A node is visited again within this time, unless the swarm has hundreds of nodes: then it counts again until it is.
STRANGER_S = 600.0
# The owner of a node that all others refuse is told again after this time.
REMIND_S = 3600.0


@dataclass(eq=False)
class KeyWatch:
    """Remembers which nodes have another swarm key than this one, and tells the owner."""

    _strangers: dict[str, float] = field(default_factory=dict)
    """Time at which each node was last found to have another key."""
    _answered_at: float | None = None
    """Time at which a node with the same key last answered, or None if none has."""
    _reminded_at: float | None = None

    def strangers(self, now: float) -> frozenset[str]:
        """Return the nodes that have another key: their blocks serve no client of this swarm."""
        return frozenset(node for node, at in self._strangers.items() if now - at < STRANGER_S)

    def note_answer(self, node: str, now: float) -> None:
        """Learn that a node answered."""
        self._strangers.pop(node, None)
        self._answered_at, self._reminded_at = now, None

    def note_refusal(self, record: NodeRecord, error: Refused, now: float) -> None:
        """Learn that a node refused, or was refused, and log it if the reason is the key."""
        if error.code != FaultCode.WRONG_SWARM_KEY:
            return
        is_news = record.node not in self.strangers(now)
        known = self.strangers(now)
        self._strangers = {node: at for node, at in self._strangers.items() if node in known} | {record.node: now}
        is_alone = self._answered_at is None or now - self._answered_at > STRANGER_S
        if is_alone and (self._reminded_at is None or now - self._reminded_at > REMIND_S):
            self._reminded_at = now
            log.error("no node of this swarm talks to this one, so no client uses it: %s", error)
        elif is_news and not is_alone:
            log.warning("blocks %s of the node at %s do not count here: %s", record.span, record.address, error)
