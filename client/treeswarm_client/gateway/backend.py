"""The gateway's connection to the swarm, one client opened as soon as there is a swarm, and its generations."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import partial
from hashlib import blake2b

from treeswarm.errors import BadRequest, ModelError, SwarmError
from treeswarm.model_sources.generation_config import GenerationDefaults
from treeswarm.protocol.prefix import SCOPE_BYTES
from treeswarm.protocol.text_rules import Grammar
from treeswarm.tasks import cancelled, keep_running
from treeswarm_client.client import SwarmClient
from treeswarm_client.discovery.prober import Prober
from treeswarm_client.discovery.swarm_view import SwarmView
from treeswarm_client.gateway.admission import Admission
from treeswarm_client.gateway.answers.chat_plan import ChatPlan, plan_chat
from treeswarm_client.gateway.answers.pieces import AnswerSplitter, PlainSplitter
from treeswarm_client.gateway.answers.token_text import TokenBytes
from treeswarm_client.gateway.browser.trace import AnswerTrace
from treeswarm_client.gateway.browser.watchers import POLL_S, MapEvent, WatchedGeneration, Watchers
from treeswarm_client.gateway.config import GatewayConfig
from treeswarm_client.gateway.errors import NotReady
from treeswarm_client.gateway.events import GenerationEvent, TokenEvent, merge_runs
from treeswarm_client.gateway.generation_request import ChatPrompt, GenerationRequest, Unsupported
from treeswarm_client.gateway.length import default_length, free_room
from treeswarm_client.gateway.monitoring.metrics import GatewayMetrics
from treeswarm_client.gateway.monitoring.tracing import Tracing
from treeswarm_client.gateway.sampling import sampling_options
from treeswarm_client.generation.run import Run
from treeswarm_client.planner.policy import Round
from treeswarm_client.tool_calls.formats import find_format

log = logging.getLogger(__name__)

# Number of characters that are tokenized within the event loop, which takes a millisecond; longer texts go to a thread.
MAX_INLINE_CHARACTERS = 4096
# Number of tokens at a prompt's end that tell whether the model is to think at once.
PROMPT_END = 16
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 10.0


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request whose runs can begin."""

    request: GenerationRequest
    runs: list[Run]
    """The runs prompt by prompt, `n` of each."""
    watched: list[WatchedGeneration]
    """The same generations as the map shows them."""
    reserved: int
    """Number of tokens for which the nodes reserve room."""
    make_splitter: Callable[[Run], AnswerSplitter]
    """Function that returns what divides a run's text into text, thoughts and calls."""
    traces: list[AnswerTrace]
    """Traces of the runs, for a caller who asked for them, or none."""
    echoes: Sequence[str] = ()
    """The prompts as texts, where answers begin with them."""


