"""The client's side of a session: build appends from prompts and trees.  Pure: no I/O, no clock."""

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
    """The appends of one traversal in order, and the nodes whose answers come back."""

    appends: tuple[Append, ...]
    answer_ids: NDArray[np.int64]
    """Ids of the nodes to be answered, int64 [nodes]: for a round the mandatory node, then the drafted ones."""
    draft: DraftTree | None
    """The tree drafted for this round, or None for a prefill."""


@dataclass(eq=False)
class AppendBuilder:
    """Counts ids and sequence numbers, cuts shipments into segments, and tracks what every node has.

    Every append has at most `segment_rows` rows, so that the next node computes while the rest is in flight.
    """

    settings: SamplingSettings
    segment_rows: int
    epoch: int
    prefix_rows: int = 0
    """Number of the prompt's first tokens that every node has in its prefix cache, if they are used at once."""
    scores_prompt: bool = False
    """Whether the tail sends the log-probabilities of the prompt's tokens."""
    _scored: dict[int, tuple[int, list[int]]] = field(default_factory=dict)
    """Position of the first token that an append has scored and all of them, by its sequence number in this epoch."""
    _text: list[int] = field(default_factory=list)
    """All tokens known: prompt, what walks accepted, and the bonus token that the present round ships."""
    _initial_length: int = 0
    """Number of these that every node had when the epoch began."""
    _trunk_lengths: list[int] = field(default_factory=list)
    """Length of the trunk after each append of this epoch."""
    _next_id: int = ROOT + 1
    _tip: int = ROOT
    _path: list[int] = field(default_factory=list)
    """Ids of the nodes that were walked and are not yet committed on the nodes of the chain."""

    @property
    def end(self) -> int:
        """Id of the last node of the text that the nodes have computed: the end of the last walk."""
        return self._path[-1] if self._path else self._tip

    def prefill(self, prompt: Sequence[int]) -> Shipment:
        """Ship the prompt, without what the nodes have of it, as rows that join the trunk.

        Only its last token is answered.
        """
        self._text, self._initial_length = list(prompt), self.prefix_rows
        return self._ship(None)

    def round(self, mandatory: int, draft: DraftTree) -> Shipment:
        """Commit the last walk's path, and ship its bonus token with the tree drafted below it.

        The bonus token is `mandatory`: the target chose it, so it is part of the text.
        """
        self._text.append(mandatory)
        return self._ship(draft)

    def extend(self, shipment: Shipment, wider: DraftTree) -> Shipment:
        """Ship further nodes below those of a round in flight; `wider` begins with the nodes that it shipped."""
        assert shipment.draft is not None
        shipped = len(shipment.draft)
        ids = np.arange(self._next_id, self._next_id + len(wider) - shipped)
        answer_ids = np.concatenate([shipment.answer_ids, ids])
        appends = self._segments([], answer_ids[wider.parents[shipped:] + 1], wider.tokens[shipped:], fresh=False)
        return Shipment(tuple(appends), answer_ids, wider)

    def accept(self, shipment: Shipment, accepted: Sequence[int]) -> None:
        """Record that the walk followed these drafted nodes (indices into the tree) of a round's shipment."""
        assert shipment.draft is not None
        self._path = [int(shipment.answer_ids[0]), *(int(shipment.answer_ids[i + 1]) for i in accepted)]
        self._text += shipment.draft.tokens[list(accepted)].tolist()

    def scored_by(self, seq: int) -> tuple[int, list[int]]:
        """Return the tokens that an append of this epoch has scored, and the position of the first one."""
        return self._scored.get(seq, (0, []))

    def hint_after(self, shipment: Shipment, accepted: Sequence[int]) -> tuple[int, int]:
        """Return the trunk's length and tip, as they will be once this walk is committed.

        They are the hint for nodes that still compute rows that the walk has left.
        """
        return len(self._text) + len(accepted), int(shipment.answer_ids[accepted[-1] + 1 if accepted else 0])

    def resumption(self, answered: int) -> tuple[list[int], int]:
        """Return where to go on after a loss: the trunk that every node has, and a new id for its last token.

        `answered` is the number of this epoch's appends that were answered.
        """
        self._initial_length = self._trunk_lengths[answered - 1] if answered else self._initial_length
        self._tip, self._path, self._trunk_lengths, self.prefix_rows = self._next_id, [], [], 0
        self._scored = {}
        self._next_id += 1
        return self._text[: self._initial_length], self._tip

    def ship_again(self, shipment: Shipment, epoch: int) -> Shipment:
        """Ship the same tree or prompt in a new epoch, after the text that the nodes lost."""
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
        """Return appends that join the trunk until it has `length` tokens; `answers` holds for the last token."""
        appends: list[Append] = []
        start = self._trunk_lengths[-1] if self._trunk_lengths else self._initial_length
        for begin in range(start, length, self.segment_rows):
            tokens = self._text[begin : min(begin + self.segment_rows, length)]
            parents = np.array([self._tip, *range(self._next_id, self._next_id + len(tokens) - 1)])
            last = begin + len(tokens) == length
            scored = self._text[begin + 1 : begin + len(tokens) + 1] if self._scores(answers) else []
            self._scored[len(self._trunk_lengths)] = (begin + 1, scored)
            self._trunk_lengths.append(begin + len(tokens))
            appended = answers if last else Answers.NONE
            appends.append(self._append([], parents, np.array(tokens), appended, prefill=True, scored=scored))
            self._tip = self._next_id - 1
        return appends

    def _scores(self, answers: Answers) -> bool:
        """Return whether the appends of a prefill score its tokens: only those of the prompt have an answer."""
        return self.scores_prompt and answers is Answers.LAST

    def _tree(self, ids: NDArray[np.int64], draft: DraftTree) -> list[Append]:
        """Return the mandatory token and the tree below it; the first segment commits the path walked before."""
        commit, self._path = self._path, []
        self._tip = commit[-1] if commit else self._tip
        parents = np.concatenate([[self._tip], ids[draft.parents + 1]]) if len(draft) else np.array([self._tip])
        tokens = np.concatenate([[self._text[-1]], draft.tokens])
        return self._segments(commit, parents, tokens, fresh=True)

    def _segments(
        self, commit: Sequence[int], parents: NDArray[np.int64], tokens: NDArray[np.int64], *, fresh: bool
    ) -> list[Append]:
        """Cut nodes into appends; the first one commits, and if `fresh` also drops what is left of the crown."""
        appends = []
        for start in range(0, len(tokens), self.segment_rows):
            rows = slice(start, start + self.segment_rows)
            self._trunk_lengths.append(len(self._text) - 1)
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
        scored: Sequence[int] = (),
    ) -> Append:
        append = Append(
            epoch=self.epoch,
            seq=len(self._trunk_lengths) - 1,
            commit=np.array(commit, np.uint32),
            first_id=self._next_id,
            parents=parents.astype(np.uint32),
            tokens=tokens.astype(np.uint32),
            prefill=prefill,
            answers=answers,
            settings=self.settings,
            skipped=np.zeros(len(tokens), np.bool_),
            fresh=fresh,
            prefix=self.prefix_rows if len(self._trunk_lengths) == 1 else 0,
            scored=np.array(scored, np.uint32),
        )
        self._next_id += len(tokens)
        return append
