"""One generation as its caller sees it: what was asked, what streams, what it came to."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_client.chain.chain import Chain
from treeswarm_client.generation.loop import FinishReason, Generation, GenerationLimits
from treeswarm_client.generation.stats import Stats, StatsRecorder
from treeswarm_client.planner.policy import Round

TreeSize = int | Literal["auto"]


@dataclass(frozen=True)
class Token:
    """One committed token, as it streams."""

    id: int
    text: str
    """What this token adds to the text; may be empty while a character is incomplete."""
    logprob: float
    traversal: int
    """Tokens of one traversal came in one round trip."""
    following: int = 0
    """How many of them come right after this one."""


@dataclass(frozen=True, eq=False)
class Request:
    """What `stream` was asked for."""

    settings: SamplingSettings
    limits: GenerationLimits
    stops: tuple[str, ...]
    tree_size: TreeSize
    on_round: Callable[[Round], None] | None
    prefix_secret: bytes
    altered: Callable[[Generation], Generation] | None


@dataclass(eq=False)
class Run:
    """A generation that streams: iterate it for its tokens, then read `stats`.

    After an error `text` and `token_ids` hold what was committed before it.
    """

    tokens: AsyncGenerator[Token, None]
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    """Ends before a stop string; `token_ids` has what completed it."""
    finish_reason: FinishReason | None = None
    """`stop` at a stop token or string, `length` at the limit; None while it runs, or where it broke."""
    stats: Stats | None = None
    prefix_tokens: int = 0
    """Tokens of the prompt that the nodes had already."""
    first_token_s: float | None = None
    """From the call to the first token, waiting for room included."""
    meter: StatsRecorder = field(default_factory=StatsRecorder)
    driver: "asyncio.Task[Any] | None" = field(default=None, repr=False)
    """Who iterates it."""
    ended: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Its sessions are freed."""
    chain: Chain | None = field(default=None, repr=False)
    """Once the first nodes are found: its `hops` and `repairs` tell who computed what."""

    def __aiter__(self) -> AsyncIterator[Token]:
        return self.tokens

    async def aclose(self) -> None:
        """End it and free its sessions; leaving the client does the same."""
        await self.tokens.aclose()
