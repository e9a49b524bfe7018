"""A toy swarm: real nodes, sessions, chains and clients, with a hash as the model and any network."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from tests.support.hasty_policy import HastyPolicy
from tests.support.toy_taps import ToyTapSpeculator, tap_states, toy_slice

from treeswarm.errors import MissingBlocks, Refused, SwarmError
from treeswarm.protocol.messages import NumericsClass
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.protocol.spans import Span
from treeswarm.protocol.tap_sums import TapSums
from treeswarm.protocol.text_rules import RulesRequest, TextRules
from treeswarm.session.grammars import GrammarLibrary
from treeswarm.session.session import incoming_rows
from treeswarm.session.walk import Walk
from treeswarm.topology.bans import BanList
from treeswarm.transport.memory import MemoryNetwork
from treeswarm_bench.fixed_size import FixedSizePolicy
from treeswarm_client.chain.chain import Chain, open_chain
from treeswarm_client.chain.options import Reservation
from treeswarm_client.chain.shared_prompt import PrefixScope, SharedPrompt
from treeswarm_client.chain.wait_events import OnWait
from treeswarm_client.discovery.route import ANY_TAIL, Hop, TailNeeds, Target
from treeswarm_client.drafters.seam import (
    UNANSWERED,
    Drafter,
    DraftTree,
    ProposalReceiver,
    ShouldStop,
    Verification,
    never_stop,
)
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.draft_rules import DraftRules
from treeswarm_client.generation.forced_runs import TextGrammar
from treeswarm_client.generation.loop import Generation, GenerationLimits
from treeswarm_client.generation.stats import StatsRecorder
from treeswarm_client.planner.policy import TreePolicy
from treeswarm_node.attention.metadata import Segment
from treeswarm_node.config import NodeLimits
from treeswarm_node.engine.engine import Engine
from treeswarm_node.engine.loaded_stage import LoadedStage
from treeswarm_node.engine.model_runner import Computed, score_rows
from treeswarm_node.engine.sampler import Sampler, best_logprobs, best_tokens
from treeswarm_node.engine.step_rules import GrammarThread
from treeswarm_node.engine.tap_slice import TapSlice, add_taps
from treeswarm_node.kv_cache.kv_store import KVStore, SessionKV
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.kv_cache.page_pool import PAGE
from treeswarm_node.model.loaded_span import ServedSpan
from treeswarm_node.sessions.server import NodeServer
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest, Speculator

VOCAB, STATE = 5, 16
CONTEXT = 256
NUMERICS = NumericsClass("toy", "float32")
BLOCKS = 4
GREEDY = SamplingSettings()
# The spans are of unequal lengths on purpose.
SPANS = [Span(0, 1), Span(1, 3), Span(3, 4)]


def mix(stage: int, context: Sequence[int], incoming: bytes) -> bytes:
    """Return one row of a stage's activations: any change of context or input changes all of it."""
    return hashlib.blake2b(bytes([stage, *context]) + incoming, digest_size=STATE).digest()


def toy_token(context: Sequence[int]) -> int:
    """Return the token that the whole model predicts after `context`."""
    state = b""
    for block in range(BLOCKS):
        state = mix(block, context, state)
    return state[0] % VOCAB


def toy_logits(states: Sequence[bytes]) -> torch.Tensor:
    """Return the logits that rules and sampling see, float32 [rows, VOCAB], by the last activations of each row.

    The largest one is that of the token which the model predicts.
    """
    noise = np.array([list(state[1 : 1 + VOCAB]) for state in states], np.float32).reshape(-1, VOCAB) / 128 - 1
    best = np.array([state[0] % VOCAB for state in states], np.int64)
    noise[np.arange(len(states)), best] = 1.25
    return torch.from_numpy(noise)


def context_logits(context: Sequence[int]) -> torch.Tensor:
    """Return the logits of the whole model after `context`, float32 [VOCAB]."""
    state = b""
    for block in range(BLOCKS):
        state = mix(block, context, state)
    return toy_logits([state])[0]


