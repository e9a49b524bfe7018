"""What a client asks of the session that a chain serves."""

import secrets
from dataclasses import dataclass, field

from treeswarm.protocol.messages import SESSION_ID_BYTES
from treeswarm.protocol.text_rules import RulesRequest
from treeswarm_client.chain.shared_prompt import SharedPrompt
from treeswarm_client.discovery.route import ANY_TAIL, TailNeeds, Target


@dataclass(frozen=True)
class Reservation:
    """The number of KV rows that a session reserves on every node."""

    trunk: int
    """Number of rows for committed tokens."""
    crown: int
    """Number of rows for speculated tokens."""

    @property
    def rows(self) -> int:
        """Number of rows in total."""
        return self.trunk + self.crown


@dataclass(frozen=True, eq=False)
class SessionOptions:
    """The settings of one session, the same on every node and in every epoch."""

    target: Target
    reservation: Reservation
    patience_s: float = 0.0
    """Seconds to wait for nodes to appear when no chain can be formed."""
    shared: SharedPrompt | None = None
    """Prompt whose KV may be shared with other sessions, or None."""
    alternatives: int = 0
    """Number of the target's best tokens that come with every answered row."""
    proposal_nodes: int = 0
    """Largest number of nodes of the trees that the tail's speculator should propose, or 0 for no proposals."""
    rules: RulesRequest | None = None
    """What the tail does to logits before it chooses tokens, or None for nothing."""
    needs: TailNeeds = ANY_TAIL
    """What every tail of the session must be able to do."""
    alternative_logprobs: bool = False
    """Whether the log-probabilities of the alternatives come too."""
    session: bytes = field(default_factory=lambda: secrets.token_bytes(SESSION_ID_BYTES))
    """Id of the session."""
