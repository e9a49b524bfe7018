"""The settings of a gateway, read once at its start."""

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass

from treeswarm.errors import BadRequest
from treeswarm.protocol.address import Address, is_loopback
from treeswarm_client.tool_calls.formats import AUTO, find_format

LONGEST_KEY = 512


@dataclass(frozen=True)
class GatewayLimits:
    """Limits, each of which bounds memory or time that a caller could otherwise take."""

    generations: int = 32
    """Number of generations at once; each choice of a request is one."""
    waiting: int = 128
    """Number of requests that may wait for their turn; more get status 429."""
    wait_s: float = 30.0
    """Seconds that a request waits for its turn."""
    choices: int = 16
    """Number of choices of one request: its prompts times `n`."""
    max_tokens: int | None = None
    """Number of new tokens of a chat that names none, or None for as many as fit; nodes reserve room for them."""
    body_bytes: int = 4 << 20
    """Number of bytes of a request's body."""
    viewers: int = 32
    """Number of viewers of the map at once."""


@dataclass(frozen=True)
class ApiKeys:
    """The keys that callers may use, as digests."""

    digests: frozenset[bytes] = frozenset()

    @classmethod
    def of(cls, keys: Sequence[str]) -> "ApiKeys":
        """Make it from the keys themselves.  Raises BadRequest for a key that cannot be sent in a header."""
        for key in keys:
            if not re.fullmatch(r"[\x21-\x7e]{8,512}", key):
                raise BadRequest(
                    f"an API key of {len(key)} characters cannot be used: a key has 8 to {LONGEST_KEY} printable ASCII "
                    "characters without spaces"
                )
        return cls(frozenset(map(_digest, keys)))

    def caller(self, authorization: str | None) -> bytes | None:
        """Return an identifier of the caller who sends this Authorization header, or None to refuse the request.

        Without any keys, all callers are one.
        """
        if not self.digests:
            return b""
        kind, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        # Every key is compared, each in constant time, so that the time taken reveals nothing.
        matches = [hmac.compare_digest(digest, valid) for valid in self.digests]
        return digest if kind.lower() == "bearer" and any(matches) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


@dataclass(frozen=True)
class GatewayConfig:
    """The gateway's own part of the command line of `swarm serve`; the rest configures its client."""

    model_names: tuple[str, ...]
    """Names by which callers may ask for the model; answers carry the first."""
    listen: Address = Address("127.0.0.1", 8000)
    """Address to listen on."""
    keys: ApiKeys = ApiKeys()
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the gateway."""
    map_text: bool = False
    """Whether the map shows the text of generations, not only the shapes of their trees."""
    limits: GatewayLimits = GatewayLimits()
    tool_parser: str = AUTO
    """Name of the format of tool calls, `auto` to find it from the chat template, or `none`."""
    reasoning_parser: str = AUTO
    """Name of the format of thinking, `auto` to find it from the chat template, or `none`."""
    model_defaults: bool = True
    """Whether the model's generation config decides about sampling where a request does not."""

    def __post_init__(self) -> None:
        find_format("", self.tool_parser, self.reasoning_parser)  # refuses names that are not known
        limits = self.limits
        least = min(limits.generations, limits.choices, limits.max_tokens or 1, limits.body_bytes)
        if least < 1 or limits.waiting < 0:
            raise BadRequest(f"a gateway's limits must be at least 1, those for waiting at least 0: {limits}")
        if not self.keys.digests and not is_loopback(self.listen.host):
            raise BadRequest(
                f"other machines can reach {self.listen.host}, and every one of them could use the swarm: give "
                "--api-key-file FILE, or listen on 127.0.0.1"
            )
