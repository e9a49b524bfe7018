"""The client's side of a session: what to append, and what the answers mean.  Pure: no I/O, no clock."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import Malformed
from treeswarm.messages import Answer, Answers, Append, HopTiming
from treeswarm.sampling import SamplingSettings
from treeswarm.tree import ROOT
from treeswarm_client.drafters.seam import DraftTree


@dataclass(frozen=True, eq=False)
class Shipment:
    """What goes out for one traversal: appends in order, and the ids whose answers come back."""

    appends: tuple[Append, ...]
    asked: NDArray[np.int64]
    """Ids of the nodes answered, in order: for a round the mandatory node, then the drafted ones."""


@dataclass(frozen=True, eq=False)
class Answered:
    """All answers to one shipment, in the order of `Shipment.asked`."""

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    timings: tuple[tuple[HopTiming, ...], ...]
    """Per append, per hop."""


@dataclass(eq=False)
class ClientSession:
    """Counts ids and sequence numbers, cuts shipments into segments.

    Every append has at most `segment_rows` rows, so that the next node computes while the rest is on its way.
    """

    settings: SamplingSettings
    segment_rows: int
    epoch: int = 0
    _seq: int = 0
    _next_id: int = ROOT + 1
    _tip: int = ROOT
    _path: list[int] = field(default_factory=list)
    """Walked and not yet committed on the nodes."""

    def prefill(self, prompt: Sequence[int]) -> Shipment:
        """The prompt, as chains that join the trunk; only its last token is answered."""
        appends = []
        for start in range(0, len(prompt), self.segment_rows):
            tokens = prompt[start : start + self.segment_rows]
            last = start + len(tokens) == len(prompt)
            parents = np.array([self._tip, *range(self._next_id, self._next_id + len(tokens) - 1)])
            appends.append(self._append([], parents, np.array(tokens), Answers.LAST if last else Answers.NONE, True))
            self._tip = self._next_id - 1
        return Shipment(tuple(appends), np.array([self._tip]))

    def round(self, mandatory: int, draft: DraftTree) -> Shipment:
        """Commit what the last walk accepted; ship the bonus token of that walk with the tree drafted below it."""
        commit, self._path = self._path, []
        self._tip = commit[-1] if commit else self._tip
        root = self._next_id
        ids = np.arange(root, root + 1 + len(draft))
        parents = np.concatenate([[self._tip], ids[draft.parents + 1]]) if len(draft) else np.array([self._tip])
        tokens = np.concatenate([[mandatory], draft.tokens])
        appends = []
        for start in range(0, len(tokens), self.segment_rows):
            rows = slice(start, start + self.segment_rows)
            appends.append(self._append(commit, parents[rows], tokens[rows], Answers.ALL, False, fresh=not start))
            commit = []
        return Shipment(tuple(appends), ids)

    def accept(self, shipment: Shipment, accepted: Sequence[int]) -> None:
        """The walk followed these drafted nodes (indices into the tree) of a round's shipment."""
        self._path = [int(shipment.asked[0]), *(int(shipment.asked[i + 1]) for i in accepted)]

    def gather(self, shipment: Shipment, answers: Sequence[Answer]) -> Answered:
        """Check the answers against what was asked.  Raises Malformed: a node answers what it was not asked."""
        ids = np.concatenate([answer.ids for answer in answers])
        if not np.array_equal(ids, shipment.asked):
            raise Malformed("the tail answered other nodes than it was asked about")
        return Answered(
            tokens=np.concatenate([answer.tokens for answer in answers]).astype(np.int64),
            logprobs=np.concatenate([answer.logprobs for answer in answers]),
            timings=tuple(answer.timings for answer in answers),
        )

    def _append(
        self,
        commit: Sequence[int],
        parents: NDArray[np.int64],
        tokens: NDArray[np.int64],
        answers: Answers,
        prefill: bool,
        *,
        fresh: bool = False,
    ) -> Append:
        append = Append(
            epoch=self.epoch,
            seq=self._seq,
            commit=np.array(commit, np.uint32),
            first_id=self._next_id,
            parents=parents.astype(np.uint32),
            tokens=tokens.astype(np.uint32),
            prefill=prefill,
            answers=answers,
            settings=self.settings,
            skipped=np.zeros(len(tokens), np.bool_),
            fresh=fresh,
        )
        self._seq += 1
        self._next_id += len(tokens)
        return append
