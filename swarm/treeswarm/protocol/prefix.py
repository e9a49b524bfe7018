"""Names for the beginning of a text, so that nodes can tell whether they have its KV already.  Pure.

A unit is `PREFIX_TOKENS` tokens, whatever a node's pages are.  Its digest covers all tokens up to its end and a scope:
only who knows the scope can name the prefix, so a stranger can neither use it nor find out that it is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

PREFIX_TOKENS = 64
"""Less would save little of a prefill, and more would leave much of a short prompt out."""
DIGEST_BYTES = 16
SCOPE_BYTES = 16
MAX_PREFIX_UNITS = 4096
"""A quarter of a million tokens; their digests are 64 KiB."""
SWARM_SCOPE = b"treeswarm public"
"""Whoever sends the same prompt shares it."""


@dataclass(frozen=True)
class Prefix:
    """What a client tells one node of its prompt."""

    scope: bytes
    """`SCOPE_BYTES` that sessions must have in common to share."""
    digests: tuple[bytes, ...] = ()
    """Of the prompt's whole units, in order."""

    @property
    def rows(self) -> int:
        """Tokens that the digests cover."""
        return len(self.digests) * PREFIX_TOKENS


def next_digest(scope: bytes, before: bytes, tokens: Sequence[int]) -> bytes:
    """Of a unit, after the unit before it (b"": none)."""
    data = before + np.asarray(tokens, "<u4").tobytes()
    return blake2b(data, key=scope, digest_size=DIGEST_BYTES).digest()


def prefix_of(scope: bytes, prompt: Sequence[int]) -> Prefix:
    """What may be shared of a prompt: never its last token, whose answer begins the text."""
    units = min((len(prompt) - 1) // PREFIX_TOKENS, MAX_PREFIX_UNITS)
    digests: list[bytes] = []
    for start in range(0, units * PREFIX_TOKENS, PREFIX_TOKENS):
        before = digests[-1] if digests else b""
        digests.append(next_digest(scope, before, prompt[start : start + PREFIX_TOKENS]))
    return Prefix(scope, tuple(digests))


def scope_at(secret: bytes, nodes: Sequence[str]) -> bytes:
    """The scope that a client's sessions share at the last of `nodes`, which activations reach through the others.

    Another one at every node, so that none can pose as the client at another; and another one on every way, so that
    what one node computed wrongly stays on the ways through it.
    """
    return blake2b("\n".join(nodes).encode(), key=secret, digest_size=SCOPE_BYTES).digest()
