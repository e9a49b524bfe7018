"""The client's side of a session: what to append, and what the answers mean.  Pure: no I/O, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.messages import Answers, Append
from treeswarm.protocol.sampling import SamplingSettings
from treeswarm.session.tree import ROOT
from treeswarm_client.drafters.seam import DraftTree


@dataclass(frozen=True, eq=False)
class Shipment:
    """What goes out: appends in order, and the ids whose answers come back in this round."""

    appends: tuple[Append, ...]
    asked: NDArray[np.int64]
    """Ids of the nodes answered, in order: for a round the mandatory node, then the drafted ones."""
    draft: DraftTree | None
    """What was drafted for this round; None for a prefill."""


@dataclass(eq=False)
class AppendBuilder:
    """Counts ids and sequence numbers, cuts shipments into segments, and knows what every node is sure to have.

    Every append has at most `segment_rows` rows, so that the next node computes while the rest is on its way.
    """

    settings: SamplingSettings
    segment_rows: int
    epoch: int
    prefix_rows: int = 0
    """The prompt's first so many tokens that every node has, if nothing happens until they are used."""
    _text: list[int] = field(default_factory=list)
    """All tokens known: prompt, what walks accepted, and the bonus that the present round ships."""
    _sure: int = 0
    """Of these, how many every node had when the epoch began."""
    _reached: list[int] = field(default_factory=list)
    """How long each append of this epoch makes the trunk."""
    _next_id: int = ROOT + 1
    _tip: int = ROOT
    _path: list[int] = field(default_factory=list)
    """Walked and not yet committed on the nodes."""

    def prefill(self, prompt: Sequence[int]) -> Shipment:
        """The prompt, but for what the nodes have of it, as chains that join the trunk; only its last token is
        answered."""
        self._text, self._sure = list(prompt), self.prefix_rows
        return self._ship(None)

    def round(self, mandatory: int, draft: DraftTree) -> Shipment:
        """Commit what the last walk accepted; ship the bonus token of that walk with the tree drafted below it."""
        self._text.append(mandatory)
        return self._ship(draft)

    def extend(self, shipment: Shipment, wider: DraftTree) -> Shipment:
        """Further nodes below those of a round that is on its way; `wider` begins with what it shipped."""
        assert shipment.draft is not None
        known = len(shipment.draft)
        ids = np.arange(self._next_id, self._next_id + len(wider) - known)
        asked = np.concatenate([shipment.asked, ids])
        appends = self._segments([], asked[wider.parents[known:] + 1], wider.tokens[known:], fresh=False)
        return Shipment(tuple(appends), asked, wider)

    def accept(self, shipment: Shipment, accepted: Sequence[int]) -> None:
        """The walk followed these drafted nodes (indices into the tree) of a round's shipment."""
        assert shipment.draft is not None
        self._path = [int(shipment.asked[0]), *(int(shipment.asked[i + 1]) for i in accepted)]
        self._text += shipment.draft.tokens[list(accepted)].tolist()

    def news(self, shipment: Shipment, accepted: Sequence[int]) -> tuple[int, int]:
        """Length of the trunk and its tip, as they will be once this walk is committed: for nodes that still compute
        what it passed by."""
        return len(self._text) + len(accepted), int(shipment.asked[accepted[-1] + 1 if accepted else 0])

    def resumption(self, answered: int) -> tuple[list[int], int]:
        """The tokens that every node is sure to have, now that so many appends of this epoch are answered, and a new
        name for the last of them: where to go on after a loss."""
        self._sure = self._reached[answered - 1] if answered else self._sure
        self._tip, self._path, self._reached, self.prefix_rows = self._next_id, [], [], 0
        self._next_id += 1
        return self._text[: self._sure], self._tip

    def again(self, shipment: Shipment, epoch: int) -> Shipment:
        """The same request in a new epoch, with what the nodes lost of the text before it."""
        self.epoch = epoch
        return self._ship(shipment.draft)

    def _ship(self, draft: DraftTree | None) -> Shipment:
        if draft is None:
            appends = self._catch_up(len(self._text), Answers.LAST)
            return Shipment(tuple(appends), np.array([self._tip]), None)
        appends = [] if self._path else self._catch_up(len(self._text) - 1, Answers.NONE)
        ids = np.arange(self._next_id, self._next_id + 1 + len(draft))
        return Shipment((*appends, *self._tree(ids, draft)), ids, draft)

    def _catch_up(self, length: int, answers: Answers) -> list[Append]:
        """Chains that join the trunk until it is `length` long; `answers` holds for the last token."""
        appends: list[Append] = []
        start = self._reached[-1] if self._reached else self._sure
        for begin in range(start, length, self.segment_rows):
            tokens = self._text[begin : min(begin + self.segment_rows, length)]
            parents = np.array([self._tip, *range(self._next_id, self._next_id + len(tokens) - 1)])
            last = begin + len(tokens) == length
            self._reached.append(begin + len(tokens))
            appends.append(self._append([], parents, np.array(tokens), answers if last else Answers.NONE, prefill=True))
            self._tip = self._next_id - 1
        return appends

    def _tree(self, ids: NDArray[np.int64], draft: DraftTree) -> list[Append]:
        """The mandatory token and the tree below it; the first segment commits the path walked before."""
        commit, self._path = self._path, []
        self._tip = commit[-1] if commit else self._tip
        parents = np.concatenate([[self._tip], ids[draft.parents + 1]]) if len(draft) else np.array([self._tip])
        tokens = np.concatenate([[self._text[-1]], draft.tokens])
        return self._segments(commit, parents, tokens, fresh=True)

    def _segments(
        self, commit: Sequence[int], parents: NDArray[np.int64], tokens: NDArray[np.int64], *, fresh: bool
    ) -> list[Append]:
        """Nodes cut into appends; the first one commits, and buries what is left of the crown."""
        appends = []
        for start in range(0, len(tokens), self.segment_rows):
            rows = slice(start, start + self.segment_rows)
            self._reached.append(len(self._text) - 1)
            appends.append(self._append(commit, parents[rows], tokens[rows], Answers.ALL, fresh=fresh and not start))
            commit = []
        return appends

    def _append(
        self,
        commit: Sequence[int],
        parents: NDArray[np.int64],
        tokens: NDArray[np.int64],
        answers: Answers,
        *,
        prefill: bool = False,
        fresh: bool = False,
    ) -> Append:
        append = Append(
            epoch=self.epoch,
            seq=len(self._reached) - 1,
            commit=np.array(commit, np.uint32),
            first_id=self._next_id,
            parents=parents.astype(np.uint32),
            tokens=tokens.astype(np.uint32),
            prefill=prefill,
            answers=answers,
            settings=self.settings,
            skipped=np.zeros(len(tokens), np.bool_),
            fresh=fresh,
            prefix=self.prefix_rows if len(self._reached) == 1 else 0,
        )
        self._next_id += len(tokens)
        return append
