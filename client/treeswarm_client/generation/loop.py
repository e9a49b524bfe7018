"""The generation loop: draft a tree, ship it, walk the target's answers, commit the tokens.

Every round ships the bonus token of the last one, which is mandatory, and the draft tree below it.  While the tree is
in flight, the drafter goes on: it makes the same tree wider and deeper, and some of the new nodes are shipped after it.

The drafter's work is a queue in a thread.  A round waits for its draft only as long as the policy says.  If the draft
is not ready by then, as on a machine that other programs keep busy, the round leaves without it, and the nodes follow.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from treeswarm.errors import BadRequest, Malformed
from treeswarm.protocol.messages import NO_TOKEN, Answer, Proposal
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.walk import Walk
from treeswarm_client.chain.chain import Chain
from treeswarm_client.chain.in_flight import Interrupted
from treeswarm_client.drafters.seam import (
    NO_TREE,
    Drafter,
    DraftTree,
    ObeysRules,
    ProposalReceiver,
    ShouldStop,
    Verification,
)
from treeswarm_client.generation.append_builder import AppendBuilder, Shipment
from treeswarm_client.generation.draft_rules import DraftRules
from treeswarm_client.generation.forced_runs import (
    LONGEST_RUN,
    TextGrammar,
    after_run,
    as_verification,
    below_run,
    check_tokens,
    obedient_tree,
    walk_after_run,
)
from treeswarm_client.generation.round_in_flight import RoundInFlight
from treeswarm_client.generation.stats import StatsRecorder
from treeswarm_client.generation.token_logprobs import LogprobWishes, TokenLogprobs, TopLogprobs
from treeswarm_client.planner.policy import Round, TreePolicy

T = TypeVar("T")

# Seconds of drafting in flight after which the new nodes may be shipped: about a forward of a small draft model on a
# CPU.  One more message costs every node of the chain about as much.
STRIDE_S = 0.005


FinishReason = Literal["stop", "length"]
PendingAnswers = deque["asyncio.Future[Answer]"]


@dataclass(frozen=True)
class GenerationLimits:
    """When a generation ends."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    """Ids of the tokens that end a generation."""


@dataclass(frozen=True)
class Committed:
    """The tokens that one traversal brought."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """The model's own log-probability of each token."""
    traversal: int
    """Number of the traversal, from 1 for the prompt's."""
    finish: FinishReason | None
    """Why the generation ends with these tokens, or None if it goes on."""
    top: tuple[TopLogprobs, ...] = ()
    """The likeliest tokens at the place of each, or empty if they were not asked for."""


@dataclass(frozen=True, eq=False)
class TimedTree:
    """A tree that a drafter proposed, and what that took."""

    tree: DraftTree
    seconds: float


@dataclass(eq=False)
class _Stride:
    """Tells the drafter when to pause while a tree is in flight: after STRIDE_S, or when the walk is over."""

    clock: Callable[[], float]
    walk_is_over: threading.Event
    ended: bool = False
    """Whether the drafter was told to stop; otherwise it had no more nodes to draft."""
    until: float | None = None
    """Time to stop, or None before the drafter first asks.  The time counts from then, because its thread may start
    late."""

    def __call__(self, _promise: float) -> bool:
        now = self.clock()
        self.until = now + STRIDE_S if self.until is None else self.until
        self.ended = self.ended or self.walk_is_over.is_set() or now > self.until
        return self.ended


