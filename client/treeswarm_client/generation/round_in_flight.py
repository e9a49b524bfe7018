"""One request under way: what was shipped, what has been answered so far, and how far that leads.  Pure."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import Malformed
from treeswarm.protocol.messages import Answer, Answers, Append, HopTiming
from treeswarm.session.walk import Walk, walk
from treeswarm_client.drafters.seam import UNANSWERED, DraftTree, Verification
from treeswarm_client.generation.append_builder import Shipment


@dataclass(eq=False)
class RoundInFlight:
    """Grows while further nodes are shipped below those on their way; answers come in the order of the appends."""

    shipment: Shipment
    landed: int = 0
    """Nodes answered."""
    timings: list[tuple[HopTiming, ...]] = field(default_factory=list)
    """Per append answered, per hop."""
    _due: deque[int] = field(default_factory=deque)
    """How many nodes each append on its way asks about."""
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _alternatives: list[NDArray[np.uint32]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._due.extend(_questions(append) for append in self.shipment.appends)

    @property
    def draft(self) -> DraftTree:
        """Nothing, for a prefill."""
        assert self.shipment.draft is not None
        return self.shipment.draft

    @property
    def answers(self) -> NDArray[np.int64]:
        """The target's token at each node asked about, in order; UNANSWERED where it is not here yet."""
        missing = len(self.shipment.asked) - self.landed
        return np.array(self._tokens + missing * [UNANSWERED], np.int64)

    def extend(self, shipment: Shipment) -> None:
        """Further nodes were shipped below those on their way."""
        self.shipment = shipment
        self._due.extend(_questions(append) for append in shipment.appends)

    @property
    def alternatives(self) -> NDArray[np.int64]:
        """[asked, k]: the target's best tokens at the same nodes, as many as came with every answer, which may be
        none; UNANSWERED like the answers."""
        sent = [each for each in self._alternatives if len(each)]
        width = min((each.shape[1] for each in sent), default=0)
        width = width if self.landed == sum(len(each) for each in sent) else 0
        known = np.full((len(self.shipment.asked), width), UNANSWERED, np.int64)
        if width:
            known[: self.landed] = np.concatenate([each[:, :width] for each in sent])
        return known

    def land(self, answer: Answer) -> None:
        """Take the next append's answer.  Raises Malformed: a node answers what it was not asked."""
        asked = self.shipment.asked[self.landed : self.landed + self._due.popleft()]
        if not np.array_equal(answer.ids, asked):
            raise Malformed("the tail answered other nodes than it was asked about")
        self.landed += len(asked)
        self.timings.append(answer.timings)
        self._tokens += answer.tokens.tolist()
        self._logprobs += answer.logprobs.tolist()
        self._alternatives.append(answer.alternatives)

    def found(self) -> Walk | None:
        """The whole walk; None while it leads to a node whose answer is not here yet."""
        if self.shipment.draft is None:
            return Walk((), self._tokens[-1]) if self.landed else None
        found = walk(self.draft.parents, self.draft.tokens, self.answers)
        return None if found.bonus == UNANSWERED else found

    def said(self, found: Walk) -> tuple[list[int], list[float]]:
        """The target's tokens along the walk, and their log-probabilities."""
        path = [0, *(node + 1 for node in found.accepted)]
        return [self._tokens[place] for place in path], [self._logprobs[place] for place in path]

    def verdict(self, found: Walk) -> Verification:
        """What a drafter may learn."""
        return Verification(self.draft, self.answers, found.accepted, found.bonus, self.alternatives)


def _questions(append: Append) -> int:
    match append.answers:
        case Answers.NONE:
            return 0
        case Answers.LAST:
            return min(1, append.rows)
        case Answers.ALL:
            return append.rows
