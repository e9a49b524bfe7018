"""One traversal under way: what was shipped, what has been answered, and how far the walk leads.  Pure."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import NO_TOKEN, Answer, Answers, Append, HopTiming
from treeswarm.session.walk import Walk, walk
from treeswarm_client.drafters.seam import NO_TREE, UNANSWERED, DraftTree, Verification
from treeswarm_client.generation.append_builder import Shipment
from treeswarm_client.generation.forced_runs import after_run, verification_after_run
from treeswarm_client.generation.token_logprobs import TopLogprobs


@dataclass(eq=False)
class RoundInFlight:
    """A shipment and its answers, which come in the order of the appends.

    It grows while further nodes are shipped below those in flight.
    """

    shipment: Shipment
    run: tuple[int, ...] = ()
    """Tokens of the forced run with which the shipped tree begins; the drafted tree is below its end."""
    answered: int = 0
    """Number of nodes answered."""
    timings: list[tuple[HopTiming, ...]] = field(default_factory=list)
    """Timings per answered append and hop."""
    _due: deque[int] = field(default_factory=deque)
    """Number of answers that each append in flight brings."""
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _alternatives: list[NDArray[np.uint32]] = field(default_factory=list)
    _alternative_logprobs: list[NDArray[np.float32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._due.extend(_answer_count(append) for append in self.shipment.appends)

    @property
    def _tree(self) -> DraftTree:
        """The tree as shipped so far, the forced run included; only rounds have one, a prefill has none."""
        assert self.shipment.draft is not None
        return self.shipment.draft

    @property
    def draft(self) -> DraftTree:
        """The part of it that was drafted."""
        return after_run(self.run, self._tree)

    @property
    def drafts_answered(self) -> int:
        """Number of drafted nodes that were answered."""
        return max(self.answered - 1 - len(self.run), 0)

    @property
    def answers(self) -> NDArray[np.int64]:
        """The target's token at each node to be answered, in order, int64 [nodes]; UNANSWERED where it is missing."""
        missing = len(self.shipment.answer_ids) - self.answered
        return np.array(self._tokens + missing * [UNANSWERED], np.int64)

    @property
    def alternatives(self) -> NDArray[np.int64]:
        """The target's k best tokens at the same nodes, best first, int64 [nodes, k]; UNANSWERED where missing.

        k is the number that came with every answer, which may be 0.
        """
        received = [each for each in self._alternatives if len(each)]
        width = min((each.shape[1] for each in received), default=0)
        width = width if self.answered == sum(len(each) for each in received) else 0
        alternatives = np.full((len(self.shipment.answer_ids), width), UNANSWERED, np.int64)
        if width:
            alternatives[: self.answered] = np.concatenate([each[:, :width] for each in received])
        return alternatives

    def extend(self, shipment: Shipment) -> None:
        """Add the nodes that `AppendBuilder.extend` shipped below those in flight."""
        self.shipment = shipment
        self._due.extend(_answer_count(append) for append in shipment.appends)

    def add_answer(self, answer: Answer) -> None:
        """Add the next append's answer.  Raises Malformed if it answers other nodes than it should."""
        ids = self.shipment.answer_ids[self.answered : self.answered + self._due.popleft()]
        if not np.array_equal(answer.ids, ids):
            raise Malformed("the tail answered other nodes than it was asked about")
        self.answered += len(ids)
        self.timings.append(answer.timings)
        self._tokens += answer.tokens.tolist()
        self._logprobs += answer.logprobs.tolist()
        self._alternatives.append(answer.alternatives)
        self._alternative_logprobs.append(answer.alternative_logprobs)

    def finished_walk(self) -> Walk | None:
        """Return the whole walk, or None while it leads to a node that is not answered yet."""
        if self.shipment.draft is None:
            return Walk((), self._tokens[-1]) if self.answered else None
        path = walk(self._tree.parents, self._tree.tokens, self.answers)
        return None if path.bonus == UNANSWERED else path

    def tokens_along(self, path: Walk) -> tuple[list[int], list[float]]:
        """Return the target's tokens along the walk, and their log-probabilities."""
        places = [0, *(node + 1 for node in path.accepted)]
        return [self._tokens[place] for place in places], [self._logprobs[place] for place in places]

    def top_along(self, path: Walk, count: int) -> list[TopLogprobs]:
        """Return the likeliest `count` tokens at each place of the walk, which came with every answer."""
        places = [0, *(node + 1 for node in path.accepted)]
        if not count:
            return [()] * len(places)
        rows: list[TopLogprobs] = []
        for ids, logprobs in zip(self._alternatives, self._alternative_logprobs, strict=True):
            pairs = zip(ids[:, :count].tolist(), logprobs[:, :count].tolist(), strict=True)
            rows += [tuple(zip(*pair, strict=True)) for pair in pairs]
        return [rows[place] for place in places]

    def verification(self, path: Walk) -> Verification:
        """Return what a drafter may learn from the answers below the forced run; of a prefill, below an empty tree."""
        draft = NO_TREE if self.shipment.draft is None else self.shipment.draft
        answers = np.where(self.answers == NO_TOKEN, UNANSWERED, self.answers)
        whole = Verification(draft, answers, path.accepted, path.bonus, self.alternatives)
        return verification_after_run(self.run, whole)


def _answer_count(append: Append) -> int:
    match append.answers:
        case Answers.NONE:
            return 0
        case Answers.LAST:
            return min(1, append.rows)
        case Answers.ALL:
            return append.rows
