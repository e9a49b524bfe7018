"""One generation as its caller sees it: the request, the tokens as they stream, and the result."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from treeswarm.protocol.drive_messages import DrivenHop, DrivenTokens
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import RulesRequest
from treeswarm_client.chain.chain import Chain
from treeswarm_client.discovery.route import ANY_TAIL, TailNeeds
from treeswarm_client.generation.forced_runs import TextGrammar
from treeswarm_client.generation.loop import FinishReason, GenerationLimits
from treeswarm_client.generation.stats import Stats, StatsRecorder
from treeswarm_client.generation.token_logprobs import LogprobWishes, TokenLogprobs, TopLogprobs
from treeswarm_client.planner.policy import Round

TreeSize = int | Literal["auto"]


@dataclass(frozen=True)
class Token:
    """One committed token, as it streams."""

    id: int
    text: str
    """Text that this token adds; may be empty while a character is incomplete."""
    logprob: float
    """The model's own log-probability of this token, before rules, temperature and filters."""
    traversal: int
    """Number of the traversal that brought it: tokens of one traversal came in one round trip."""
    following: int = 0
    """Number of tokens of the same traversal that come right after this one."""
    top_logprobs: TopLogprobs = ()
    """The likeliest tokens at its place and their log-probabilities, best first, as many as were asked for."""


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of one call of `stream`."""

    settings: SamplingSettings
    limits: GenerationLimits
    stops: tuple[str, ...]
    tree_size: TreeSize
    on_round: Callable[[Round], None] | None
    """Called with every round that this client drove."""
    prefix_secret: bytes
    clock: Callable[[], float]
    """Clock in seconds from which the generation's times are read."""
    rules: RulesRequest | None = None
    """What the tail does to logits before it chooses tokens, or None for nothing."""
    needs: TailNeeds = ANY_TAIL
    """What every tail must be able to do."""
    wishes: LogprobWishes = LogprobWishes()
    """Which log-probabilities come beside those of the generated tokens."""
    hidden: frozenset[int] | None = None
    """Special tokens that are left out of the text, or None for all of them."""
    grammar: Callable[[], TextGrammar] | None = None
    """A function that returns the grammar at the beginning of the text, or None if there is none."""


@dataclass(eq=False)
class DriverUse:
    """A node that drove a part of a text."""

    node: str
    """Id of the node."""
    address: str
    """Address of the node, without a pin."""
    why: str
    """Reason why it drives, as a clause."""
    tokens: int = 0
    """Number of tokens that it brought."""
    hops: tuple[DrivenHop, ...] = ()
    """The nodes that computed last, as the driver names them."""
    ended: str | None = None
    """Why it drove no longer, or None if it drove to the end."""

    def add(self, message: DrivenTokens, kept: int) -> None:
        """Note what one traversal brought."""
        self.tokens += kept
        self.hops = message.hops or self.hops


@dataclass(eq=False)
class Iteration:
    """The task that iterates a run, so that another task can end it."""

    task: "asyncio.Task[Any] | None" = None
    """Task that asked for the last token."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the run's sessions are freed."""


@dataclass(eq=False)
class Run:
    """A generation that streams: iterate it for its tokens, then read `stats`.

    After an error `text` and `token_ids` hold what was committed before it.
    """

    tokens: AsyncGenerator[Token, None]
    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    """The likeliest tokens at the place of each, best first, as many as were asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Log-probabilities of the prompt's tokens, None for the first one; None if they were not asked for or have not
    come."""
    text: str = ""
    """Text generated so far.  It ends before a stop string; `token_ids` has the tokens that completed it."""
    finish_reason: FinishReason | None = None
    """`stop` at a stop token or string, `length` at the limit; None while it runs and after an error."""
    stop_string: str | None = None
    """The stop string that has ended the text, or None."""
    stats: Stats | None = None
    """Statistics of the generation, or None while it runs."""
    prefix_tokens: int = 0
    """Number of the prompt's tokens that the nodes had in their prefix caches."""
    first_token_s: float | None = None
    """Seconds from the call to the first token, waiting for room included; None before it."""
    recorder: StatsRecorder = field(default_factory=StatsRecorder)
    """Figures of every traversal so far."""
    drivers: list[DriverUse] = field(default_factory=list)
    """The nodes that drove parts of the text, in order; empty if this client drove all of it."""
    drive_why: str = ""
    """Why the last of them drives, or why this client drives by itself, as a clause."""
    lost_driver_at: float | None = field(default=None, repr=False)
    """Time at which a driver was lost whose text has not gone on yet, or None."""
    iteration: Iteration = field(default_factory=Iteration, repr=False)
    chain: Chain | None = field(default=None, repr=False)
    """The chain of this client, or None before the first nodes are found, and where a driver has the chain.

    Its `hops` and `repairs` name the nodes that computed."""

    def __aiter__(self) -> AsyncIterator[Token]:
        return self.tokens

    async def aclose(self) -> None:
        """End the generation and free its sessions; leaving the client does the same."""
        await self.tokens.aclose()

    async def end(self, patience_s: float) -> None:
        """End the generation even while another task iterates it: cancel that task and wait at most `patience_s`."""
        try:
            await self.aclose()
        except RuntimeError:  # another task is iterating it
            if self.iteration.task is not None:
                self.iteration.task.cancel()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.iteration.ended.wait(), patience_s)
