"""The swarms that `swarm bench wan` measures: three nodes and a client, over links of one shape.  Pure data."""

from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.transport.emulated import LinkShape

SLOW_SHARE = 0.25


@dataclass(frozen=True)
class Cell:
    """Settings of the node processes and of the client."""

    name: str
    link: str
    """Shape of one way of every link, as `--emulate-link` takes it."""
    slow: frozenset[int] = frozenset()
    """Indices of nodes whose owners lend a quarter of their device."""
    tokens_share: float = 1.0
    """Factor on the requested number of tokens.

    Everything that is compared within a cell has the same number; it is lower in the cells that would take longest.
    """

    @property
    def delay_s(self) -> float:
        """Seconds that a link delays a message, one way."""
        return LinkShape.parse(self.link).delay_s

    def ring_s(self, hops: int) -> float:
        """Return the least seconds that a traversal spends in links: from the client through all nodes and back."""
        return (hops + 1) * self.delay_s

    def star_s(self, hops: int) -> float:
        """Return the same where everything between two nodes goes through the client."""
        return 2 * hops * self.delay_s

    def node_flags(self, nodes: int) -> list[Sequence[str]]:
        """Return the additional flags of each node."""
        return [("--device-share", str(SLOW_SHARE)) if i in self.slow else () for i in range(nodes)]


CELLS = (
    Cell("1ms", "delay=1ms,rate=1gbit"),
    Cell("25ms", "delay=25ms,rate=100mbit"),
    Cell("50ms", "delay=50ms,rate=20mbit", tokens_share=0.75),
    Cell("100ms", "delay=100ms,rate=100mbit", tokens_share=0.5),
    Cell("slow-node", "delay=25ms,rate=100mbit", frozenset({1})),
)
