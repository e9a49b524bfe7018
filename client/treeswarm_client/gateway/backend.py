"""The gateway's side of the swarm: one client, opened as soon as there is a swarm, and its generations."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from treeswarm.errors import BadRequest, MissingBlocks, ModelError, SwarmError
from treeswarm.protocol.prefix import SCOPE_BYTES
from treeswarm.protocol.spans import missing_blocks
from treeswarm.tasks import cancelled
from treeswarm_client.client import SwarmClient
from treeswarm_client.discovery.prober import Prober
from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.config import GatewayConfig
from treeswarm_client.gateway.errors import NotReady
from treeswarm_client.gateway.events import GenerationEvent, TokenEvent, follow
from treeswarm_client.gateway.metrics import GatewayMetrics
from treeswarm_client.gateway.requests import GenerationRequest
from treeswarm_client.gateway.tracing import Tracing
from treeswarm_client.gateway.watchers import POLL_S, WatchedGeneration, Watchers
from treeswarm_client.generation.run import Run
from treeswarm_client.planner.policy import Round

log = logging.getLogger(__name__)

# Tokenizing so many letters takes a millisecond; longer texts are not encoded in the event loop.
MAX_INLINE_CHARACTERS = 4096
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request, ready to begin."""

    ask: GenerationRequest
    runs: list[Run]
    """Prompt by prompt, `n` of each."""
    shown: list[WatchedGeneration]


@dataclass(eq=False)
class Backend:
    """`make` gives a client not yet entered."""

    config: GatewayConfig
    make: Callable[[], SwarmClient]
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    tracing: Tracing = field(default_factory=Tracing)
    watchers: Watchers = field(init=False)
    admission: Admission = field(init=False)
    why_not: str = "the gateway has only just begun to look for nodes"
    """Why nothing can be asked yet."""
    _client: SwarmClient | None = None
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(SCOPE_BYTES), repr=False)
    _over: "asyncio.Future[None] | None" = None
    """Done when nothing more is to be said."""
    _prober: Prober | None = None
    _asking: "asyncio.Task[bool] | None" = None
    """Nodes are being pinged for the map."""

    def __post_init__(self) -> None:
        self.admission = Admission(self.config.limits)
        self.watchers = Watchers(self.config.limits.viewers)
        self.metrics.follow(lambda: self.admission, lambda: self._client.view if self._client else None)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Look for the swarm until it is found.  Raises what no waiting mends: ModelError, BadRequest."""
        self._over = asyncio.get_running_loop().create_future()
        async with contextlib.AsyncExitStack() as stack:
            if not await self._enter(stack):
                waiting = asyncio.create_task(self._keep_entering(stack))
                stack.push_async_callback(cancelled, waiting)
            looking = asyncio.create_task(self.watchers.poll_swarm(self._look))
            try:
                yield
            finally:
                await cancelled(looking)
                if self._asking is not None:
                    await cancelled(self._asking)

    def stop(self, grace_s: float) -> None:
        """Viewers and whoever waits are let go at once, streams under way after `grace_s` seconds."""
        self.watchers.close()
        self.admission.close()
        asyncio.get_running_loop().call_later(grace_s, self._end_streams)

    def _end_streams(self) -> None:
        if self._over is not None and not self._over.done():
            self._over.set_result(None)

    @property
    def client(self) -> SwarmClient:
        """Raises NotReady."""
        if self._client is None:
            raise NotReady(self.why_not)
        return self._client

    def check_ready(self) -> None:
        """Raises NotReady while there is a gap that nobody fills."""
        view = self.client.view
        spans = [record.span for record in view.serving()]
        if gaps := missing_blocks(spans, view.target.blocks):
            raise NotReady(str(MissingBlocks.of(gaps, view.target.blocks)))

    async def prepare(self, ask: GenerationRequest, caller: bytes) -> PreparedRequest:
        """The runs of a request, prompt by prompt, not yet begun.  Raises BadRequest and NotReady."""
        client = self.client
        if ask.messages:
            prompts: list[Sequence[int]] = [await asyncio.to_thread(client.encode_chat, ask.messages)]
        else:
            prompts = [await self._encoded(prompt) for prompt in ask.prompts]
        runs, shown = [], []
        for prompt in prompts:
            for sample in range(ask.n):
                shown.append(self.watchers.generation(client.decode if self.config.map_text else None))
                run = client.stream(
                    prompt,
                    sample=sample,
                    max_new_tokens=ask.max_new_tokens(client.target.max_positions - len(prompt)),
                    on_round=self._told_of(shown[-1]),
                    # What one caller sent, another shall not find out by how soon it is answered.
                    prefix_secret=blake2b(caller, key=self._secret, digest_size=SCOPE_BYTES).digest(),
                    **ask.options,
                )
                runs.append(run)
        return PreparedRequest(ask, runs, shown)

    async def _encoded(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if len(prompt) > MAX_INLINE_CHARACTERS:
            return await asyncio.to_thread(self.client.encode, prompt)
        return self.client.encode(prompt)

    async def work(self, job: PreparedRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Wait for a turn, then generate.  Raises Busy and what generating raises."""
        timer = self.metrics.timer()
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self.tracing.request(job.runs))
            places = await stack.enter_async_context(self.admission.places(len(job.runs)))
            for shown, run in zip(job.shown, job.runs, strict=True):
                shown.begin(len(run.prompt_ids))
            try:
                async with contextlib.aclosing(
                    follow(job.runs, job.ask.n, idle=places.give_back, over=self._over)
                ) as events:
                    async for event in events:
                        timer.saw(event)
                        if isinstance(event, TokenEvent):
                            job.shown[event.choice].said(event.token)
                        yield event
            finally:
                self.metrics.observe_runs(job.runs, job.ask.n)
                for shown, run in zip(job.shown, job.runs, strict=True):
                    shown.end(run.finish_reason)

    def _told_of(self, shown: WatchedGeneration) -> Callable[[Round], None]:
        def tell(flown: Round) -> None:
            self.metrics.observe_round(flown)
            shown.round(flown)

        return tell

    async def _enter(self, stack: contextlib.AsyncExitStack) -> bool:
        client = self.make()
        try:
            await stack.enter_async_context(client)
        except (BadRequest, ModelError):
            raise
        except SwarmError as error:
            self.why_not = str(error)
            return False
        self._client = client
        return True

    async def _keep_entering(self, stack: contextlib.AsyncExitStack) -> None:
        pause = FIRST_PAUSE_S
        log.warning("no whole swarm yet: %s", self.why_not)
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            try:
                if await self._enter(stack):
                    log.warning("the swarm is found")
                    return
            except SwarmError as error:  # it was well at the first attempt: a registry's word of now
                self.why_not = str(error)
            except Exception:
                self.why_not = "an internal error: the gateway's log tells more"
                log.exception("looking for the swarm failed unexpectedly; it goes on")

    async def _look(self) -> dict[str, Any]:
        """The swarm as the map shows it, or why there is none.  A node that takes long to answer holds up nobody."""
        if self._client is None:
            return {"kind": "waiting", "why": self.why_not}
        self._prober = self._prober or self._client.prober()
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._prober.probe_due())
        if (await asyncio.wait({self._asking}, timeout=POLL_S))[0]:
            self._asking.result()
        return {"kind": "overview", **(await self._prober.current_overview()).as_dict()}
