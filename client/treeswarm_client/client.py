"""The library: a client of a swarm, asyncio inside, a thin synchronous face outside."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tokenizers import Tokenizer

from treeswarm.errors import BadRequest, RouteError, TooLong
from treeswarm.identity import config_digest
from treeswarm.model_files import HubOptions, ModelShape, load_tokenizer, read_config, read_shape, resolve_model
from treeswarm.protocol.messages import MAX_ROWS, SEGMENT_BYTES, Description
from treeswarm.protocol.prefix import SCOPE_BYTES
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.registry import Registry, client_registry, registry_kind
from treeswarm.registry.peers import PeersRegistry
from treeswarm.registry.seam import Snapshot
from treeswarm.tasks import cancelled
from treeswarm.transport.emulated import EmulatedTransport, LinkShape
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import Transport
from treeswarm.transport.tls import Security
from treeswarm_client.chain.chain import open_chain
from treeswarm_client.chain.options import Reservation
from treeswarm_client.chain.shared_prompt import PrefixScope, SharedPrompt, check_scope
from treeswarm_client.chain.wait_events import OnWait
from treeswarm_client.chat_template import ChatTemplate, MessageDict, load_chat_template
from treeswarm_client.discovery.describe import describe_all
from treeswarm_client.discovery.overview import ModelFilter, Overview
from treeswarm_client.discovery.prober import Prober
from treeswarm_client.discovery.route import Target
from treeswarm_client.discovery.swarm_view import SwarmView, choose_target
from treeswarm_client.drafters import load_drafter
from treeswarm_client.drafters.seam import Drafter
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.drafter_pool import MOST_GENERATIONS, DrafterPool
from treeswarm_client.generation.loop import Generation, GenerationLimits
from treeswarm_client.generation.run import Request, Run, Token, TreeSize
from treeswarm_client.generation.text_stream import StopText, TextStream
from treeswarm_client.planner.policy import LARGEST, AutoPolicy, Round

log = logging.getLogger(__name__)

LARGEST_TREE = 2048
# A volunteer who restarts a node, or another one who joins, takes about so long to serve.
DEFAULT_PATIENCE_S = 30.0
# Records take one poll of the DHT, three seconds, from node to node.
FIRST_TARGET_S = 5.0
LOOK_AGAIN_S = 0.2
# A drafter's forward is not left before it is done.
LEAVE_S = 10.0


@dataclass(frozen=True, eq=False)
class _Opened:
    """What entering the client found."""

    shape: ModelShape
    config: str
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    drafters: DrafterPool
    transport: Transport
    folder: Path


@dataclass(eq=False)
class SwarmClient:
    """A client of the nodes at `peers` that serve `model`.

        async with SwarmClient(model="demo", peers="127.0.0.1:4001,127.0.0.1:4002", draft="demo-draft") as client:
            async for token in client.stream("def main():"):
                print(token.text, end="")

    A peer is `HOST:PORT`, or `HOST:PORT#PIN` as its ready line shows it: then nobody else may answer there.  `model` is
    a directory, a hub id or `demo`; only its config and tokenizer are read.  `draft` is `auto`, `ngram`, `none`, or a
    draft model (a directory, a hub id or `demo-draft`), with `+ngram` behind it both.  Entering raises what is wrong
    with the model, the draft, the addresses or the nodes (ModelError, Mismatch, BadRequest, RouteError, Unreachable).
    Several generations may run at once; with a drafter that cannot be copied they take turns.
    """

    model: str
    peers: str | None = None
    registry: str | None = None
    draft: str = "auto"
    tree_size: TreeSize = "auto"
    """Drafted nodes a traversal; 0 is plain decoding; `auto`: what brings most tokens a second, round by round."""
    draft_device: str = "cpu"
    emulate_link: str | None = None
    drafter: Drafter | None = None
    """A drafter of one's own, instead of `draft`."""
    swarm_key: bytes | None = field(default=None, repr=False)
    """Of a private swarm, as `treeswarm.keys.read_swarm_key` reads it."""
    transport: Transport | None = None
    """Instead of gRPC with TLS; stays open afterwards."""
    dtype: str | None = None
    """Only nodes that compute in it; None: whichever class has most nodes."""
    quantization: str | None = None
    """Only nodes whose weights are so: `none`, `int8`, `nf4`; None: as above."""
    patience: float = DEFAULT_PATIENCE_S
    """Seconds a generation waits for nodes to appear where no chain can be made, before it ends."""
    on_wait: OnWait = lambda _: None
    """Told while a generation waits so: why, and how long it still does."""
    prefix_scope: PrefixScope = "client"
    """With whom nodes may share the KV of a prompt's beginning: `client`, this one's own generations; `swarm`, whoever
    sends the same prompt, who can then tell that somebody did, and whose nodes must be trusted to have computed it;
    `none`."""
    hub: HubOptions = HubOptions()
    """Where and how a model named by a hub id is found."""
    concurrency: int = MOST_GENERATIONS
    """Generations at once; more wait for their turn."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds; what a generation's times are read from."""
    target: Target = field(init=False)
    """The model as the nodes serve it."""
    view: SwarmView = field(init=False)
    """Who is out there, as this client sees it."""
    _opened: _Opened = field(init=False)
    _leave: AsyncExitStack = field(default_factory=AsyncExitStack)
    _secret: bytes = field(default_factory=lambda: secrets.token_bytes(SCOPE_BYTES), repr=False)
    """Who knows it could share this client's prefixes."""
    _runs: set[Run] = field(default_factory=set)
    """Generations under way."""

    async def __aenter__(self) -> Self:
        largest = _largest_of(self.tree_size)
        check_scope(self.prefix_scope)
        if self.concurrency < 1:
            raise BadRequest(f"concurrency is {self.concurrency}: give at least 1")
        spec = registry_spec(self.peers, self.registry)
        async with AsyncExitStack() as undo:
            self._opened = await asyncio.to_thread(self._open)
            undo.push_async_callback(self._close_transport)
            registry = await client_registry(spec, self._model_of(spec), self._opened.transport)
            undo.push_async_callback(registry.close)
            self.target, snapshot = await self._first_target(registry, spec)
            dials = registry.dial_addresses if isinstance(registry, PeersRegistry) else {}
            self.view = SwarmView(registry, self.target, largest + 1, dials, snapshot)
            watching = asyncio.create_task(self.view.watch())
            undo.push_async_callback(cancelled, watching)
            self._leave = undo.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await asyncio.gather(*(run.end(LEAVE_S) for run in list(self._runs)))
        finally:
            await self._leave.aclose()

    @property
    def addresses(self) -> list[str]:
        """Of all nodes known, in the order of their blocks."""
        known = sorted(self.view.snapshot, key=lambda sealed: sealed.record.span)
        return [self.view.dials.get(s.record.node) or s.record.dial for s in known]

    async def describe_nodes(self, addresses: Sequence[str] | None = None) -> dict[str, Description]:
        """Ask nodes (by default, all known) how busy they are.  Raises why, if none answers."""
        return await describe_all(self._opened.transport, self.addresses if addresses is None else addresses)

    async def overview(self) -> Overview:
        """The swarm of this model as it is now: blocks, gaps, nodes, and how far each is from here."""
        return await self.prober().fresh_overview()

    def prober(self) -> Prober:
        """For whoever looks at the swarm again and again: it remembers who answered, and asks nobody too often."""
        wanted = ModelFilter(self.model, self._opened.config, self._opened.shape.blocks)
        return Prober(self.view.registry, self._opened.transport, wanted)

    @property
    def folder(self) -> Path:
        """Where the model's config and tokenizer are."""
        return self._opened.folder

    def use_drafter(self, drafter: Drafter) -> None:
        """Draft with this one from the next generation on."""
        self._opened = replace(self._opened, drafters=DrafterPool(drafter, self.concurrency))

    def encode(self, prompt: str) -> list[int]:
        """The prompt's token ids, special tokens as the tokenizer adds them.  Raises BadRequest for what is no text."""
        return self._ids(prompt, special=True)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self._opened.tokenizer.decode(list(token_ids), skip_special_tokens=False))

    def encode_chat(self, messages: Sequence[MessageDict]) -> list[int]:
        """Token ids of a conversation as the model's chat template writes it, up to where its answer begins.  Raises
        BadRequest where there is no template or it refuses the messages."""
        if self._opened.chat is None:
            raise BadRequest(f"'{self.model}' has no chat template: it only continues texts, as `swarm generate` does")
        return self._ids(self._opened.chat.render(messages), special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        try:
            return list(self._opened.tokenizer.encode(text, add_special_tokens=special).ids)
        except (TypeError, UnicodeError):  # half of a surrogate pair, as JSON may bring it
            raise BadRequest("the text has characters that are none (lone surrogates): send proper Unicode") from None

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
        altered: Callable[[Generation], Generation] | None = None,
    ) -> Run:
        """Generate: an asynchronous iterator of Tokens that also keeps text, ids and statistics.

        `prompt` is text or token ids; `sample` numbers several samples of one prompt and seed.  It ends at the model's
        own end tokens (but for `ignore_eos`), at `stop_token_ids` and before any text of `stop`.  `on_round` is told of
        every tree that came back.  Its prompt's beginning is shared with those of the same `prefix_secret` (16 bytes;
        by default, this client's).  `altered` takes the
        loop about to begin and gives the one to run instead, such as one of another pace; it may ship `tree_size` nodes
        at most.  Raises BadRequest at once for what can't be; while iterating NodeLost, Refused and the other
        SwarmErrors.
        """
        settings = SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, sample=sample)
        prompt_ids = self.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        self._check(prompt_ids, max_new_tokens)
        tree_size = self.tree_size if tree_size is None else tree_size
        _largest_of(tree_size)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise BadRequest("a stop string is empty: leave it out")
        ends = frozenset(stop_token_ids) | (frozenset() if ignore_eos else self._opened.shape.eos_ids)
        run = Run(tokens=_nothing(), prompt_ids=prompt_ids)
        request = Request(
            settings,
            GenerationLimits(max_new_tokens, ends),
            stops,
            tree_size,
            on_round,
            prefix_secret or self._secret,
            altered,
        )
        run.tokens = self._generate(run, request)
        return run

    async def generate(self, prompt: str | Sequence[int], **options: Any) -> Run:
        """The whole generation at once; options as `stream`'s."""
        run = self.stream(prompt, **options)
        async for _ in run:
            pass
        return run

    async def generate_many(self, prompt: str | Sequence[int], *, n: int, sample: int = 0, **options: Any) -> list[Run]:
        """`n` samples of one prompt, side by side: run i is what `generate` gives with the sample index `sample` + i.

        The prompt is prefilled once, and the nodes share its KV among the samples.  Options as `stream`'s; raises what
        `generate` does, and then ends all of them.
        """
        if n < 1:
            raise BadRequest(f"{n} samples were asked for: ask for at least 1")
        runs = [self.stream(prompt, sample=sample + i, **options) for i in range(n)]
        await anext(runs[0].tokens, None)  # the prompt has passed all nodes: the others begin on it
        ends = [asyncio.create_task(_finish(run)) for run in runs]
        try:
            await asyncio.gather(*ends)
        finally:
            for end in ends:
                end.cancel()
            await asyncio.wait(ends)
        return runs

    async def _generate(self, run: Run, request: Request) -> AsyncGenerator[Token, None]:
        """Known to the client as long as it lasts, so that leaving the client ends it."""
        self._runs.add(run)
        run.iteration.task = asyncio.current_task()
        try:
            async with aclosing(self._tokens(run, request)) as tokens:
                async for token in tokens:
                    yield token
                    run.iteration.task = asyncio.current_task()
        finally:
            self._runs.discard(run)
            run.iteration.ended.set()

    async def _tokens(self, run: Run, request: Request) -> AsyncGenerator[Token, None]:
        text, stop = TextStream(self._opened.tokenizer, run.prompt_ids), StopText(request.stops)
        start = self.clock()
        settings, limits, tree_size = request.settings, request.limits, request.tree_size
        largest = _largest_of(tree_size)
        async with (
            self._opened.drafters.borrow() as pooled,
            open_chain(
                self._opened.transport,
                self.view,
                self.target,
                Reservation(len(run.prompt_ids) + limits.max_new_tokens, largest + 1),
                patience_s=self.patience,
                shared=SharedPrompt(run.prompt_ids, self.prefix_scope, request.prefix_secret),
                alternatives=pooled.drafter.alternatives if largest else 0,
                on_wait=self.on_wait,
            ) as chain,
            AsyncExitStack() as undo,
        ):
            builder = AppendBuilder(settings, self._segment_rows(), chain.epoch.number, chain.epoch.prefix_rows)
            run.chain, run.prefix_tokens = chain, chain.epoch.prefix_rows
            policy = AutoPolicy(
                pooled.memory,
                self.target.row_bytes,
                builder.segment_rows,
                largest,
                fixed_size=None if tree_size == "auto" else tree_size,
                clock=self.clock,
            )
            generation = Generation(
                chain=chain,
                drafter=pooled.drafter,
                builder=builder,
                limits=limits,
                policy=policy,
                recorder=run.recorder,
                on_round=request.on_round,
                clock=self.clock,
            )
            generation = request.altered(generation) if request.altered else generation
            rounds = await undo.enter_async_context(aclosing(generation.rounds(run.prompt_ids, settings)))
            try:
                async for news in rounds:
                    left = len(news.tokens)
                    for token, logprob in zip(news.tokens, news.logprobs, strict=True):
                        left -= 1
                        piece = stop.add(text.add(token))
                        if stop.hit is not None:
                            run.finish_reason = "stop"
                        elif news.finish is not None and not left:
                            piece += stop.flush()
                            run.finish_reason = news.finish
                        run.first_token_s = run.first_token_s or self.clock() - start
                        run.token_ids.append(token)
                        run.logprobs.append(logprob)
                        run.text += piece
                        following = 0 if stop.hit is not None else left
                        yield Token(token, piece, logprob, news.traversal, following)
                        if stop.hit is not None:
                            return
            finally:
                run.stats = run.recorder.summary(self.clock() - start)

    def _open(self) -> _Opened:
        folder = resolve_model(self.model, hub=self.hub)
        draft = "none" if self.tree_size == 0 else self.draft
        drafter = self.drafter or load_drafter(draft, folder, self.draft_device, hub=self.hub.for_another_model())
        transport: Transport = self.transport or GrpcTransport(security=Security(swarm_key=self.swarm_key))
        if self.emulate_link:
            transport = EmulatedTransport(transport, LinkShape.parse(self.emulate_link))
        return _Opened(
            read_shape(folder),
            config_digest(read_config(folder)),
            load_tokenizer(folder),
            load_chat_template(folder),
            DrafterPool(drafter, self.concurrency),
            transport,
            folder,
        )

    def _check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        if not prompt:
            raise BadRequest("the prompt is empty: give some text to continue")
        if max_new_tokens < 1:
            raise BadRequest(f"max_new_tokens is {max_new_tokens}: give at least 1")
        if any(not 0 <= token < self.target.vocab_size for token in prompt):
            raise BadRequest(f"the prompt has token ids outside the vocabulary of {self.target.vocab_size}")
        if (total := len(prompt) + max_new_tokens) > self.target.max_positions:
            raise TooLong(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones are {total}, the model's context is "
                f"{self.target.max_positions}: shorten the prompt or ask for fewer new tokens"
            )

    def _segment_rows(self) -> int:
        return max(1, min(MAX_ROWS, SEGMENT_BYTES // self.target.row_bytes))

    def _model_of(self, spec: str) -> str | None:
        """Records of other models are refused, but for nodes named one by one: of those a user must hear why."""
        return None if registry_kind(spec) == "static" else self._opened.config

    async def _first_target(self, registry: Registry, spec: str) -> tuple[Target, Snapshot]:
        """Nodes may be about to serve, or known to whom we ask in a moment; those named one by one have spoken."""
        patience_s = 0.0 if registry_kind(spec) == "static" else min(self.patience, FIRST_TARGET_S)
        end = asyncio.get_running_loop().time() + patience_s
        while True:
            snapshot = await registry.snapshot()
            try:
                target = choose_target(
                    snapshot,
                    self._opened.config,
                    self._opened.shape,
                    dtype=self.dtype,
                    quantization=self.quantization,
                )
                return target, snapshot
            except RouteError:
                if asyncio.get_running_loop().time() > end:
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _close_transport(self) -> None:
        if self.transport is None:
            await self._opened.transport.close()


def _largest_of(tree_size: TreeSize) -> int:
    """The most nodes of a tree.  Raises BadRequest."""
    if tree_size == "auto":
        return LARGEST
    if not isinstance(tree_size, int) or not 0 <= tree_size <= LARGEST_TREE:
        raise BadRequest(
            f"tree size {tree_size} is out of range: give auto, 0 (plain decoding), or up to {LARGEST_TREE}"
        )
    return tree_size


def registry_spec(peers: str | None, registry: str | None) -> str:
    """`--peers` is short for `--registry static:…`.  Raises BadRequest unless exactly one is given."""
    if (peers is None) == (registry is None):
        raise BadRequest("say where the nodes are: --peers HOST:PORT,HOST:PORT or --registry HOST:PORT of any node")
    return registry if registry is not None else f"static:{peers}"


async def _finish(run: Run) -> None:
    async for _ in run:
        pass


async def _nothing() -> AsyncGenerator[Token, None]:
    return
    yield
