"""The one form of request that the gateway works on; the requests of every API are translated into it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from treeswarm.errors import BadRequest


class Unsupported(BadRequest):
    """A parameter that this gateway cannot honour."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True)
class GenerationRequest:
    """One request as the gateway works on it: every prompt is continued `n` times."""

    prompts: tuple[str | tuple[int, ...], ...]
    """Prompts as texts or token ids; empty if there are messages."""
    messages: tuple[Mapping[str, Any], ...]
    """Messages of a chat, or none."""
    n: int
    """Number of choices per prompt."""
    options: Mapping[str, Any]
    """Options of `SwarmClient.stream`."""
    max_tokens: int | None
    """Number of new tokens, or None for as many as fit, up to `default_max_tokens`."""
    default_max_tokens: int
    stream: bool
    """Whether the answer is sent as server-sent events."""
    include_usage: bool
    """Whether a stream ends with a chunk that counts its tokens."""
    logprobs: bool
    """Whether the answer has the log-probability of each token."""

    def max_new_tokens(self, room: int) -> int:
        """Return how many tokens to generate where the context has room for `room` more."""
        return self.max_tokens or max(1, min(self.default_max_tokens, room))

    @property
    def choices(self) -> int:
        """Number of generations that the request needs."""
        return max(1, len(self.prompts)) * self.n