def plain_text(prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(toy_token(text))
    return text[len(prompt) :]


@dataclass
class ToyRunner:
    """Stores tokens where a KV cache stores rows, and hashes the tokens that each row sees."""

    blocks: int = 4
    tap_slice: TapSlice | None = None
    """The node's part of a head, or None for none."""
    sampler: Sampler = field(default_factory=lambda: Sampler(VOCAB))
    sums_sent: list[int] = field(default_factory=list)
    """Number of rows with sums of taps in each step that has any."""

    def run(self, segments: Sequence[Segment]) -> list[Computed]:
        return [self._step(segment) for segment in segments]

    def _step(self, segment: Segment) -> Computed:
        step, kv = segment.step, segment.kv
        kv.commit(step)
        assert not any(kv.store.pool.reference_count(row // PAGE) > 1 for row in kv.new_rows(step).tolist())
        kv.store.layers[0].keys[0, torch.from_numpy(kv.new_rows(step)), 0] = torch.from_numpy(step.tokens).float()
        trunk = self._read(kv, kv.trunk_rows(np.arange(step.trunk_length)))
        if step.append.prefill:
            contexts = [[*trunk, *step.tokens[: i + 1].tolist()] for i in range(step.rows)]
        else:
            # Slots fill from the lowest, so within one tree a parent's slot is below its child's.
            seen = [self._read(kv, kv.crown_rows(np.flatnonzero(step.visible[i]))) for i in range(step.rows)]
            contexts = [[*trunk, *above] for above in seen]
            assert [len(c) - 1 for c in contexts] == step.positions.tolist()
        sent = [step.append.hidden[i * STATE : (i + 1) * STATE] for i in incoming_rows(step)]
        states = [sent[i] if segment.span.start else b"" for i in range(len(contexts))]
        for block in range(segment.span.start, segment.span.end):
            states = [mix(block, context, state) for context, state in zip(contexts, states, strict=True)]
        taps = self.tap_slice.blocks_in(segment.span.start, segment.span.end) if self.tap_slice else ()
        if segment.span.end < self.blocks:
            return Computed(hidden=b"".join(states), tap_sums=self._tap_sums(segment, contexts, taps))
        scored = step.append.scored
        if segment.rules is not None or step.alternative_logprobs or len(scored) or not step.append.settings.greedy:
            result = self._sampled(segment, [states[i] for i in step.answered])
            scores = score_rows(toy_logits(states[: len(scored)]), scored.astype(np.int64), step.alternatives)
            return replace(result, scored=scores if len(scored) else None)
        tokens = np.array([states[i][0] % VOCAB for i in step.answered], np.int64)
        best = (tokens[:, None] + np.arange(step.alternatives)) % VOCAB
        return Computed(
            tokens=tokens,
            logprobs=np.zeros(len(tokens), np.float32),
            alternatives=best,
            states=self._kept_states(contexts, taps) if segment.speculates else None,
        )

    def _sampled(self, segment: Segment, states: Sequence[bytes]) -> Computed:
        """Choose tokens as a node does, under rules and with noise."""
        step, logits = segment.step, toy_logits(states)
        best = best_tokens(logits, step.alternatives) if step.alternatives else None
        try:
            edits = segment.rules.edits(step) if segment.rules is not None and states else None
        except Refused as error:
            return Computed(error=error)
        positions = step.positions[step.answered] + 1
        best_of = best_logprobs(logits, best) if best is not None and step.alternative_logprobs else None
        tokens, logprobs = self.sampler.choose(logits, positions, step.append.settings, edits)
        return Computed(tokens=tokens, logprobs=logprobs, alternatives=best, alternative_logprobs=best_of)

    def _kept_states(self, contexts: Sequence[Sequence[int]], taps: tuple[int, ...]) -> torch.Tensor:
        return context_states(contexts) if self.tap_slice is None else tap_states(taps, contexts)

    def _tap_sums(self, segment: Segment, contexts: Sequence[Sequence[int]], taps: tuple[int, ...]) -> TapSums | None:
        if self.tap_slice is None or segment.sums_from is None:
            return None
        sums = add_taps(self.tap_slice, segment.step, tap_states(taps, contexts), taps, segment.sums_from)
        self.sums_sent += [sums.count] if sums is not None else []
        return sums

    def _read(self, kv: SessionKV, rows: NDArray[np.int64]) -> list[int]:
        return [int(token) for token in kv.store.layers[0].keys[0, torch.from_numpy(rows), 0].tolist()]


@dataclass
class GuessingDrafter:
    """Drafts with the toy model's own token by chance (`luck`), and with random tokens otherwise; seeded."""

    seed: int
    luck: float = 0.7
    name: str = "guessing"
    alternatives: int = 2

    def begin(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self._text, self._random = list(prompt), np.random.default_rng(self.seed)

    def propose(self, size: int, depth: int, should_stop: ShouldStop = never_stop) -> DraftTree:
        parents: list[int] = []
        tokens: list[int] = []
        depths = {-1: 0}
        paths = {-1: list(self._text)}
        while len(tokens) < size:
            parent = (
                int(self._random.integers(-1, len(tokens))) if self._random.random() > self.luck else len(tokens) - 1
            )
            truth = self.truth(paths[parent])
            token = truth if self._random.random() < self.luck else int(self._random.integers(VOCAB))
            taken = any(p == parent and t == token for p, t in zip(parents, tokens, strict=True))
            if taken or depths[parent] >= depth:
                size -= 1
                continue
            node = len(tokens)
            parents.append(parent)
            tokens.append(token)
            depths[node], paths[node] = depths[parent] + 1, [*paths[parent], token]
        scores = -np.arange(len(tokens), dtype=np.float32)
        return DraftTree(np.array(parents, np.int64), np.array(tokens, np.int64), scores)

    def truth(self, path: Sequence[int]) -> int:
        """Return the model's own token after a path."""
        return toy_token(path)

    def observe(self, verification: Verification) -> None:
        answered = verification.answers != UNANSWERED
        assert verification.alternatives.shape == (len(verification.tree) + 1, self.alternatives)
        assert (verification.alternatives[answered, 0] == verification.answers[answered]).all()
        self._text += [*(int(verification.tree.tokens[i]) for i in verification.accepted), verification.bonus]


def context_states(contexts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return a state per row that holds its whole context: the number of tokens, and then the tokens."""
    longest = max(map(len, contexts), default=0)
    assert longest < CONTEXT
    return torch.tensor([[len(row), *row, *[0] * (CONTEXT - len(row))] for row in contexts]).reshape(-1, CONTEXT + 1)


@dataclass
class ToySpeculator:
    """Guesses with the toy model's own token by chance (`luck`).

    A row's state is its whole context, so that every row that is read can be checked.
    """

    luck: float = 0.8
    window: int = 64
    taps: tuple[int, ...] = (BLOCKS - 1,)
    name: str = "toy"
    agreement: float = 0.5
    rows_read: list[int] = field(default_factory=list)
    """Number of rows that each proposal read."""
    roots: list[list[int]] = field(default_factory=list)
    """Text up to the root of each proposal."""

    def new_memory(self) -> list[int]:
        return []

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        memory: list[int] = request.memory
        first = request.first_position
        self.rows_read.append(len(request.next_tokens))
        # The memory holds the position of every row that was read and still counts.
        del memory[next((i for i, position in enumerate(memory) if position >= first), len(memory)) :]
        assert not memory or memory[-1] + 1 == first, "a row was left out"
        memory += range(first, first + len(request.next_tokens))
        contexts = [row[1 : 1 + row[0]] for row in request.states.tolist()]
        for position, context in enumerate(contexts, first):
            assert len(context) == position + 1
        for context, token, longer in zip(contexts, request.next_tokens.tolist(), contexts[1:], strict=False):
            assert [*context, token] == longer
        text = [*contexts[-1], int(request.next_tokens[-1])]
        self.roots.append(text)
        random = np.random.default_rng(len(text))
        tokens: list[int] = []
        for node in range(min(request.size, 6)):
            truth = toy_token([*text, *tokens])
            tokens.append(truth if random.random() < self.luck else (truth + 1) % VOCAB)
            scores = -np.arange(node + 1, dtype=np.float32)
            yield SpeculatedTree(np.arange(-1, node), np.array(tokens, np.int64), scores)


@dataclass
class ToyRouter:
    """Routes over all nodes of the swarm, by the longest spans, and avoids nodes that failed."""

    swarm: "ToySwarm"
    bans: BanList = BanList()
    traversed: set[str] = field(default_factory=set)
    """Nodes that an answer has passed through."""
    forgetful: bool = False
    """Whether failures are ignored, as a planted mistake."""

    def route(
        self,
        blocks: Span,
        *,
        before: str | None,
        after: str | None,
        room: int,
        avoid: Collection[str],
        needs: TailNeeds = ANY_TAIL,
    ) -> list[Hop]:
        now = asyncio.get_running_loop().time()
        banned, last_resort = self.bans.banned(now), self.bans.last_resort(now)
        try:
            return self._longest(blocks, {*avoid, *banned})
        except MissingBlocks:
            return self._longest(blocks, {*avoid, *banned - last_resort})

    def _longest(self, blocks: Span, avoid: Collection[str]) -> list[Hop]:
        usable = [(address, span) for address, span in self.swarm.spans.items() if address not in avoid]
        hops: list[Hop] = []
        reached = blocks.start
        while reached < blocks.end:
            best = max(((s.end, a) for a, s in usable if s.start <= reached < s.end), default=None)
            if best is None:
                raise MissingBlocks(f"no node serves block {reached}")
            speculator = "toy" if best[1] in self.swarm.speculating and best[0] == BLOCKS else ""
            device = self.swarm.devices.get(best[1])
            part = device.tap_slice if device is not None else None
            head, taps = (part.head, part.taps) if part else ("", ())
            hops.append(Hop(best[1], best[1], Span(reached, min(best[0], blocks.end)), speculator, head, taps))
            reached = hops[-1].span.end
        return hops

    def has_spare(self, blocks: Span, *, avoid: Collection[str], needs: TailNeeds = ANY_TAIL) -> bool:
        try:
            self._longest(blocks, {*avoid, *self.bans.banned(asyncio.get_running_loop().time())})
        except MissingBlocks:
            return False
        return True

    def nodes_to_leave(
        self, hops: Sequence[Hop], *, room: int, trunk: int, rounds_left: float, needs: TailNeeds = ANY_TAIL
    ) -> Collection[str]:
        return ()

    def report_failure(self, node: str, error: SwarmError) -> None:
        if not self.forgetful:
            self.bans = self.bans.with_failure(node, asyncio.get_running_loop().time())

    def report_silence(self, node: str) -> None:
        pass

    def report_round_trip(self, node: str, round_trip_s: float) -> None:
        pass

    def report_traversal(self, nodes: Collection[str]) -> None:
        assert nodes
        self.traversed.update(nodes)

    async def wait_for_change(self, timeout_s: float) -> None:
        await asyncio.sleep(min(timeout_s, 1.0))


@dataclass
class ToySwarm:
    """Toy nodes on a network in memory."""

    network: MemoryNetwork
    limits: NodeLimits
    nodes: dict[str, NodeServer] = field(default_factory=dict)
    spans: dict[str, Span] = field(default_factory=dict)
    devices: dict[str, ToyRunner] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    """Tokens that the last generation committed, also if it failed."""
    traversals: int = 0
    """Number of traversals of the last generation."""
    recorder: StatsRecorder = field(default_factory=StatsRecorder)
    """Figures of the last generation."""
    chain: Chain | None = None
    speculator: Speculator | None = None
    """Speculator of every tail that is started, or None for none."""
    grammars: GrammarLibrary | None = None
    """What applies grammars at every node that is started, or None for nothing."""
    speculating: set[str] = field(default_factory=set)
    """Addresses of the nodes whose records say that they have a speculator."""
    _stops: dict[str, contextlib.AsyncExitStack] = field(default_factory=dict)

    async def start(self, span: Span, *, has_head: bool = True) -> str:
        """Start one more node and return its address.  It has its part of the tail's head, if that has parts."""
        stop = contextlib.AsyncExitStack()
        store = KVStore({0: KVShape(1, 1, 1)}, 4096, torch.float32, torch.device("cpu"))
        tapping = self.speculator if has_head and isinstance(self.speculator, ToyTapSpeculator) else None
        part = toy_slice(span, tapping.window) if tapping is not None else None
        device = ToyRunner(tap_slice=part)
        engine = Engine(device, self.limits.budget)
        served = ServedSpan(span, BLOCKS, VOCAB, 4, 2048, "toy", NUMERICS, "toy", STATE)
        transport = self.network.transport()
        speculator = self.speculator if span.end == BLOCKS else None
        grammars = None if self.grammars is None else GrammarThread(self.grammars)
        stage = LoadedStage(served, engine, store, 1.0, speculator=speculator, tap_slice=part, grammars=grammars)
        node = NodeServer(transport, self.limits, stage=stage, state=NodeState.ONLINE)
        listener = await transport.listen("127.0.0.1:0", node.accept)
        running = [asyncio.create_task(engine.run()), asyncio.create_task(node.sweep())]

        async def end() -> None:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

        if grammars is not None:
            stop.callback(grammars.close)
        stop.push_async_callback(end)
        stop.push_async_callback(listener.close)
        stop.push_async_callback(node.close)
        address = listener.address
        self.nodes[address], self.spans[address], self.devices[address] = node, span, device
        self._stops[address] = stop
        if speculator is not None:
            self.speculating.add(address)
        return address

    async def stop(self, address: str) -> None:
        """Stop a node in an orderly way."""
        self.spans.pop(address, None)
        await self._stops.pop(address).aclose()
        self.nodes.pop(address)

    async def stop_drained(self, address: str) -> None:
        """Stop a node that has been drained, as its program does."""
        await self._stops.pop(address).aclose()
        self.nodes.pop(address)

    async def kill(self, address: str) -> None:
        """Stop a node as if its machine lost power: it sends nothing more, and others may not notice for a while."""
        self.spans.pop(address)
        self.network.disconnect_host(address)
        node = self.nodes.pop(address)
        for hosted in list(node.sessions.values()):
            await hosted.free()
        await self._stops.pop(address).aclose()

    async def generate(
        self,
        prompt: Sequence[int],
        count: int,
        *,
        tree_size: int = 6,
        seed: int = 0,
        segment_rows: int = 4,
        patience_s: float = 0.0,
        forgetful: bool = False,
        shared: PrefixScope = "none",
        secret: bytes = b"s" * 16,
        on_wait: OnWait = lambda _: None,
        drafter: Drafter | None = None,
        policy: TreePolicy | None = None,
        rules: TextRules | None = None,
        settings: SamplingSettings = GREEDY,
        stop_ids: Collection[int] = (),
        grammar: TextGrammar | None = None,
        longest_run: int = 0,
    ) -> list[int]:
        """Run one generation.  What was committed before an error is in `self.kept`."""
        kept = self.kept = list[int]()
        target = Target(NUMERICS, BLOCKS, VOCAB, 4, 2048)
        room = Reservation(len(prompt) + count, tree_size + longest_run + 1)
        router = ToyRouter(self, forgetful=forgetful)
        drafter = drafter or GuessingDrafter(seed)
        async with open_chain(
            self.network.transport(),
            router,
            target,
            room,
            patience_s=patience_s,
            on_wait=on_wait,
            shared=SharedPrompt(prompt, shared, secret),
            alternatives=drafter.alternatives,
            proposal_nodes=drafter.proposal_nodes if isinstance(drafter, ProposalReceiver) else 0,
            rules=None if rules is None else RulesRequest(rules, len(prompt)),
        ) as chain:
            self.chain = chain
            builder = AppendBuilder(settings, segment_rows, chain.epoch.number, chain.epoch.prefix_rows)
            policy = policy or (HastyPolicy(tree_size) if tree_size else FixedSizePolicy(0))
            asked = None if rules is None else DraftRules(RulesRequest(rules, len(prompt)), list(prompt))
            generation = Generation(
                chain=chain, drafter=drafter, builder=builder, policy=policy, rules=asked, grammar=grammar,
                longest_run=longest_run, limits=GenerationLimits(count, frozenset(stop_ids)),
            )  # fmt: skip
            self.recorder = generation.recorder
            async for news in generation.rounds(prompt, settings):
                kept += news.tokens
                self.traversals = news.traversal
        return kept

    def check_idle(self) -> None:
        """Check that nothing is left of any session."""
        for node in self.nodes.values():
            assert not node.sessions
            assert node.stage is not None
            node.stage.store.check()
            assert node.stage.store.free_tokens == 4096
            kept = node.stage.store.prefixes
            assert kept.idle_pages == len(kept.pages)
            kept.clear()
            assert node.stage.store.pool.available * PAGE == 4096
            assert node.sessions.replay_logs.used_bytes == 0


@contextlib.asynccontextmanager
async def toy_swarm(
    network: MemoryNetwork,
    limits: NodeLimits | None = None,
    spans: Sequence[Span] = SPANS,
    speculator: Speculator | None = None,
    grammars: GrammarLibrary | None = None,
) -> AsyncIterator[ToySwarm]:
    """Start toy nodes; stop them on leaving the context."""
    swarm = ToySwarm(network, limits or NodeLimits(), speculator=speculator, grammars=grammars)
    for span in spans:
        await swarm.start(span)
    try:
        yield swarm
    finally:
        for address in list(swarm.nodes):
            await swarm.stop(address)


__all__ = ["GuessingDrafter", "ToySpeculator", "ToySwarm", "Walk", "plain_text", "toy_swarm"]
