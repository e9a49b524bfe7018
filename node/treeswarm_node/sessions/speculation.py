"""Proposals of one session at the tail: follow its steps, and let the speculator work while no step waits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from treeswarm.protocol.messages import Proposal
from treeswarm.protocol.spans import Span
from treeswarm.session.steps import Step
from treeswarm.session.walk import child_index
from treeswarm_node.engine.counters import Counters
from treeswarm_node.engine.model_runner import Computed
from treeswarm_node.engine.tap_slice import read_sums
from treeswarm_node.speculator.followed_text import FollowedText, WalkEnd
from treeswarm_node.speculator.seam import ReadsTapSums, RowSums, SpeculatedTree, SpeculationRequest, Speculator

# Stands for a token that a tree does not have at its place.
NO_NODE = -2


@dataclass(eq=False)
class SessionSpeculation:
    """What a session at the tail remembers for its proposals."""

    speculator: Speculator
    size: int
    """Largest number of nodes of a proposal."""
    span: Span
    """Blocks that this node computes for the session."""
    counters: Counters = field(default_factory=Counters)
    """Totals of the node."""
    text: FollowedText = field(init=False)
    memory: Any = field(init=False)
    """What the speculator remembers of the session; only the device thread touches it."""
    _proposed: "_Proposed | None" = None
    """The last proposal, until a walk has judged it."""
    _proposed_tip: int | None = None
    """Id of the node below which a tree was proposed last, or None before the first and after a repair."""
    _blocks: tuple[int, ...] = field(init=False)
    """Tapped blocks that this node computes for the session."""

    def __post_init__(self) -> None:
        self._blocks = tuple(tap for tap in self.speculator.taps if self.span.start <= tap < self.span.end)
        self.text = FollowedText(self.speculator.window, len(self._blocks) < len(self.speculator.taps))
        self.memory = self.speculator.new_memory()

    def follow(self, step: Step, computed: Computed) -> bool:
        """Take note of a computed step, and return whether the walk has an end below which no tree was proposed."""
        states = torch.empty(0) if computed.states is None else computed.states
        answers = np.empty(0, np.int64) if computed.tokens is None else computed.tokens
        self.text.add(step, answers, states, self._sums_of(step))
        end = self.text.walk_end()
        return end is not None and end.tip != self._proposed_tip

    def _sums_of(self, step: Step) -> list[torch.Tensor | None] | None:
        """Return the sum of other nodes' taps at each of a step's rows, or None if this node taps all blocks.

        Sums that lack a block, or have one of this node's, count as missing.
        """
        if not self.text.needs_sums or not isinstance(self.speculator, ReadsTapSums):
            return None
        part, came = self.speculator.tap_slice, step.append.tap_sums
        others = tuple(tap for tap in part.taps if tap not in self._blocks)
        if came is None or came.blocks != others:
            return [None] * step.rows
        values, known = read_sums(part, step)
        return [value if is_known else None for value, is_known in zip(values, known.tolist(), strict=True)]

    def truncate(self, length: int) -> None:
        """Cut the text back to `length` rows, for a new epoch."""
        self.text.truncate(length)
        self._proposed_tip = self._proposed = None

    def take_end(self) -> WalkEnd | None:
        """Return the walk's end, below which a tree is then proposed, or None if there is none any more."""
        end = self.text.walk_end()
        if end is not None:
            if self._proposed is not None:
                self.counters.proposed_right += self._proposed.tokens_right(end)
                self._proposed = None
            self.text.mark_read(end)
            self._proposed_tip = end.tip
        return end

    def record_proposal(self, end: WalkEnd, tree: SpeculatedTree) -> None:
        """Remember what was proposed below a walk's end: the next walk judges it."""
        self.counters.proposals += 1
        self._proposed = _Proposed(end.first_position + len(end.rows), child_index(tree.parents, tree.tokens))

    def request_at(self, end: WalkEnd) -> SpeculationRequest:
        """Return what the speculator needs to propose a tree below a walk's end."""
        return SpeculationRequest(
            memory=self.memory,
            first_position=end.first_position,
            states=end.states,
            next_tokens=end.next_tokens,
            settings=end.settings,
            size=self.size,
            sums=RowSums(*end.sums, self._blocks) if self.text.needs_sums else None,
        )

    def make_job(self, session: bytes, epoch: int, deliver: Callable[[Proposal], None]) -> "SpeculationJob":
        """Return the work that proposes a tree below the walk's end as it is when the work begins."""
        return SpeculationJob(self, session, epoch, deliver)


@dataclass(frozen=True, eq=False)
class _Proposed:
    """A proposed tree, and where in the text its root stands."""

    root_position: int
    index: Mapping[tuple[int, int], int]
    """Index of each node, by its parent's index (-1 for the root) and its token."""

    def tokens_right(self, end: WalkEnd) -> int:
        """Return how many of the tokens after the root, up to a later walk's end, the tree names."""
        first = self.root_position - end.first_position
        node = -1
        for count, token in enumerate(end.next_tokens[first:].tolist() if first >= 0 else []):
            if (node := self.index.get((node, token), NO_NODE)) == NO_NODE:
                return count
        return max(0, len(end.next_tokens) - first) if first >= 0 else 0


@dataclass(eq=False)
class SpeculationJob:
    """One proposal, for the device's spare time; see `engine.SpareTimeJob`."""

    speculation: SessionSpeculation
    session: bytes
    epoch: int
    deliver: Callable[[Proposal], None]
    _end: WalkEnd | None = None
    _steps: Iterator[SpeculatedTree] = field(default_factory=lambda: iter(()))
    _tree: SpeculatedTree | None = None

    def begin(self) -> None:
        """Take the rows that the speculator reads."""
        self._end = self.speculation.take_end()
        if self._end is not None:
            self._steps = self.speculation.speculator.propose(self.speculation.request_at(self._end))

    def run_slice(self) -> bool:
        """Let the tree grow by one forward, and return whether it is complete."""
        tree = next(self._steps, None)
        self._tree = self._tree if tree is None else tree
        return tree is None

    def finish(self) -> None:
        """Deliver the tree, if there is one.  An empty one tells the client not to wait."""
        if self._end is not None and self._tree is not None:
            if len(self._tree):
                self.speculation.record_proposal(self._end, self._tree)
            self.deliver(
                Proposal(
                    session=self.session,
                    epoch=self.epoch,
                    tip=self._end.tip,
                    root=self._end.bonus,
                    parents=(self._tree.parents + 1).astype(np.uint32),
                    tokens=self._tree.tokens.astype(np.uint32),
                    scores=self._tree.scores.astype(np.float32),
                )
            )