@dataclass(eq=False)
class SwarmConnection:
    """The gateway's one client, which is opened as soon as there is a complete swarm."""

    make_client: Callable[[], SwarmClient]
    """A function that returns a client which is not yet open."""
    why_not_ready: str = "the gateway has just begun to look for nodes"
    """Reason why there is no open client yet."""
    _problem: SwarmError | None = None
    """Error of the last attempt to open the client, or None if there was none."""
    _client: SwarmClient | None = None
    _prober: Prober | None = None
    _lookout: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack)
    """The registry that the map looks into while there is no client."""
    _probing: "asyncio.Task[bool] | None" = None
    """The task that pings nodes for the map."""

    @property
    def open_client(self) -> SwarmClient | None:
        """The client, or None if it is not yet open."""
        return self._client

    @property
    def client(self) -> SwarmClient:
        """The open client.  Raises NotReady."""
        if self._client is None:
            raise NotReady(self.why_not_ready, self._problem)
        return self._client

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Look for the swarm until it is found.  Raises ModelError and BadRequest, which waiting does not resolve."""
        async with contextlib.AsyncExitStack() as stack:
            if not await self._try_to_open(stack):
                stack.push_async_callback(self._lookout.aclose)
                stack.push_async_callback(cancelled, asyncio.create_task(self._keep_trying(stack)))
            try:
                yield
            finally:
                if self._probing is not None:
                    await cancelled(self._probing)

    async def read_overview(self) -> MapEvent:
        """Return the swarm as the map shows it, with the reason why it is not ready, if it is not.

        Without a client, the map looks at the swarm with a registry of its own: an outage is when it is needed.
        Nodes that are slow to answer delay it by at most `POLL_S`.
        """
        try:
            prober = self._prober = self._prober or await self._make_prober()
        except SwarmError as error:
            return {"kind": "waiting", "why": str(self._problem or error)}
        if self._probing is None or self._probing.done():
            self._probing = asyncio.create_task(prober.probe_due())
        probing = self._probing
        await asyncio.wait({probing}, timeout=POLL_S)
        # If the client was opened meanwhile, the lookout's probes are cancelled, and its prober has no registry.
        if self._prober is not prober:
            return await self.read_overview()
        if probing.done():
            probing.result()
        why = self.why_not_ready if self._client is None else ""
        return {"kind": "overview", "why": why, **(await prober.current_overview()).as_dict()}

    async def _make_prober(self) -> Prober:
        if self._client is None:
            prober = await self._lookout.enter_async_context(self.make_client().lookout())
            if self._client is None:
                return prober
            await self._lookout.aclose()
        return self._client.prober()

    async def _try_to_open(self, stack: contextlib.AsyncExitStack) -> bool:
        client = self.make_client()
        try:
            await stack.enter_async_context(client)
        except (BadRequest, ModelError):
            raise
        except SwarmError as error:
            self.why_not_ready, self._problem = str(error), error
            return False
        self._client, self._prober = client, None
        if self._probing is not None:
            await cancelled(self._probing)
            self._probing = None
        await self._lookout.aclose()
        if client.draft_choice.automatic:
            log.warning("%s", client.draft_choice)
        return True

    async def _keep_trying(self, stack: contextlib.AsyncExitStack) -> None:
        pause = FIRST_PAUSE_S
        log.warning("the swarm is not complete: %s; the gateway keeps looking for it", self.why_not_ready)
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            try:
                if await self._try_to_open(stack):
                    log.warning("the swarm is found")
                    return
            except SwarmError as error:  # the first attempt raised no such error: what the registry says may change
                self.why_not_ready, self._problem = str(error), error
            except Exception:
                self._problem = None
                self.why_not_ready = "an internal error occurred: see the gateway's log"
                log.exception("looking for the swarm failed unexpectedly; the gateway tries again")


@dataclass(eq=False)
class Backend:
    """Everything behind the HTTP routes: the connection, the limits, the metrics and the map's viewers."""

    config: GatewayConfig
    make_client: InitVar[Callable[[], SwarmClient]]
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    tracing: Tracing = field(default_factory=Tracing)
    connection: SwarmConnection = field(init=False)
    watchers: Watchers = field(init=False)
    admission: Admission = field(init=False)
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(SCOPE_BYTES), repr=False)
    started: int = field(default_factory=lambda: int(time.time()))
    """Time of the start, in seconds since 1970."""
    _token_bytes: TokenBytes | None = None
    _reserved: int = 0
    """Number of tokens for which nodes reserve room for the answers under way."""
    _shutdown: "asyncio.Future[None] | None" = None
    """Done when answers under way must end."""

    def __post_init__(self, make_client: Callable[[], SwarmClient]) -> None:
        self.connection = SwarmConnection(make_client)
        self.admission = Admission(self.config.limits)
        self.watchers = Watchers(self.config.limits.viewers)
        self.metrics.add_gauges(lambda: self.admission, self._view)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Connect to the swarm, or keep trying.  Raises ModelError and BadRequest, which waiting does not resolve."""
        self._shutdown = asyncio.get_running_loop().create_future()
        async with self.connection.open():
            poll = partial(self.watchers.poll_swarm, self.connection.read_overview)
            polling = asyncio.create_task(keep_running("reading the swarm for the map", poll))
            try:
                yield
            finally:
                await cancelled(polling)

    def stop(self, grace_s: float) -> None:
        """Disconnect viewers and refuse waiting requests at once; end answers under way after `grace_s` seconds."""
        self.watchers.close()
        self.admission.close()
        asyncio.get_running_loop().call_later(grace_s, self._end_answers)

    @property
    def client(self) -> SwarmClient:
        """The open client.  Raises NotReady."""
        return self.connection.client

    def check_ready(self) -> None:
        """Raise NotReady while there is no client, and MissingBlocks while there are blocks that no node serves."""
        if missing := self.client.view.missing():
            raise missing

    @property
    def why_not_ready(self) -> str:
        """Reason why nothing can be generated now, or an empty string."""
        try:
            self.check_ready()
        except SwarmError as error:
            return str(error)
        return ""

    async def prepare(self, request: GenerationRequest, caller: bytes) -> PreparedRequest:
        """Return the request with its runs, prompt by prompt, not yet begun.  Raises BadRequest and NotReady."""
        client = self.client
        plan = self._plan(request.chat) if request.chat is not None else None
        prompts = await self._encode_prompts(request, plan)
        options = {
            **sampling_options(request.sampling, self._defaults(), partial(client.encode, special=False)),
            "stop": request.ends.stops,
            "stop_token_ids": request.ends.stop_token_ids,
            "ignore_eos": request.ends.ignore_eos,
            "shown_special": plan.shown_special if plan is not None else (),
            "top_logprobs": request.answer.logprobs or 0,
            "prompt_logprobs": request.answer.prompt_logprobs,
            # The time to an answer must not reveal to one caller what another has sent.
            "prefix_secret": blake2b(caller, key=self._secret, digest_size=SCOPE_BYTES).digest(),
        }
        if plan is not None and (required := self._required_grammar(plan, prompts[0])) is not None:
            if options["rules"].grammar is not None:
                raise Unsupported("tool_choice", "a call that must come leaves no room for another grammar: give one")
            options["rules"] = replace(options["rules"], grammar=required)
        if (grammar := options["rules"].grammar) is not None:
            await client.compile_grammar(grammar)
        runs, watched, traces, reserved = [], [], [], 0
        for prompt in prompts:
            length = self._length(request, len(prompt))
            reserved += request.n * (len(prompt) + length)
            for sample in range(request.n):
                watched.append(self.watchers.add_generation(client.decode if self.config.map_text else None))
                trace = AnswerTrace(client.decode) if request.answer.include_traversals else None
                observer = self._round_observer(watched[-1], trace)
                runs.append(client.stream(prompt, sample=sample, max_new_tokens=length, on_round=observer, **options))
                if trace is not None:
                    trace.run = runs[-1]
                    traces.append(trace)
        echoes = []
        if request.answer.echo:
            echoes = [
                text if isinstance(text, str) else str(client.tokenizer.decode(list(text), skip_special_tokens=True))
                for text in request.prompts
            ]
        return PreparedRequest(request, runs, watched, reserved, partial(self._make_splitter, plan), traces, echoes)

    async def generate(self, prepared: PreparedRequest) -> AsyncGenerator[GenerationEvent, None]:
        """Wait for a turn, then yield the events of all generations.  Raises Busy and what generating raises."""
        timer = self.metrics.timer()
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self.tracing.request(prepared.runs))
            slots = await stack.enter_async_context(self.admission.hold_slots(len(prepared.runs)))
            for watched, run in zip(prepared.watched, prepared.runs, strict=True):
                watched.begin(len(run.prompt_ids))
            self._reserved += prepared.reserved
            try:
                async with contextlib.aclosing(
                    merge_runs(prepared.runs, prepared.request.n, on_all_ended=slots.release, shutdown=self._shutdown)
                ) as events:
                    async for event in events:
                        timer.observe(event)
                        if isinstance(event, TokenEvent):
                            prepared.watched[event.choice].add_token(event.token)
                        yield event
            finally:
                self._reserved -= prepared.reserved
                self.metrics.observe_runs(prepared.runs, prepared.request.n)
                for watched, run in zip(prepared.watched, prepared.runs, strict=True):
                    watched.end(run.finish_reason)

    async def encode_prompts(self, request: GenerationRequest) -> list[Sequence[int]]:
        """Return the token ids of a request's prompts, or of its conversation.  Raises BadRequest and NotReady."""
        return await self._encode_prompts(request, self._plan(request.chat) if request.chat is not None else None)

    async def encode_chat(self, chat: ChatPrompt) -> list[int]:
        """Return the token ids of a conversation, up to where the answer begins.  Raises BadRequest and NotReady."""
        return await self._encode_plan(self._plan(chat))

    async def encode_text(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text, with `special` after those of every text.  Raises BadRequest and NotReady."""
        if len(text) > MAX_INLINE_CHARACTERS:
            return await asyncio.to_thread(partial(self.client.encode, text, special=special))
        return self.client.encode(text, special=special)

    async def _encode_prompts(self, request: GenerationRequest, plan: ChatPlan | None) -> list[Sequence[int]]:
        if plan is not None:
            return [await self._encode_plan(plan)]
        texts = [await self.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]
        return list(texts)

    async def _encode_plan(self, plan: ChatPlan) -> list[int]:
        encode = partial(
            self.client.encode_chat,
            plan.messages,
            tools=plan.tools,
            template_kwargs=plan.variables,
            continue_final_message=plan.continued is not None,
        )
        return await asyncio.to_thread(encode)

    def _plan(self, chat: ChatPrompt) -> ChatPlan:
        """Return what a chat means for the model.  Raises Unsupported and NotReady."""
        template = self.client.chat_template
        source = template.source if template is not None else ""
        writes_tools = template is None or template.writes_tools
        form = find_format(source, self.config.tool_parser, self.config.reasoning_parser, writes_tools=writes_tools)
        return plan_chat(chat, template, form)

    def _required_grammar(self, plan: ChatPlan, prompt: Sequence[int]) -> Grammar | None:
        """Return the grammar of an answer that must call a tool, or None if it need not.  Raises BadRequest."""
        added = self.client.tokenizer.get_added_tokens_decoder()
        special = {token.content: id for id, token in added.items() if token.special}
        return plan.grammar(self.client.decode(prompt[-PROMPT_END:]), special)

    def _make_splitter(self, plan: ChatPlan | None, run: Run) -> AnswerSplitter:
        if plan is None:
            return PlainSplitter()
        return plan.splitter(self.client.decode(run.prompt_ids[-PROMPT_END:]))

    @property
    def token_bytes(self) -> TokenBytes:
        """The bytes of the model's tokens.  Raises NotReady."""
        tokenizer = self.client.tokenizer
        if self._token_bytes is None or self._token_bytes.tokenizer is not tokenizer:
            self._token_bytes = TokenBytes(tokenizer)
        return self._token_bytes

    def _defaults(self) -> GenerationDefaults:
        return self.client.generation_defaults if self.config.model_defaults else GenerationDefaults()

    def _length(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """Return the number of new tokens after a prompt of so many."""
        ends, target = request.ends, self.client.target
        left = target.max_positions - prompt_tokens
        if ends.max_tokens is not None and (ends.max_tokens <= left or not ends.is_wish):
            return ends.max_tokens
        if (named := ends.default_max_tokens or self._defaults().max_new_tokens) is not None:
            return max(1, min(named, left))
        return default_length(left, free_room(self.client.view.serving(), target.blocks, self._reserved))

    def _round_observer(self, watched: WatchedGeneration, trace: AnswerTrace | None) -> Callable[[Round], None]:
        def observe(round_: Round) -> None:
            self.metrics.rounds.observe(round_)
            watched.add_round(round_)
            if trace is not None:
                trace.add_round(round_)

        return observe

    def _view(self) -> SwarmView | None:
        client = self.connection.open_client
        return client.view if client is not None else None

    def _end_answers(self) -> None:
        if self._shutdown is not None and not self._shutdown.done():
            self._shutdown.set_result(None)
