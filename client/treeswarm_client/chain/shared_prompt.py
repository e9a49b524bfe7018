"""The prompt whose KV a session shares, and with whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from treeswarm.errors import BadRequest
from treeswarm.protocol.prefix import SWARM_SCOPE, Prefix, prefix_of, scope_at

PrefixScope = Literal["client", "swarm", "none"]


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt whose KV this session may share with other sessions of the same scope."""

    prompt: Sequence[int]
    scope: PrefixScope
    secret: bytes
    """Secret of the client, from which the scope `client` derives its keys."""

    def prefix_at(self, nodes: Sequence[str]) -> Prefix | None:
        """Return the prefix for the last of `nodes` (ids), whose activations pass through the others.

        Return None if nothing is shared.
        """
        if self.scope == "none":
            return None
        return prefix_of(SWARM_SCOPE if self.scope == "swarm" else scope_at(self.secret, nodes), self.prompt)


def check_scope(scope: str) -> None:
    """Raise BadRequest unless `scope` is a prefix scope."""
    if scope not in ("client", "swarm", "none"):
        raise BadRequest(f"unknown prefix scope '{scope}': give client, swarm or none")
