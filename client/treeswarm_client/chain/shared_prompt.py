"""Whom a client shares its prompts' KV with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from treeswarm.errors import BadRequest
from treeswarm.protocol.prefix import SWARM_SCOPE, Prefix, prefix_of, scope_at

PrefixScope = Literal["client", "swarm", "none"]


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt whose KV other sessions may use, and whose KV of theirs it may."""

    prompt: Sequence[int]
    scope: PrefixScope
    secret: bytes
    """The client's own."""

    def at(self, nodes: Sequence[str]) -> Prefix | None:
        """What to tell the last of `nodes`, which activations reach through the others."""
        if self.scope == "none":
            return None
        return prefix_of(SWARM_SCOPE if self.scope == "swarm" else scope_at(self.secret, nodes), self.prompt)


def check_scope(scope: str) -> None:
    """Raises BadRequest."""
    if scope not in ("client", "swarm", "none"):
        raise BadRequest(f"prefix scope '{scope}' is unknown: say client, swarm or none")
