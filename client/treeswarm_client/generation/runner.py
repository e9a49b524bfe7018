"""Runs one request from the prompt to the last token: a chain, a drafter, the loop, and the run's text."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from tokenizers import Tokenizer

from treeswarm.protocol.messages import MAX_ROWS, SEGMENT_BYTES
from treeswarm.transport.seam import Transport
from treeswarm_client.chain.chain import Chain, open_chain
from treeswarm_client.chain.options import Reservation
from treeswarm_client.chain.shared_prompt import PrefixScope, SharedPrompt
from treeswarm_client.client_settings import SessionSettings, largest_tree
from treeswarm_client.discovery.route import Router, Target
from treeswarm_client.drafters.seam import Drafter, ProposalReceiver
from treeswarm_client.generation.append_builder import AppendBuilder
from treeswarm_client.generation.draft_rules import DraftRules
from treeswarm_client.generation.drafter_pool import DrafterPool, PooledDrafter
from treeswarm_client.generation.forced_runs import LONGEST_RUN
from treeswarm_client.generation.loop import Committed, Generation
from treeswarm_client.generation.run import Request, Run, Token
from treeswarm_client.generation.text_stream import StopText, TextStream
from treeswarm_client.planner.policy import AutoPolicy

# Logits of a large vocabulary take half a megabyte per row, and the tail computes those of every scored row.
MOST_SCORED_ROWS = 256


class DrivesRuns(Protocol):
    """Has runs driven by nodes."""

    def rounds(self, run: Run, request: Request, scope: PrefixScope) -> AsyncGenerator[Committed, None]:
        """Yield what drivers commit to `run`, up to its end or until no driver is left or wanted."""
        ...


@dataclass(frozen=True, eq=False)
class GenerationRunner:
    """Runs the generations of one client, each on a chain of its own."""

    transport: Transport
    router: Router
    target: Target
    drafters: DrafterPool
    tokenizer: Tokenizer
    drivers: DrivesRuns
    adapt: Callable[[Generation], Generation] = lambda usual: usual
    """Returns the loop to run in place of the usual one."""

    async def stream(self, run: Run, request: Request, session: SessionSettings) -> AsyncGenerator[Token, None]:
        """Generate, yield tokens as they are committed, and keep text, ids and statistics in `run`.

        Raises NodeLost, Refused and the other SwarmErrors.
        """
        text = TextStream(self.tokenizer, run.prompt_ids, request.hidden)
        writer = RunWriter(run, text, StopText(request.stops), session.clock)
        try:
            async with aclosing(self._rounds(run, request, session)) as rounds:
                async for committed in rounds:
                    for token in writer.add(committed):
                        yield token
                    if writer.stopped:
                        return
        finally:
            if run.chain is not None or run.recorder.traversals:
                writer.finish()

    async def _rounds(self, run: Run, request: Request, session: SessionSettings) -> AsyncGenerator[Committed, None]:
        """Yield what drivers commit, while there are any, and then what this client's own loop commits."""
        async with aclosing(self.drivers.rounds(run, request, session.prefix_scope)) as driven:
            async for committed in driven:
                yield committed
                if committed.finish is not None:
                    return
        async with aclosing(self._own_rounds(run, request, session)) as rounds:
            async for committed in rounds:
                yield committed

    async def _own_rounds(
        self, run: Run, request: Request, session: SessionSettings
    ) -> AsyncGenerator[Committed, None]:
        """Yield what this client's own loop commits after the text so far.  Noise depends on positions alone."""
        prompt, largest = [*run.prompt_ids, *run.token_ids], largest_tree(request.tree_size)
        scores = request.wishes.prompt is not None
        grammar = None if request.grammar is None else request.grammar()
        longest_run = LONGEST_RUN if grammar is not None and largest else 0
        async with (
            self.drafters.borrow() as pooled,
            open_chain(
                self.transport,
                self.router,
                self.target,
                Reservation(len(run.prompt_ids) + request.limits.max_new_tokens, largest + longest_run + 1),
                patience_s=session.patience_s,
                # Rows that nodes have already are not computed, and could not be scored.
                shared=SharedPrompt(prompt, "none" if scores else session.prefix_scope, request.prefix_secret),
                alternatives=max(request.wishes.alternatives, pooled.drafter.alternatives if largest else 0),
                alternative_logprobs=request.wishes.alternatives > 0,
                proposal_nodes=min(largest, _proposal_nodes(pooled.drafter)),
                rules=request.rules,
                needs=request.needs,
                on_wait=session.on_wait,
            ) as chain,
        ):
            run.chain = chain
            if not run.token_ids:  # otherwise a driver's chain has prefilled the prompt
                run.prefix_tokens = chain.epoch.prefix_rows
            usual = self._generation(chain, pooled, run, request, session)
            if usual.rules is not None:
                usual.rules.grammar = grammar
            generation = self.adapt(replace(usual, grammar=grammar, longest_run=longest_run))
            generated = prompt[request.rules.prompt_length :] if request.rules is not None else ()
            async with aclosing(generation.rounds(prompt, request.settings, generated)) as rounds:
                async for committed in rounds:
                    if scores and run.prompt_logprobs is None:
                        run.prompt_logprobs = [generation.prompt_scores.get(i) for i in range(len(prompt))]
                    yield committed

    def _generation(
        self, chain: Chain, pooled: PooledDrafter, run: Run, request: Request, session: SessionSettings
    ) -> Generation:
        scores = request.wishes.prompt is not None
        most_rows = MOST_SCORED_ROWS if scores else MAX_ROWS
        segment_rows = max(1, min(most_rows, SEGMENT_BYTES // self.target.row_bytes))
        policy = AutoPolicy(
            pooled.memory,
            self.target.row_bytes,
            segment_rows,
            largest_tree(request.tree_size),
            fixed_size=None if request.tree_size == "auto" else request.tree_size,
            clock=session.clock,
        )
        return Generation(
            chain=chain,
            drafter=pooled.drafter,
            builder=AppendBuilder(request.settings, segment_rows, chain.epoch.number, chain.epoch.prefix_rows, scores),
            limits=request.limits,
            policy=policy,
            recorder=run.recorder,
            on_round=request.on_round,
            rules=None if request.rules is None else DraftRules(request.rules, [*run.prompt_ids, *run.token_ids]),
            wishes=request.wishes,
            clock=session.clock,
        )


def _proposal_nodes(drafter: Drafter) -> int:
    """Return how many nodes the proposals of the tail should have at most."""
    return drafter.proposal_nodes if isinstance(drafter, ProposalReceiver) else 0


class RunWriter:
    """Writes what a generation commits into its run."""

    def __init__(self, run: Run, text: TextStream, stop: StopText, clock: Callable[[], float]) -> None:
        """Begin now: the run's times are counted from here."""
        self._run = run
        self._text = text
        self._stop = stop
        self._clock = clock
        self._started = clock()

    @property
    def stopped(self) -> bool:
        """Whether the text has reached a stop string."""
        return self._stop.hit is not None

    def add(self, committed: Committed) -> Iterator[Token]:
        """Yield the tokens of one traversal, each once the run has it, up to the one that completes a stop string."""
        run, following = self._run, len(committed.tokens)
        tops = committed.top or ((),) * following
        if not following:  # a prompt was scored, and nothing was to be generated
            run.finish_reason = committed.finish
        for token, logprob, top in zip(committed.tokens, committed.logprobs, tops, strict=True):
            following -= 1
            piece = self._stop.add(self._text.add(token))
            if self.stopped:
                run.finish_reason, run.stop_string = "stop", self._stop.hit
            elif committed.finish is not None and not following:
                piece += self._stop.flush()
                run.finish_reason = committed.finish
            if run.lost_driver_at is not None:
                run.recorder.recoveries.append((run.lost_driver_at, self._clock()))
                run.lost_driver_at = None
            run.first_token_s = run.first_token_s or self._clock() - self._started
            run.token_ids.append(token)
            run.logprobs.append(logprob)
            run.top_logprobs.append(top)
            run.text += piece
            yield Token(token, piece, logprob, committed.traversal, 0 if self.stopped else following, top)
            if self.stopped:
                return

    def finish(self) -> None:
        """Sum up the run's statistics."""
        self._run.stats = self._run.recorder.summary(self._clock() - self._started)