@dataclass(eq=False, kw_only=True)
class Generation:
    """Generates from one prompt on one chain."""

    chain: Chain
    drafter: Drafter
    builder: AppendBuilder
    limits: GenerationLimits
    policy: TreePolicy
    recorder: StatsRecorder = field(default_factory=StatsRecorder)
    grammar: TextGrammar | None = None
    """The grammar that the text follows, or None for none."""
    longest_run: int = LONGEST_RUN
    """Most nodes of a forced run."""
    on_round: Callable[[Round], None] | None = None
    """Called with every round that came back."""
    rules: DraftRules | None = None
    """Rules that the drafts obey, with the prompt as their text, or None for none."""
    wishes: LogprobWishes = LogprobWishes()
    prompt_scores: dict[int, TokenLogprobs] = field(default_factory=dict)
    """What the model thought of the prompt's tokens, by position, if that is asked for."""
    clock: Callable[[], float] = time.perf_counter
    _drafter_work: "asyncio.Task[Any]" = field(init=False)
    """Task that ends when all of the drafter's work queued so far is done, in the order in which it was queued."""
    _late_draft: "asyncio.Task[TimedTree] | None" = None
    """Task that drafts for the present round and was not waited for any longer, or None."""
    _overdue: "asyncio.Task[TimedTree] | None" = None
    """The last draft that a round did not wait for.  As long as it is not done, no round waits for another one."""
    _has_draft: bool = False
    """Whether the draft of the present round was ready before it left."""
    _shipping: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while an extension is shipped: a walk is not over in the middle of that."""
    _root: tuple[int, int] | None = None
    """Id of the last walk's last node and the bonus token after it, below which the tail may propose a tree."""
    _received: tuple[int, int] | None = None
    """The one of these whose proposal the drafter has."""
    _cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when the generation is cancelled: the drafter may stop."""
    _generated: list[int] = field(default_factory=list)
    """Tokens after the prompt, the bonus token of the last walk included."""
    _run: tuple[int, ...] = ()
    """The forced run of the present round, at whose end the drafter's context ends."""

    async def rounds(
        self, prompt: Sequence[int], settings: SamplingSettings, generated: Sequence[int] = ()
    ) -> AsyncGenerator[Committed, None]:
        """Yield what each traversal commits, until a stop token or the limit.  Raises SwarmErrors.

        `generated` is the end of the prompt that counts as output.
        """
        self._generated = list(generated)
        self.policy.begin(self.chain.epoch.profiled_hops)
        before = len(prompt) - self.recorder.committed  # a driver may have committed a part of the prompt
        self._drafter_work = asyncio.create_task(self._in_thread(self._begin_drafter, prompt, settings))
        try:
            flight, walk = await self._traverse(self.builder.prefill(prompt))
            committed = await self._commit(flight, walk)
            yield committed
            while committed.finish is None:
                self._check_bonus(walk)
                self._root = (self.builder.end, walk.bonus)
                await self._find_run()
                tree = await self._draft()
                shipment = self.builder.round(walk.bonus, below_run(self._run, tree))
                flight, walk = await self._traverse(shipment)
                committed = await self._commit(flight, walk)
                yield committed
                self.chain.reroute_if_faster(trunk=before + self.recorder.committed, rounds_left=self._rounds_left())
        finally:
            self._cancelled.set()
            if self._proposal_receiver is not None:
                self.chain.proposals.close()
            await self._drafter_work

    # ---------------------------------------------------------------- draft

    async def _find_run(self) -> None:
        """Find the tokens that must follow the text, which travel whatever is drafted, and drafts go on below them."""
        self._run = ()
        most = min(self._levels_left(), self.longest_run, self.chain.epoch.credit_rows - 1)
        if self.grammar is None or most <= 0:
            return
        self._run = tuple(await asyncio.to_thread(self.grammar.forced_run, list(self._generated), most))
        for token in self._run:
            self._queue(self._observe, as_verification(token))

    async def _draft(self) -> DraftTree:
        """Draft the tree to ship first, no deeper than what may still be committed.

        Where nothing is drafted, the round does not wait until the drafter has learned from the last one.
        """
        room = self.chain.epoch.credit_rows - 1 - len(self._run)
        size = min(self.policy.nodes_to_draft(), room) if self._levels_left() else 0
        if not size:
            self._has_draft = False
            return self.policy.choose(NO_TREE)
        start = self.clock()
        must_stop = self.policy.stop_drafting()
        if self._overdue is not None and not self._overdue.done():
            self._has_draft = True  # nothing new is drafted for this round
            return self.policy.choose(NO_TREE, is_late=True)
        drafting = self._queue_proposal(
            size, self._levels_left(), lambda promise: must_stop(promise) or self._cancelled.is_set(), waits=True
        )
        await asyncio.wait({drafting}, timeout=self.policy.longest_wait_s())
        self.recorder.draft_s += self.clock() - start
        self._has_draft = drafting.done()
        if self._has_draft:
            return self.policy.choose(drafting.result().tree)
        self._late_draft = self._overdue = drafting
        return self.policy.choose(NO_TREE, is_late=True)

    def _begin_drafter(self, prompt: Sequence[int], settings: SamplingSettings) -> None:
        if isinstance(self.drafter, ObeysRules):
            self.drafter.obey(self.rules)
        self.drafter.begin(prompt, settings)

    def _observe(self, verification: Verification) -> None:
        """Let the drafter and its rules learn what came back, in the drafter's thread."""
        if self.rules is not None:
            accepted = verification.tree.tokens[list(verification.accepted)].tolist()
            self.rules.text += [*accepted, verification.bonus]
        self.drafter.observe(verification)

    def _propose(self, text: Sequence[int], size: int, depth: int, should_stop: ShouldStop) -> TimedTree:
        """Draft below a generated text in the drafter's thread."""
        start = self.clock()
        tree = self.drafter.propose(size, depth, should_stop)
        if self.grammar is not None and len(tree):
            tree = obedient_tree(self.grammar, text, tree, depth).best(size)
        return TimedTree(tree, self.clock() - start)

    @contextlib.asynccontextmanager
    async def _drafting_task(self, flight: RoundInFlight, pending: PendingAnswers) -> AsyncGenerator[None, None]:
        """Draft the tree in flight further in a task, as long as the context lasts.

        At its end, do not wait for the drafter: it is in the middle of a forward, and the next round may leave without
        its draft.
        """
        late, self._late_draft = self._late_draft, None
        size = 0 if flight.shipment.draft is None else self.policy.nodes_to_draft_in_flight()
        if late is None and not size:
            yield
            return
        walk_is_over = threading.Event()
        task = asyncio.create_task(self._draft_in_flight(flight, pending, size, late, walk_is_over))
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # raised by the queue's next job
        try:
            yield
        finally:
            walk_is_over.set()
            async with self._shipping:
                pass
            # If the chain broke meanwhile, the next append raises Interrupted again.
            if task.done():
                with contextlib.suppress(Interrupted):
                    task.result()

    async def _draft_in_flight(
        self,
        flight: RoundInFlight,
        pending: PendingAnswers,
        size: int,
        late: "asyncio.Task[TimedTree] | None",
        walk_is_over: threading.Event,
    ) -> None:
        """Draft the tree in flight further, up to `size` nodes, and ship those that are worth it.

        `late` is the round's own draft, if the round left without it.  Raises Interrupted.
        """
        start = self.clock()
        is_first, is_complete = late is not None or not self._has_draft, False
        while not is_complete and not walk_is_over.is_set():
            stride = _Stride(self.clock, walk_is_over)
            drafted = await (late or self._queue_proposal(size, self._levels_left(), stride, waits=False))
            is_complete = not stride.ended if late is None else not size
            late = None
            if is_first and len(drafted.tree):
                self.policy.record_draft(drafted.tree, drafted.seconds)
                is_first = False
            # Once answers come, the walk may have left the branches that the drafter thinks best, so nothing is
            # shipped.
            if not flight.answered:
                await self._ship_extension(flight, pending, drafted.tree, start, walk_is_over)

    async def _ship_extension(
        self,
        flight: RoundInFlight,
        pending: PendingAnswers,
        wider: DraftTree,
        departed: float,
        walk_is_over: threading.Event,
    ) -> None:
        """Ship the nodes of `wider` that are worth an append of their own.  Raises Interrupted."""
        async with self._shipping:
            if walk_is_over.is_set():
                return
            extended = self.policy.extension(flight.draft, wider, self.clock() - departed)
            if 0 < len(extended) - len(flight.draft) <= self.chain.epoch.free_credit_rows:
                extension = self.builder.extend(flight.shipment, below_run(flight.run, extended))
                answers = [await self.chain.append(append) for append in extension.appends]
                # After the appends are sent: a walk that leads into these nodes then finds the answers to wait for.
                flight.extend(extension)
                pending.extend(answers)

    def _queue_proposal(
        self, size: int, depth: int, should_stop: ShouldStop, *, waits: bool
    ) -> "asyncio.Task[TimedTree]":
        """Queue a proposal of the drafter, which first receives what the tail proposed below the same root.

        With `waits`, that is waited for as long as it usually takes, if it has not come yet.
        """
        before, root, forced = self._drafter_work, self._root, self._run
        text = [*self._generated, *forced] if self.grammar is not None else []

        async def run() -> TimedTree:
            await before
            await self._receive_proposal(root, forced, waits=waits)
            return await self._in_thread(self._propose, text, size, depth, should_stop)

        task = asyncio.create_task(run())
        self._drafter_work = task
        return task

    async def _receive_proposal(self, root: tuple[int, int] | None, forced: Sequence[int], *, waits: bool) -> None:
        """Give the drafter what the tail proposes below `root`, from the end of a forced run on, if that has come."""
        receiver, chain = self._proposal_receiver, self.chain
        if receiver is None or root is None or root == self._received or not chain.proposes:
            return
        interrupted = chain.epoch.in_flight.interrupted
        proposal = await chain.proposals.wait(*root, interrupted) if waits else chain.proposals.get(*root)
        if proposal is not None:
            self._received = root
            self.recorder.proposals += 1
            await self._in_thread(receiver.receive, after_run(forced, proposed_tree(proposal)))

    @property
    def _proposal_receiver(self) -> ProposalReceiver | None:
        """The drafter, if it uses what the tail proposes."""
        drafter = self.drafter
        return drafter if isinstance(drafter, ProposalReceiver) and drafter.proposal_nodes else None

    def _queue(self, job: Callable[..., T], *args: Any) -> "asyncio.Task[T]":
        """Run a job of the drafter in a thread after all that were queued before."""
        before = self._drafter_work

        async def run() -> T:
            await before
            return await self._in_thread(job, *args)

        task = asyncio.create_task(run())
        self._drafter_work = task
        return task

    async def _in_thread(self, job: Callable[..., T], *args: Any) -> T:
        """Run in a worker thread.  Even when cancelled, wait for it: the next generation may reuse this drafter."""
        running = asyncio.ensure_future(asyncio.to_thread(job, *args))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            self._cancelled.set()
            await asyncio.wait({running})
            raise

    def _levels_left(self) -> int:
        """Return the number of levels below the mandatory tokens that the limit of tokens still allows."""
        if self._run and self._run[-1] in self.limits.stop_ids:
            return 0
        return self.limits.max_new_tokens - self.recorder.committed - 1 - len(self._run)

    # ---------------------------------------------------------------- ship and walk

    async def _traverse(self, shipment: Shipment) -> tuple[RoundInFlight, Walk]:
        """Ship, walk and learn.  The chain is repaired, and the shipment sent again, as often as the chain breaks."""
        first_nodes = 0 if shipment.draft is None else len(shipment.draft) - len(self._run)
        start = self.clock()
        broken_at: float | None = None
        flight = RoundInFlight(shipment, self._run)
        while True:
            try:
                walk, first_s = await self.send_and_walk(flight)
                await self._check_walk(flight, walk)
                break
            except Interrupted:
                broken_at = broken_at or self.clock()
                trunk, tip = self.builder.resumption(self.chain.epoch.answered)
                await self.chain.repair(trunk, tip)
                self.policy.begin(self.chain.epoch.profiled_hops)
                shipment = self.builder.ship_again(flight.shipment, self.chain.epoch.number)
                flight = RoundInFlight(shipment, self._run)
        seconds = self.clock() - start
        self.recorder.add_traversal(seconds, flight.timings)
        if broken_at is None:
            self.chain.record_traversal(seconds)
        else:
            self.recorder.recoveries.append((broken_at, self.clock()))
        self._learn(flight, walk, first_nodes, seconds, first_s, unbroken=broken_at is None)
        return flight, walk

    async def send_and_walk(self, flight: RoundInFlight) -> tuple[Walk, float]:
        """Send the appends and take answers as they come until the walk is over, drafting meanwhile.

        Returns the walk, and the seconds until the last answer of the first shipment, or 0 if the walk was over before.
        A subclass may override this to commit another walk.  Raises Interrupted.
        """
        start, first_s, first_answers = self.clock(), 0.0, len(flight.shipment.answer_ids)
        pending: PendingAnswers = deque()
        for append in flight.shipment.appends:
            pending.append(await self.chain.append(append))
        async with self._drafting_task(flight, pending):
            walk: Walk | None = None
            while walk is None:
                self._accept_answer(flight, await pending.popleft())
                walk = flight.finished_walk()
                if flight.answered == first_answers:
                    first_s = self.clock() - start
        if pending:
            self.chain.send_hint(*self.builder.hint_after(flight.shipment, walk.accepted))
        return walk, first_s

    def _accept_answer(self, flight: RoundInFlight, answer: Answer) -> None:
        start, tokens = self.builder.scored_by(answer.seq)
        try:
            flight.add_answer(answer)
            self.prompt_scores.update(enumerate(self.wishes.scored(tokens, answer.scored), start))
        except Malformed as error:
            # Either the tail is wrong, or a node before it skipped rows that it should have sent.  The client cannot
            # tell which, so it drops the tail, which sent the answer.
            self.chain.drop_node(self.chain.hops[-1], error)
            raise Interrupted(str(error)) from None

    async def _check_walk(self, flight: RoundInFlight, walk: Walk) -> None:
        """Drop the tail and raise Interrupted if it has chosen a token that the grammar does not allow."""
        if self.grammar is None:
            return
        tokens, _ = self._kept_tokens(flight, walk)
        try:
            await asyncio.to_thread(check_tokens, self.grammar, list(self._generated), tokens)
        except Malformed as error:
            self.chain.drop_node(self.chain.hops[-1], error)
            raise Interrupted(str(error)) from None

    def _learn(
        self, flight: RoundInFlight, walk: Walk, first_nodes: int, seconds: float, first_s: float, *, unbroken: bool
    ) -> None:
        """Tell policy, statistics and `on_round` what came of a traversal.

        Its first shipment had `first_nodes` draft nodes, and took `first_s` seconds to be answered.
        """
        if flight.shipment.draft is None:
            self.policy.learn_prefill(seconds, flight.timings, unbroken=unbroken)
            return
        drafted = walk_after_run(flight.run, walk)
        answered = flight.drafts_answered
        finished = Round(flight.draft, drafted, answered, first_nodes, seconds, first_s, flight.timings, unbroken)
        self.recorder.add_walk(finished)
        if self.on_round is not None:
            self.on_round(finished)
        if (report := self.policy.learn(finished)) is not None:
            self.recorder.reports.append(report)

    # ---------------------------------------------------------------- commit

    async def _commit(self, flight: RoundInFlight, walk: Walk) -> Committed:
        """Commit the walk's tokens up to a stop token or the limit, and let the drafter observe what came back."""
        if flight.shipment.draft is not None:
            self.builder.accept(flight.shipment, walk.accepted)
        tokens, logprobs = self._kept_tokens(flight, walk)
        self.recorder.committed += len(tokens)
        self._generated += tokens
        finish: FinishReason | None = "length" if self.recorder.committed >= self.limits.max_new_tokens else None
        if tokens and tokens[-1] in self.limits.stop_ids:
            finish = "stop"
        if walk.bonus != NO_TOKEN and len(walk.accepted) >= len(flight.run):  # The generation goes on meanwhile.
            self._queue(self._observe, flight.verification(walk))
        top = tuple(flight.top_along(walk, self.wishes.top)[: len(tokens)]) if self.wishes.top else ()
        return Committed(tuple(tokens), tuple(logprobs), self.recorder.traversals, finish, top)

    def _kept_tokens(self, flight: RoundInFlight, walk: Walk) -> tuple[list[int], list[float]]:
        """Return the tokens of a walk up to a stop token or the limit, and their log-probabilities."""
        tokens, logprobs = flight.tokens_along(walk)
        if walk.bonus == NO_TOKEN:
            tokens, logprobs = tokens[:-1], logprobs[:-1]
        left = self.limits.max_new_tokens - self.recorder.committed
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.limits.stop_ids), len(tokens))
        kept = min(left, stop)
        return tokens[:kept], logprobs[:kept]

    def _check_bonus(self, walk: Walk) -> None:
        """Raise BadRequest if the rules allow no token after the text so far."""
        if walk.bonus == NO_TOKEN:
            raise BadRequest(
                f"the rules of this request allow no token after {self.recorder.committed} generated ones: loosen them"
            )

    def _rounds_left(self) -> float:
        """Estimate the number of rounds left, from the tokens per traversal so far."""
        return (
            (self.limits.max_new_tokens - self.recorder.committed) * self.recorder.traversals / self.recorder.committed
        )


def proposed_tree(proposal: Proposal) -> DraftTree:
    """Return a proposal as a tree of drafters."""
    parents = proposal.parents.astype(np.int64) - 1
    return DraftTree(parents, proposal.tokens.astype(np.int64), proposal.scores)
