"""One node of a chain, and what the client knows of it."""

from dataclasses import dataclass
from typing import Final, Literal

from treeswarm.errors import NodeLost, Refused, SwarmError
from treeswarm.protocol.messages import Profile
from treeswarm_client.chain.control_stream import NodeControl
from treeswarm_client.discovery.route import FORGOTTEN, Hop

CLIENT: Final = "client"
"""The upstream neighbour of a chain's head."""
Upstream = Hop | Literal["client"] | None
"""The sender on the link into a node, or None if that link does not exist or broke."""


@dataclass(eq=False)
class ChainMember:
    """One node of a chain, with its control stream and its place in the chain."""

    hop: Hop
    control: NodeControl
    ticket: bytes = b""
    """Ticket that admits the upstream neighbour's link to this node."""
    credit_rows: int = 0
    """Number of rows the node lets the client have in flight."""
    profile: Profile = ()
    """Duration of the node's forwards, as it reported them when it opened the session."""
    prefix_rows: int = 0
    """Number of the prompt's first tokens that the node already had when it opened the session."""
    proposal_nodes: int = 0
    """Most nodes of the trees that this node proposes as the tail, as it granted them; 0 if it proposes none."""
    proven: bool = False
    """Whether an answer has passed through this node: then it has the whole trunk."""
    leaving: bool = False
    """Whether the node asked to leave the chain."""
    upstream: Upstream = None
    link_failures: int = 0
    """Number of times the link into this node failed since the last answer."""

    def failure_to_report(self, error: SwarmError) -> SwarmError:
        """Return what the router should know of a failure of this node.

        A new node cannot have forgotten a session.  As NodeLost the failure bans it, or the router would choose it
        again at once.
        """
        if not self.proven and isinstance(error, Refused) and error.code in FORGOTTEN:
            return NodeLost(str(error), self.hop.address)
        return error
