"""The client's loop: draft, ship, walk, commit."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from treeswarm.sampling import SamplingSettings
from treeswarm.walk import Walk, walk
from treeswarm_client.chain import Chain
from treeswarm_client.drafters.seam import NO_TREE, Drafter, DraftTree, Verdict
from treeswarm_client.mending import Interrupted
from treeswarm_client.session import Answered, ClientSession, Shipment
from treeswarm_client.stats import Meter


@dataclass(frozen=True)
class Limits:
    """When a generation ends."""

    max_new_tokens: int
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Committed:
    """The tokens one traversal bought."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    traversal: int


@dataclass(eq=False)
class Generation:
    """One prompt on one chain."""

    chain: Chain
    drafter: Drafter
    session: ClientSession
    limits: Limits
    tree_size: int
    meter: Meter = field(default_factory=Meter)

    async def rounds(self, prompt: Sequence[int], settings: SamplingSettings) -> AsyncGenerator[Committed, None]:
        """Yield what each traversal commits, until a stop token or the limit."""
        (prefill, _), _ = await asyncio.gather(
            self._traverse(self.session.prefill(prompt)), asyncio.to_thread(self.drafter.begin, prompt, settings)
        )
        news = self._commit(prefill.tokens.tolist(), prefill.logprobs.tolist())
        yield news
        bonus = news.tokens[-1]
        await self._learn(NO_TREE, prefill, Walk((), bonus))
        while not self._ended(news):
            tree = await self._propose()
            answered, shipment = await self._traverse(self.session.round(bonus, tree))
            found = walk(tree.parents, tree.tokens, answered.tokens)
            self.session.accept(shipment, found.accepted)
            await self._learn(tree, answered, found)
            bonus = found.bonus
            path = [0, *(i + 1 for i in found.accepted)]
            news = self._commit(answered.tokens[path].tolist(), answered.logprobs[path].tolist())
            yield news
            self.chain.reconsider(trunk=len(prompt) + self.meter.committed, rounds_left=self._rounds_left())

    def _rounds_left(self) -> float:
        return (self.limits.max_new_tokens - self.meter.committed) * self.meter.traversals / self.meter.committed

    async def _traverse(self, shipment: Shipment) -> tuple[Answered, Shipment]:
        """One request through the chain, which is mended as often as it breaks under way."""
        start = time.perf_counter()
        broke: float | None = None
        while True:
            try:
                answered = await self._ship(shipment)
                break
            except Interrupted:
                broke = broke or time.perf_counter()
                trunk, tip = self.session.resumption(self.chain.answered)
                await self.chain.mend(trunk, tip)
                shipment = self.session.again(shipment, self.chain.epoch)
        seconds = time.perf_counter() - start
        self.meter.add_traversal(seconds, answered.timings)
        if broke is None:
            self.chain.traversed(seconds)
        else:
            self.meter.recoveries.append((broke, time.perf_counter()))
        return answered, shipment

    async def _ship(self, shipment: Shipment) -> Answered:
        waiting = [await self.chain.append(append) for append in shipment.appends]
        return self.session.gather(shipment, await asyncio.gather(*waiting))

    async def _propose(self) -> DraftTree:
        """A tree no deeper than what may still be committed: the mandatory node's answer is one token."""
        remaining = self.limits.max_new_tokens - self.meter.committed
        if not self.tree_size or remaining <= 1:
            return NO_TREE
        start = time.perf_counter()
        tree = await asyncio.to_thread(self.drafter.propose, self.tree_size, remaining - 1)
        self.meter.draft_s += time.perf_counter() - start
        return tree

    async def _learn(self, tree: DraftTree, answered: Answered, found: Walk) -> None:
        start = time.perf_counter()
        verdict = Verdict(tree, answered.tokens, found.accepted, found.bonus, answered.alternatives)
        await asyncio.to_thread(self.drafter.observe, verdict)
        self.meter.draft_s += time.perf_counter() - start
        if len(tree):  # without a tree there was nothing to hit or miss
            self.meter.add_walk(len(tree), len(found.accepted))

    def _commit(self, tokens: list[int], logprobs: list[float]) -> Committed:
        end = self.limits.max_new_tokens - self.meter.committed
        stop = next((i + 1 for i, token in enumerate(tokens) if token in self.limits.stop_ids), len(tokens))
        kept = min(end, stop)
        self.meter.committed += kept
        return Committed(tuple(tokens[:kept]), tuple(logprobs[:kept]), self.meter.traversals)

    def _ended(self, news: Committed) -> bool:
        return self.meter.committed >= self.limits.max_new_tokens or news.tokens[-1] in self.limits.stop_ids
