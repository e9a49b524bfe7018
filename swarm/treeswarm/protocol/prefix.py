"""Digests of the beginning of a prompt, by which a node finds KV that it has already.  Pure.

A unit is `PREFIX_TOKENS` tokens, whatever the size of a node's pages.  The digest of a unit covers all tokens up to its
end and a scope.  Only a client that knows the scope can name the prefix; any other can neither use it nor find out
whether it is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

PREFIX_TOKENS = 64
"""Number of tokens per unit.  Fewer would save little of a prefill, and more would leave out much of a short prompt."""
DIGEST_BYTES = 16
SCOPE_BYTES = 16
MAX_PREFIX_UNITS = 4096
"""Largest number of units: a quarter of a million tokens, whose digests are 64 KiB."""
SWARM_SCOPE = b"treeswarm public"
"""Scope in which all clients that send the same prompt share its KV."""


@dataclass(frozen=True)
class Prefix:
    """The part of a prompt whose KV may be shared, as a client names it to one node."""

    scope: bytes
    """`SCOPE_BYTES` bytes that sessions must have in common to share KV."""
    digests: tuple[bytes, ...] = ()
    """Digests of the prompt's whole units, in order."""

    @property
    def rows(self) -> int:
        """Number of tokens that the digests cover."""
        return len(self.digests) * PREFIX_TOKENS


def next_digest(scope: bytes, before: bytes, tokens: Sequence[int]) -> bytes:
    """Return the digest of the unit `tokens` that follows the unit with digest `before` (empty for the first unit)."""
    data = before + np.asarray(tokens, "<u4").tobytes()
    return blake2b(data, key=scope, digest_size=DIGEST_BYTES).digest()


def prefix_of(scope: bytes, prompt: Sequence[int]) -> Prefix:
    """Return what may be shared of a prompt: never its last token, whose answer begins the text."""
    units = min((len(prompt) - 1) // PREFIX_TOKENS, MAX_PREFIX_UNITS)
    digests: list[bytes] = []
    for start in range(0, units * PREFIX_TOKENS, PREFIX_TOKENS):
        before = digests[-1] if digests else b""
        digests.append(next_digest(scope, before, prompt[start : start + PREFIX_TOKENS]))
    return Prefix(scope, tuple(digests))


def scope_at(secret: bytes, nodes: Sequence[str]) -> bytes:
    """Return the scope that a client's sessions share at the last of `nodes`, when activations come through the others.

    It differs from node to node, so that no node can pose as the client at another one.  It also differs between chains
    to the same node, so that what one node computed wrongly stays in the chains through it.
    """
    return blake2b("\n".join(nodes).encode(), key=secret, digest_size=SCOPE_BYTES).digest()
