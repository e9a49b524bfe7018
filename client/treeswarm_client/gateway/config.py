"""What a gateway is told at start, read once at the edge."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address, is_loopback

LONGEST_KEY = 512


@dataclass(frozen=True)
class GatewayLimits:
    """Every number bounds memory or time that a caller could otherwise take."""

    generations: int = 32
    """At once; each choice of a request is one."""
    waiting: int = 128
    """Requests that wait for their turn; more are told 429."""
    wait_s: float = 30.0
    """So long a request waits for its turn."""
    choices: int = 16
    """Of one request: its prompts times `n`."""
    max_tokens: int = 1024
    """Where a chat request names none: its room on the nodes is reserved beforehand."""
    body_bytes: int = 4 << 20
    viewers: int = 32
    """Of the map, at once."""


@dataclass(frozen=True)
class ApiKeys:
    """Who may ask, by the digests of their keys."""

    digests: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, keys: Sequence[str]) -> "ApiKeys":
        """Raises BadRequest for what cannot travel in a header."""
        for key in keys:
            if not re.fullmatch(r"[\x21-\x7e]{8,512}", key):
                raise BadRequest(f"an API key needs 8 to {LONGEST_KEY} printable characters without spaces")
        return cls(frozenset(map(_digest, keys)))

    def caller(self, authorization: str | None) -> bytes | None:
        """Who sends a request with this header, None where the door stays shut; without keys all are one caller."""
        if not self.digests:
            return b""
        kind, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        # All are compared, each in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return digest if kind.lower() == "bearer" and any(matches) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class GatewayConfig:
    """`swarm serve`'s own part of its command line; the other is the client's."""

    model_names: tuple[str, ...]
    """What callers may call the model; the first is what answers call it."""
    listen: Address = Address("127.0.0.1", 8000)
    keys: ApiKeys = ApiKeys()
    cors_origins: tuple[str, ...] = ()
    map_text: bool = False
    """The map shows the words of generations, not only their trees' shapes."""
    limits: GatewayLimits = GatewayLimits()

    def __post_init__(self) -> None:
        limits = self.limits
        if min(limits.generations, limits.choices, limits.max_tokens, limits.body_bytes) < 1 or limits.waiting < 0:
            raise BadRequest("a gateway's limits must be at least 1")
        if not self.keys.digests and not is_loopback(self.listen.host):
            raise BadRequest(
                f"{self.listen.host} can be reached from other machines, and whoever reaches it could use the swarm: "
                "give --api-key-file FILE, or listen on 127.0.0.1"
            )
