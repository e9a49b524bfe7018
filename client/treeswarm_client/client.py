"""The client library: `SwarmClient`, asynchronous; `treeswarm_client.sync` is its synchronous form."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenizers import Tokenizer

from treeswarm.errors import BadRequest
from treeswarm.model_files import HubOptions
from treeswarm.model_sources.generation_config import GenerationDefaults
from treeswarm.protocol.messages import Description
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.text_rules import RULES_VERSION, Grammar, RulesRequest, TextRules
from treeswarm.registry import check_swarm_key
from treeswarm.registry.peers import PeersRegistry
from treeswarm.tasks import cancelled, keep_running
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.shared_prompt import PrefixScope
from treeswarm_client.chain.wait_events import OnWait
from treeswarm_client.chat_template import ChatTemplate, MessageDict
from treeswarm_client.client_settings import (
    DEFAULT_HUB,
    DEFAULT_PATIENCE_S,
    ConnectionSettings,
    DraftSettings,
    NodeSelection,
    SessionSettings,
    largest_tree,
)
from treeswarm_client.discovery.describe import describe_all
from treeswarm_client.discovery.lost_reports import LostReporter
from treeswarm_client.discovery.overview import Overview
from treeswarm_client.discovery.prober import Prober
from treeswarm_client.discovery.route import ANY_TAIL, TailNeeds, Target, needs_of
from treeswarm_client.discovery.swarm_view import SwarmView
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.drafters.selection.automatic import TAIL, DraftChoice, TailOffer, follow_tail
from treeswarm_client.driving.choice import kind_of_draft
from treeswarm_client.driving.drivers import Drivers
from treeswarm_client.generation.drafter_pool import MOST_GENERATIONS
from treeswarm_client.generation.forced_runs import TextGrammar
from treeswarm_client.generation.loop import Generation, GenerationLimits
from treeswarm_client.generation.run import Request, Run, Token, TreeSize
from treeswarm_client.generation.runner import GenerationRunner
from treeswarm_client.generation.text_stream import hidden_tokens
from treeswarm_client.generation.token_logprobs import LogprobWishes
from treeswarm_client.opened_client import LoadedDrafters, OpenedClient, OpeningWait, load_beside, open_lookout
from treeswarm_client.planner.policy import Round
from treeswarm_client.prompt_encoder import check_request

log = logging.getLogger(__name__)

NO_RULES = TextRules()
# A drafter's forward is waited for until its end.
LEAVE_S = 10.0


class SwarmClient:
    """A client of the nodes at `peers` that serve `model`.

        async with SwarmClient(model="demo", peers="127.0.0.1:4001,127.0.0.1:4002", draft="demo-draft") as client:
            async for token in client.stream("def main():"):
                print(token.text, end="")

    Entering the client opens it.  It raises ModelError, Mismatch, BadRequest, RouteError or Unreachable if something is
    wrong with the model, the draft, the addresses or the nodes.  Several generations may run at once; with a drafter
    that cannot be copied they take turns.
    """

    target: Target
    """The model as the nodes serve it, once the client is open."""
    view: SwarmView
    """The swarm as this client sees it, once the client is open."""
    _opened: OpenedClient
    _drafters: LoadedDrafters
    _drivers: Drivers
    _announced: DraftChoice
    """The choice of a drafter that was logged last."""

    def __init__(
        self,
        model: str,
        peers: str | None = None,
        registry: str | None = None,
        draft: str = "auto",
        tree_size: TreeSize = "auto",
        draft_device: str = "auto",
        emulate_link: str | None = None,
        drafter: Drafter | None = None,
        swarm_key: bytes | None = None,
        transport: Transport | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        patience: float = DEFAULT_PATIENCE_S,
        opening_patience: float | None = None,
        on_wait: OnWait = lambda _: None,
        prefix_scope: PrefixScope = "client",
        hub: HubOptions = DEFAULT_HUB,
        concurrency: int = MOST_GENERATIONS,
        clock: Callable[[], float] = time.perf_counter,
        drive: str = "auto",
    ) -> None:
        """Keep the settings; nothing is read or connected before the client is entered.

        model: Directory, GGUF file, hub id, `smollm2` or `demo`.  Only its config and tokenizer are read.
        peers: Addresses of nodes, separated by commas.  An address is `HOST:PORT`, or `HOST:PORT#PIN` as the node's
            ready line shows it: then no other node can answer there.
        registry: In place of `peers`: the join code that nodes print, `HOST:PORT` of any node, or an MQTT broker.
        draft: `auto`, `ngram`, `none`, `tail` (what the chain's tail proposes, if that has a speculator), or a draft
            model (a directory, a hub id or `demo-draft`); with `+ngram` appended it uses both.  `auto` is the first of
            these that is there: `tail+ngram`, a draft model on this machine with `ngram`, `ngram`.
        tree_size: Number of drafted nodes per traversal.  0 is plain decoding; with `auto` it is chosen each round for
            most tokens per second.
        draft_device: Device of the draft model; `auto` is a GPU if there is one, else the CPU.
        emulate_link: Link to emulate, such as `delay=25ms`.
        drafter: Drafter to use in place of `draft`.
        swarm_key: Key of a private swarm, as `treeswarm.keys.read_swarm_key` reads it.
        transport: Transport to use in place of gRPC with TLS.  It stays open afterwards.
        dtype: Dtype in which nodes must compute; None takes the numerics class with most nodes.
        quantization: Quantization of the nodes' weights, `none`, `published`, `int8`, `int4` or `nf4`; None as for
            `dtype`.
        patience: Seconds a generation waits for nodes to appear when no chain can be formed.
        opening_patience: Seconds that entering the client waits for nodes that do not answer, and for missing blocks;
            None waits as long as `patience`.
        on_wait: Called while the client or a generation waits so, with the reason and the seconds that remain.
        prefix_scope: Who may share the KV of a prompt's beginning.  `client`: this client's own generations.
            `swarm`: every client that sends the same prompt.  Such a client can tell that another one sent it, and the
            nodes must be trusted to have computed the KV.  `none`: no other generation.
        hub: Where and how a model named by a hub id is found.
        concurrency: Number of generations that may run at once; more of them wait for their turn.
        clock: Clock in seconds from which a generation's times are read.
        drive: Where the generation loop runs.  `self`: here.  The id or address of a node that offers it: there, so
            that this client drafts nothing, and goes on by itself when that node is lost.  `auto`: on the node from
            which a traversal is fastest by measured distances, or here.
        """
        self.nodes = NodeSelection(model, peers, registry, dtype, quantization, hub)
        self.drafting = DraftSettings(draft, tree_size, draft_device, drafter, concurrency)
        self.connection = ConnectionSettings(transport, swarm_key, emulate_link)
        self.sessions = SessionSettings(
            patience,
            patience if opening_patience is None else opening_patience,
            on_wait,
            prefix_scope,
            clock=clock,
            drive=drive,
        )
        self._on_exit = AsyncExitStack()
        self._runs: set[Run] = set()
        """Generations that run now."""

    async def __aenter__(self) -> Self:
        """Open the client."""
        self.drafting.check()
        self.sessions.check()
        if self.sessions.is_driven_by_name and self.nodes.are_named:
            raise BadRequest(
                f"{self.sessions.drive} would choose the nodes by itself, and you named them: give a registry in place "
                "of peers, or drive by yourself"
            )
        check_swarm_key(self.nodes.registry_spec, self.connection.swarm_key)  # refused before anything is loaded
        async with AsyncExitStack() as undo:
            self._opened = await asyncio.to_thread(OpenedClient.load, self.nodes, self.connection)
            if self.connection.transport is None:
                undo.push_async_callback(self._opened.transport.close)
            # A client whose texts a node drives goes on with n-grams when that node is lost, and needs no torch.
            drafting = self.drafting.without_model() if self.sessions.is_driven_by_name else self.drafting
            load = partial(LoadedDrafters.load, self.nodes, drafting, self._opened.folder)
            if drafting.draft == "auto" and drafting.drafter is None:  # the swarm's records decide what is loaded
                self.view = await self._find_swarm(undo)
                self._drafters = await asyncio.to_thread(load, self.tail_offer)
            else:
                self.view, self._drafters = await load_beside(self._find_swarm(undo), partial(load, None))
            self.target = self.view.target
            self._drivers = self._make_drivers()
            self._drivers.check()
            self._announced = self.draft_choice
            if self.draft_choice.name.startswith(TAIL) and self.tail_offer is None:
                words = "no tail of this swarm has a speculator now, so --draft %s guesses without one"
                log.warning(words, self.draft_choice.name)
            undo.push_async_callback(
                cancelled, asyncio.create_task(keep_running("following the registry", self.view.watch))
            )
            self._on_exit = undo.pop_all()
        return self

    async def _find_swarm(self, undo: AsyncExitStack) -> SwarmView:
        """Collect the nodes' records and choose the target; `undo` closes what this opens."""
        opened, waiting = self._opened, OpeningWait(self.sessions.opening_patience_s, self.sessions.on_wait)
        registry = await opened.find_registry(self.nodes, waiting)
        undo.push_async_callback(registry.close)
        target, snapshot = await opened.first_target(registry, self.nodes, waiting)
        dials = registry.dial_addresses if isinstance(registry, PeersRegistry) else {}
        view = SwarmView(registry, target, largest_tree(self.drafting.tree_size) + 1, dials, snapshot)
        reporter = LostReporter(opened.transport, lambda: view.snapshot, opened.config, target.blocks, target.numerics)
        undo.push_async_callback(reporter.close)
        view.on_lost = reporter.report
        return view

    def _make_drivers(self) -> Drivers:
        wanted, why = self.sessions.drive, "as asked for"
        if wanted == "auto" and self.nodes.are_named:  # a driver chooses nodes by itself
            wanted, why = "self", "because the nodes were named one by one"
        elif wanted == "auto" and self.drafting.drafter is not None:
            wanted, why = "self", "because a drafter was given"
        draft = kind_of_draft(self._drafters.choice)
        return Drivers(wanted, self.view, self._opened.transport, draft, self.target.vocab_size, why)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End the generations that run, and close the client."""
        try:
            await asyncio.gather(*(run.end(LEAVE_S) for run in list(self._runs)))
        finally:
            await self._on_exit.aclose()

    # ---------------------------------------------------------------- the swarm

    @property
    def model(self) -> str:
        """The model as it was named."""
        return self.nodes.model

    @property
    def folder(self) -> Path:
        """Directory of the model's config and tokenizer."""
        return self._opened.folder

    @property
    def draft_choice(self) -> DraftChoice:
        """Which drafter this client uses with the nodes of now, and why."""
        return follow_tail(self._drafters.choice, self.tail_offer)

    @property
    def tail_offer(self) -> TailOffer | None:
        """What the tail of the fastest chain has to propose with, or None if it has nothing."""
        record = self.view.tail_speculator()
        return TailOffer.of(record) if record is not None else None

    @property
    def patience(self) -> float:
        """Seconds a generation waits for nodes to appear when no chain can be formed.  May be set."""
        return self.sessions.patience_s

    @patience.setter
    def patience(self, seconds: float) -> None:
        self.sessions = replace(self.sessions, patience_s=seconds)

    @property
    def addresses(self) -> list[str]:
        """Addresses of all nodes with a record, in the order of their blocks."""
        records = sorted((sealed.record for sealed in self.view.snapshot), key=lambda record: record.span)
        return [self.view.dials.get(record.node) or record.dial for record in records]

    async def describe_nodes(self, addresses: Sequence[str] | None = None) -> dict[str, Description]:
        """Ask nodes (by default all with a record) how busy they are.  Raises the error of a node if none answers."""
        return await describe_all(self._opened.transport, self.addresses if addresses is None else addresses)

    async def overview(self) -> Overview:
        """Return the swarm of this model as it is now: blocks, gaps, nodes, and the latency of each."""
        return await self.prober().fresh_overview()

    def prober(self) -> Prober:
        """Return a prober, for repeated overviews.  It remembers answers and asks no node too often."""
        return Prober(self.view.registry, self._opened.transport, self._opened.model_filter(self.model))

    def lookout(self) -> AbstractAsyncContextManager[Prober]:
        """Return a context whose prober shows the swarm of a client that cannot be opened yet."""
        return open_lookout(self.nodes, self.connection)

    # ---------------------------------------------------------------- text

    def encode(self, prompt: str, *, special: bool = True) -> list[int]:
        """Return the prompt's token ids, with `special` after those that begin every text of the model.

        Raises BadRequest for text that is not Unicode.
        """
        return self._opened.prompts.encode(prompt, special=special)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included."""
        return self._opened.prompts.decode(token_ids)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._opened.prompts.tokenizer

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """The sampling that the model's publisher recommends; `stream` has defaults of its own."""
        return self._opened.defaults

    @property
    def has_chat_template(self) -> bool:
        """Whether the model can chat; otherwise it only continues texts."""
        return self._opened.prompts.chat is not None

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The model's chat template, or None if it only continues texts."""
        return self._opened.prompts.chat

    def encode_chat(
        self,
        messages: Sequence[MessageDict],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | str = False,
    ) -> list[int]:
        """Return the token ids of a conversation, as the model's chat template writes it, up to where the reply begins.

        `tools` are OpenAI's objects that describe functions, `template_kwargs` variables that the template reads, such
        as `enable_thinking`.  With `continue_final_message` the model goes on with the last message's content, or with
        the field that it names.  Raises BadRequest if there is no chat template, or if it refuses the messages.
        """
        return self._opened.prompts.encode_chat(
            messages, tools=tools, template_kwargs=template_kwargs, continue_final_message=continue_final_message
        )

    # ---------------------------------------------------------------- generations

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        sample: int = 0,
        tree_size: TreeSize | None = None,
        stop: str | Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        on_round: Callable[[Round], None] | None = None,
        prefix_secret: bytes | None = None,
        rules: TextRules = NO_RULES,
        generated_tokens: int = 0,
        top_logprobs: int = 0,
        prompt_logprobs: int | None = None,
        shown_special: Sequence[str] = (),
    ) -> Run:
        """Start a generation: an asynchronous iterator of Tokens that also keeps text, ids and statistics.

        `prompt` is text or token ids; `sample` numbers several samples of one prompt and seed.  The generation ends at
        the model's own end tokens (unless `ignore_eos`), at `stop_token_ids`, and before any text in `stop`.
        `on_round` is called with every tree that came back.  The beginning of the prompt is shared with generations of
        the same `prefix_secret` (16 bytes; by default this client's).  `rules` are penalties, biases, bans and a
        grammar that the tail applies; the last `generated_tokens` of the prompt count as output for them.  Special
        tokens are left out of the text, except those that are part of a text in `shown_special`.  Tokens come with the
        `top_logprobs` likeliest ones at their place.  With `prompt_logprobs` the prompt's tokens are scored
        too, with so many likeliest ones; `max_new_tokens` may then be 0.  Raises BadRequest at once if the request is
        invalid or no tail applies its rules, and while iterating NodeLost, Refused and the other SwarmErrors.
        """
        settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, sample=sample)
        prompt_ids = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        wishes = LogprobWishes(top_logprobs, prompt_logprobs)
        least = 1 if prompt_logprobs is None else 0
        check_request(prompt_ids, max_new_tokens, self.target.vocab_size, self.target.max_positions, least=least)
        tree_size = self.drafting.tree_size if tree_size is None else tree_size
        largest_tree(tree_size)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise BadRequest("a stop string is empty: leave it out")
        ends = frozenset(stop_token_ids) | (frozenset() if ignore_eos else self._opened.shape.eos_ids)
        limits = GenerationLimits(max_new_tokens, ends)
        run = Run(tokens=_no_tokens(), prompt_ids=prompt_ids)
        secret = prefix_secret or self.sessions.prefix_secret
        asked, needs = self._rules_for(rules, len(prompt_ids), generated_tokens, ends, wishes)
        clock, grammar = self.sessions.clock, self._grammar_of(asked)
        hidden = hidden_tokens(self.tokenizer, shown_special)
        request = Request(
            settings, limits, stops, tree_size, on_round, secret, clock, asked, needs, wishes, hidden, grammar
        )
        run.tokens = self._run(run, request)
        return run

    async def compile_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar in a thread, so that a text under it begins at once.  Raises BadRequest if it is wrong."""

        def compile_it() -> None:
            self._opened.grammars.load().compile(grammar)

        await asyncio.to_thread(compile_it)

    def _grammar_of(self, request: RulesRequest | None) -> Callable[[], TextGrammar] | None:
        """Return what begins the grammar of a text, compiled, or None if it has none.  Raises BadRequest."""
        if request is None or request.rules.grammar is None:
            return None
        compiler = self._opened.grammars.load()
        compiler.open(request)
        return partial(compiler.open, request)

    def _rules_for(
        self, rules: TextRules, prompt: int, generated: int, ends: frozenset[int], wishes: LogprobWishes
    ) -> tuple[RulesRequest | None, TailNeeds]:
        """Return the rules of a text as its tail gets them, and what they need of it.

        Raises BadRequest if rules name tokens outside the vocabulary, or if there are tails and none applies the rules.
        """
        if not 0 <= generated <= prompt:
            raise BadRequest(f"generated_tokens is {generated}: give 0 up to the prompt's {prompt} tokens")
        tails = self.view.tails()
        needs = needs_of(rules, "" if rules.grammar is None else self._opened.grammars.load().name)
        if wishes.wanted:  # releases without rules send no log-probabilities but those of the chosen tokens
            needs = replace(needs, rules=RULES_VERSION)
        if needs == ANY_TAIL:
            return None, ANY_TAIL
        if not rules.end_tokens:
            rules = replace(rules, end_tokens=tuple(sorted(ends)))
        rules.check_vocabulary(self.target.vocab_size)
        if tails and not any(map(needs.are_met_by, tails)):
            raise BadRequest(
                f"no node that serves the last block applies {needs}: leave them out, or update a node "
                f"({', '.join(record.address for record in tails)})"
            )
        return None if rules.neutral else RulesRequest(rules, prompt - generated), needs

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> Run:
        """Generate the whole text and return its run.  Takes the options of `stream`."""
        run = self.stream(prompt, **options)
        async for _ in run:
            pass
        return run

    async def generate_many(self, prompt: str | Sequence[int], *, n: int, sample: int = 0, **options: Any) -> list[Run]:
        """Generate `n` samples of one prompt at once.  Run i is what `generate` gives with sample index `sample` + i.

        The prompt is prefilled once, and the nodes share its KV among the samples.  Takes the options of `stream` and
        raises what `generate` raises; then it ends all samples.
        """
        if n < 1:
            raise BadRequest(f"{n} samples were asked for: ask for at least 1")
        runs = [self.stream(prompt, sample=sample + i, **options) for i in range(n)]
        await anext(runs[0].tokens, None)  # now the prompt has passed all nodes, and the others begin with its KV
        ends = [asyncio.create_task(_finish(run)) for run in runs]
        try:
            await asyncio.gather(*ends)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.wait(ends)
        return runs

    def _adapt_generation(self, usual: Generation) -> Generation:
        """Return the loop to run in place of `usual`.  Overridden to measure other loops and other policies."""
        return usual

    async def _run(self, run: Run, request: Request) -> AsyncGenerator[Token, None]:
        """Stream the tokens of one run, which the client ends if it is left before."""
        opened = self._opened
        runner = GenerationRunner(
            opened.transport,
            self.view,
            self.target,
            self._drafters.pool,
            opened.prompts.tokenizer,
            self._drivers,
            self._adapt_generation,
        )
        if (choice := self.draft_choice) != self._announced:
            log.warning("%s", choice)
            self._announced = choice
        self._runs.add(run)
        run.iteration.task = asyncio.current_task()
        try:
            async with aclosing(runner.stream(run, request, self.sessions)) as tokens:
                async for token in tokens:
                    yield token
                    run.iteration.task = asyncio.current_task()
        finally:
            self._runs.discard(run)
            run.iteration.ended.set()


async def _finish(run: Run) -> None:
    async for _ in run:
        pass


async def _no_tokens() -> AsyncGenerator[Token, None]:
    return
    yield
