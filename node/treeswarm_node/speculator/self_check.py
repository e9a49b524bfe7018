"""The check of a published head: it must guess better than n-grams, or it proposes no more.

A head may be for another fine-tuned model, or follow a convention that no config names; both make it guess badly, and
nothing else shows it.  So both guess below the same roots, with as many nodes, over the first tokens of the text.
"""

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treeswarm.session.walk import child_index
from treeswarm_client.drafters.suffix import SuffixDrafter
from treeswarm_node.speculator.growth import FORWARDS
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest, Speculator

log = logging.getLogger(__name__)

# Number of tokens of text over which both are compared: some 60 rounds of a good head.
CHECKED_TOKENS = 200
# Number of nodes of the trees that are compared, which is a usual tree, and of their levels: a head's tree has no more.
COMPARED_NODES, COMPARED_LEVELS = 64, FORWARDS + 1
NO_NODES = SpeculatedTree(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


class HeadVerdict(StrEnum):
    """What the check has found so far."""

    OPEN = "open"
    PASSED = "passed"
    REFUSED = "refused"


@dataclass(eq=False)
class HeadComparison:
    """Counts what both find, over the texts of all sessions."""

    tokens: int = 0
    """Number of tokens of text that were compared."""
    head: int = 0
    """Number of right tokens in the head's trees."""
    ngrams: int = 0
    """Number of right tokens in the trees of n-grams."""
    roots: int = 0
    """Number of roots below which both guessed."""
    first: int = 0
    """Number of them below which the head's first guess was right."""

    @property
    def verdict(self) -> HeadVerdict:
        """Whether the head has found more, once there was enough text."""
        if self.tokens < CHECKED_TOKENS:
            return HeadVerdict.OPEN
        return HeadVerdict.PASSED if self.head > self.ngrams else HeadVerdict.REFUSED

    def __str__(self) -> str:
        return f"over {self.tokens} tokens its trees found {self.head} of them ahead, those of n-grams {self.ngrams}"


@dataclass(frozen=True, eq=False)
class RivalTrees:
    """Two trees below the same root."""

    root_position: int
    """Position in the text of the root."""
    head: SpeculatedTree
    ngrams: SpeculatedTree


@dataclass(eq=False)
class CheckedText:
    """One session's text as its proposals show it, and the trees whose continuation is not known yet."""

    _start: int = 0
    """Position of the first token."""
    _tokens: list[int] = field(default_factory=list)
    _waiting: deque[RivalTrees] = field(default_factory=deque)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self._start + len(self._tokens)

    def read(self, first_position: int, tokens: NDArray[np.int64]) -> int:
        """Take the tokens from a position on, and return how many are new.  After a gap, the text begins with them."""
        if not self._start <= first_position <= self.end or not self._tokens:
            self._start, self._tokens = first_position, []
            self._waiting.clear()
        before = self.end
        self._tokens[first_position - self._start :] = tokens.tolist()
        return max(0, self.end - before) if before > self._start else 0

    def settle(self, comparison: HeadComparison) -> None:
        """Count what was right in the trees whose continuation is known by now."""
        while self._waiting and self._waiting[0].root_position + COMPARED_LEVELS < self.end:
            trees = self._waiting.popleft()
            begin = trees.root_position + 1 - self._start
            truth = self._tokens[begin : begin + COMPARED_LEVELS]
            comparison.head += right_tokens(trees.head, truth)
            comparison.ngrams += right_tokens(trees.ngrams, truth)
            comparison.roots += 1
            comparison.first += bool(len(trees.head)) and int(trees.head.tokens[0]) == truth[0]

    def guess(self, tree: SpeculatedTree, request: SpeculationRequest) -> None:
        """Keep the head's tree below the text's end, with what the client's n-grams would guess there."""
        drafter = SuffixDrafter()
        drafter.begin(self._tokens, request.settings)
        size = min(request.size, COMPARED_NODES)
        ngrams = drafter.propose(size, COMPARED_LEVELS)
        head = SpeculatedTree(tree.parents[:size], tree.tokens[:size], tree.scores[:size])
        rival = SpeculatedTree(ngrams.parents, ngrams.tokens, ngrams.scores)
        self._waiting.append(RivalTrees(request.root_position, head, rival))


def right_tokens(tree: SpeculatedTree, truth: list[int]) -> int:
    """Return how many tokens of a continuation are on one path of a tree."""
    index, node, count = child_index(tree.parents, tree.tokens), -1, 0
    for token in truth:
        found = index.get((node, token))
        if found is None:
            break
        node, count = found, count + 1
    return count


@dataclass(eq=False)
class CheckedMemory:
    """The memory of one session."""

    inner: Any
    """The speculator's own memory of it."""
    text: CheckedText = field(default_factory=CheckedText)


class CheckedSpeculator:
    """A speculator that proposes while it is checked, and nothing after it was refused."""

    def __init__(self, inner: Speculator, source: str) -> None:
        """`source` names the head in the log."""
        self.inner, self.source = inner, source
        self.comparison = HeadComparison()

    @property
    def name(self) -> str:
        """See `Speculator`: a node whose head was refused has none."""
        return "" if self.comparison.verdict is HeadVerdict.REFUSED else self.inner.name

    @property
    def agreement(self) -> float:
        """See `Speculator`: as the check has seen it, once it is over."""
        counts = self.comparison
        return counts.first / counts.roots if counts.roots and counts.verdict is HeadVerdict.PASSED else 0.0

    @property
    def taps(self) -> tuple[int, ...]:
        """See `Speculator`."""
        return self.inner.taps

    @property
    def window(self) -> int:
        """See `Speculator`."""
        return self.inner.window

    def new_memory(self) -> CheckedMemory:
        """See `Speculator`."""
        return CheckedMemory(self.inner.new_memory())

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        """See `Speculator`.  A refused head yields an empty tree, so that no client waits for one."""
        memory: CheckedMemory = request.memory
        before = self.comparison.verdict
        if before is HeadVerdict.OPEN:
            self._read(memory.text, request)
        if self.comparison.verdict is HeadVerdict.REFUSED:
            yield NO_NODES
            return
        tree = None
        for tree in self.inner.propose(replace(request, memory=memory.inner)):  # the last one is used
            yield tree
        if tree is not None and self.comparison.verdict is HeadVerdict.OPEN:
            memory.text.guess(tree, request)

    def _read(self, text: CheckedText, request: SpeculationRequest) -> None:
        """Count what was right of earlier guesses, and say what the check has found when it ends."""
        self.comparison.tokens += text.read(request.first_position + 1, request.next_tokens)
        text.settle(self.comparison)
        match self.comparison.verdict:
            case HeadVerdict.PASSED:
                log.info("the head in '%s' is better than n-grams: %s", self.source, self.comparison)
            case HeadVerdict.REFUSED:
                log.warning(
                    "the head in '%s' proposes no more, for it is no better than n-grams: %s; give another one, or "
                    "--speculator none",
                    self.source, self.comparison,
                )  # fmt: skip
