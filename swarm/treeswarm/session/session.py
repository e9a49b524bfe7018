"""A node's side of a session: appends come in, steps for the device go out.  Pure: no I/O, no clock, no tensors.

The tree changes only by appends, in the order of their sequence numbers, and by a resumption, which begins a new epoch.
A hint does not change the tree.  A row that still waits for the device is dead, and is not computed, if the commits or
the newest hint have left its branch.

An epoch is the configuration of a chain between two repairs.  When a repair begins a new one, a surviving node cuts its
trunk back to what every survivor has.  A node that replaces a lost one gets those rows replayed, and holds appends back
until it has all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from treeswarm.errors import Refused
from treeswarm.protocol.messages import Answers, Append, FaultCode, Hint, Resumption
from treeswarm.protocol.prefix import PREFIX_TOKENS
from treeswarm.session.paths import RowPaths
from treeswarm.session.steps import Step
from treeswarm.session.tree import Indices, TokenTree

# Largest number of appends that may overtake a late one and wait for it.  A stream keeps the order, so only a transport
# that does not keep it needs this.  If an append is further ahead, the missing one is lost.
REORDER_WINDOW = 64


@dataclass(frozen=True)
class SessionTerms:
    """What a node granted when it opened the session."""

    epoch: int
    trunk_room: int
    """Largest number of committed tokens."""
    crown_room: int
    """Largest number of crown rows alive at once."""
    credit_rows: int
    """Largest number of rows in flight: received, and their results not yet sent on."""
    vocab_size: int
    row_bytes: int
    """Number of bytes of activations per row on the upstream link; 0 at the head."""
    resumption: Resumption | None = None
    """The text whose rows are replayed first, because this node replaces a lost one; None in a new session."""
    offered: int = 0
    """Number of rows of the prompt that the node has in its prefix cache; the first append says how many are used."""
    alternatives: int = 0
    """Number of the target's best tokens that go with every answered row."""
    alternative_logprobs: bool = False
    """Whether their log-probabilities go with them."""
    keeps_text: bool = False
    """Whether steps come with the path to each row, because the tail applies rules."""
    offered_tokens: tuple[int, ...] = ()
    """Tokens of the offered rows, if the text is kept."""


@dataclass(eq=False)
class _AppendOrder:
    """Puts appends with one count of sequence numbers in order."""

    next_seq: int = 0
    """Sequence number of the append that is due next."""
    early: dict[int, Append] = field(default_factory=dict)
    """Appends that overtook it, by sequence number."""

    def take(self, append: Append) -> None:
        if append.seq < self.next_seq or append.seq in self.early:
            raise Refused(f"append {append.seq} was already received", FaultCode.REPLAYED)
        if append.seq >= self.next_seq + REORDER_WINDOW:
            raise Refused(f"append {append.seq} arrived, but {self.next_seq} is missing", FaultCode.MALFORMED)
        self.early[append.seq] = append

    def due(self) -> Iterator[Append]:
        while (append := self.early.pop(self.next_seq, None)) is not None:
            self.next_seq += 1
            yield append


class NodeSession:
    """The state machine of one session on one node.

    `receive` and `start` raise Refused; after any code but REPLAYED the session is lost.
    """

    def __init__(self, terms: SessionTerms) -> None:
        self.terms = terms
        self.late_frames = 0
        """Number of appends of an old epoch, which are dropped."""
        self._begin(TokenTree(), terms.resumption, [])
        self.offered = terms.offered

    def _begin(self, tree: TokenTree, goal: Resumption | None, text: list[int]) -> None:
        self.tree = tree
        self._text = text
        """Tokens of the trunk, if the text is kept.  Paths refer to the list, so that it may only grow."""
        self._replay_goal = goal
        """The text whose rows must all be replayed before an append is applied, or None once that is done."""
        self._appends, self._replays = _AppendOrder(), _AppendOrder()
        # Rows received whose results have not been sent on, at least one per append.
        self._waiting_rows = self._replayed_rows = 0
        self._slots = np.empty(0, np.int64)
        """Crown slot of each crown node, by crown index."""
        self._skipped: set[int] = set()
        """Ids of crown nodes that were not computed, here or upstream, because they were dead."""
        self._committed_waiting: set[int] = set()
        """Ids of committed nodes whose rows still wait for the device: they must be computed although they left the
        crown."""
        self._started_id = 0
        """Every row with a lower id has been handed to the device or was skipped."""
        self._hint: Hint | None = None
        self.offered = 0
        """Like `SessionTerms.offered` until the first append has said how many of these rows are used, then 0."""
        self._finish_replay()

    @property
    def received(self) -> int:
        """Number of appends received in order in this epoch."""
        return self._appends.next_seq

    @property
    def replayed_rows(self) -> int:
        """Number of replayed rows that were received and not yet sent on."""
        return self._replayed_rows

    def receive(self, append: Append) -> list[Step]:
        """Take one append.  Returns the steps that are now due: usually its own alone, none while an earlier append is
        missing."""
        if append.epoch < self.terms.epoch:
            self.late_frames += 1
            return []
        if append.epoch > self.terms.epoch:
            raise Refused(
                f"epoch {append.epoch} has not begun: this session is in epoch {self.terms.epoch}", FaultCode.MALFORMED
            )
        (self._replays if append.replay else self._appends).take(append)
        self._take_credit(append)
        steps = [self._apply_replay(due) for due in self._replays.due()]
        if self._replay_goal is None:
            steps += [self._apply(due) for due in self._appends.due()]
        return steps

    def resume(self, epoch: int, resumption: Resumption) -> None:
        """Begin a new epoch: cut the trunk back, drop the crown and all that waits.

        Raises Refused and changes nothing if the resumption is not possible.
        """
        self.check_resumption(epoch, resumption)
        self.terms = replace(self.terms, epoch=epoch)
        self._begin(_resumed(resumption), None, self._text[: resumption.trunk_length])

    def check_resumption(self, epoch: int, resumption: Resumption) -> None:
        """Raise Refused if `resume` would."""
        if epoch <= self.terms.epoch:
            raise Refused(f"epoch {epoch} is over: this session is in epoch {self.terms.epoch}", FaultCode.REPLAYED)
        if self._replay_goal is not None or resumption.trunk_length > self.tree.trunk_length:
            raise Refused(
                f"{self.tree.trunk_length} tokens are here, the resumption needs {resumption.trunk_length}",
                FaultCode.NO_JOURNAL,
            )

    def hint(self, hint: Hint) -> None:
        """Learn of a newer tip.  Older and repeated hints are ignored."""
        if self._hint is None or hint.trunk_length > self._hint.trunk_length:
            self._hint = hint

    def start(self, step: Step) -> Step:
        """Return the step as it should run now: without the rows that have died while it waited."""
        self._started_id = max(self._started_id, step.append.first_id + step.append.rows)
        if step.append.prefill:
            return step
        ids = _computed_ids(step)
        indices = self.tree.indices_of(ids)
        alive = indices >= 0
        if self._hint is not None and self._hint.trunk_length > self.tree.trunk_length:
            alive[alive] = self.tree.alive_below(self._hint.tip)[indices[alive]]
        needed = alive | self._take_committed(ids) if self._committed_waiting else alive
        if needed.all():
            return step
        self._skipped.update(ids[(indices >= 0) & ~needed].tolist())
        return prune(step, needed)

    def _take_committed(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of these rows were committed while they waited, and forget that they wait."""
        promised = np.array([i in self._committed_waiting for i in ids.tolist()], np.bool_)
        self._committed_waiting.difference_update(ids[promised].tolist())
        return promised

    def finish(self, step: Step) -> None:
        """Return the credit of the step's rows: its results have been sent on."""
        if step.append.epoch == self.terms.epoch:
            if step.append.replay:
                self._replayed_rows -= _credit_rows(step.append)
            else:
                self._waiting_rows -= _credit_rows(step.append)

    def _take_credit(self, append: Append) -> None:
        if append.replay:
            # The client's credit does not bind the upstream node, which waits for room before it replays more.
            self._replayed_rows += _credit_rows(append)
            return
        self._waiting_rows += _credit_rows(append)
        if self._waiting_rows > self.terms.credit_rows:
            raise Refused(
                f"{self._waiting_rows} rows in flight, but only {self.terms.credit_rows} were granted",
                FaultCode.OUT_OF_CREDIT,
            )

    def _apply_replay(self, append: Append) -> Step:
        if self._replay_goal is None or self.tree.trunk_length + append.rows > self._replay_goal.trunk_length:
            raise Refused("a replay has more rows than were announced", FaultCode.MALFORMED)
        if not append.prefill or len(append.commit) or append.answers is not Answers.NONE:
            raise Refused("a replay must be a prefill without commits and answers", FaultCode.MALFORMED)
        self._check(append)
        step = self._prefill(append, np.empty(0, np.int64))
        self._finish_replay()
        return step

    def _finish_replay(self) -> None:
        """Continue from the resumption's tip once all rows of its text have been replayed."""
        if self._replay_goal is not None and self.tree.trunk_length == self._replay_goal.trunk_length:
            self.tree, self._replay_goal = _resumed(self._replay_goal), None

    def _apply(self, append: Append) -> Step:
        self._use_prefix(append.prefix)
        self._check(append)
        commit_slots = self._commit(append)
        return self._prefill(append, commit_slots) if append.prefill else self._grow(append, commit_slots)

    def _use_prefix(self, prefix: int) -> None:
        offered, self.offered = self.offered, 0
        if prefix > offered or prefix % PREFIX_TOKENS:
            raise Refused(f"a prefix of {prefix} rows was named, but {offered} were offered", FaultCode.MALFORMED)
        if prefix:
            self.tree = replace(self.tree, trunk_length=prefix)
            self._text += self.terms.offered_tokens[:prefix]

    def _check(self, append: Append) -> None:
        if append.rows and int(append.tokens.max()) >= self.terms.vocab_size:
            raise Refused(
                f"token {int(append.tokens.max())} is outside the vocabulary of {self.terms.vocab_size}",
                FaultCode.MALFORMED,
            )
        if len(append.scored) and int(append.scored.max()) >= self.terms.vocab_size:
            raise Refused(
                f"token {int(append.scored.max())}, to be scored, is outside the vocabulary of {self.terms.vocab_size}",
                FaultCode.MALFORMED,
            )
        expected = int((~append.skipped).sum()) * self.terms.row_bytes
        if len(append.hidden) != expected:
            raise Refused(f"{len(append.hidden)} bytes of activations, but {expected} expected", FaultCode.MALFORMED)
        grown = self.tree.trunk_length + len(append.commit) + (append.rows if append.prefill else 0)
        if grown > self.terms.trunk_room:
            raise Refused(
                f"the text would reach {grown} tokens, but only {self.terms.trunk_room} were reserved",
                FaultCode.OUT_OF_ROOM,
            )

    def _commit(self, append: Append) -> NDArray[np.int64]:
        path = append.commit.tolist()
        if lost := self._skipped.intersection(path):
            raise Refused(f"commit names node {min(lost)}, which a hint declared dead", FaultCode.BAD_TREE)
        indices = self.tree.indices_of(path)
        if self.terms.keeps_text:
            self._text += self.tree.tokens[indices].tolist()
        if append.fresh:
            self.tree, kept = self.tree.commit_alone(path), np.empty(0, np.int64)
        else:
            self.tree, kept = self.tree.commit(path)
        commit_slots = self._slots[indices]
        self._slots = self._slots[kept]
        self._committed_waiting.update(i for i in path if i >= self._started_id)
        if self._skipped:
            self._skipped.intersection_update(self.tree.ids.tolist())
        return commit_slots

    def _prefill(self, append: Append, commit_slots: NDArray[np.int64]) -> Step:
        if append.skipped.any():
            raise Refused("prefill rows cannot be skipped", FaultCode.BAD_TREE)
        before = self.tree.trunk_length
        self.tree = self.tree.join(append.first_id, append.parents)
        rows, tokens = np.arange(append.rows), append.tokens.astype(np.int64)
        paths = self._paths(before, rows - 1, tokens, rows)
        if self.terms.keeps_text:
            self._text += append.tokens.tolist()
        self._slots = self._slots[:0] if append.rows else self._slots
        return Step(
            append=append,
            commit_slots=commit_slots,
            trunk_length=before,
            positions=np.arange(before, before + append.rows),
            tokens=tokens,
            slots=np.empty(0, np.int64),
            visible=np.tri(append.rows, dtype=np.bool_),
            computed=np.ones(append.rows, np.bool_),
            answered=_answered(append.answers, append.rows),
            alternatives=self.terms.alternatives,
            alternative_logprobs=self.terms.alternative_logprobs,
            paths=paths,
        )

    def _grow(self, append: Append, commit_slots: NDArray[np.int64]) -> Step:
        old = len(self.tree)
        self.tree = self.tree.add(append.first_id, append.parents, append.tokens)
        self._slots = np.concatenate([self._slots, self._free_slots(append.rows)])
        computed = self._computed(append, old)
        new = np.arange(old, len(self.tree))[computed]
        visible = np.zeros((len(new), int(self._slots.max(initial=-1)) + 1), np.bool_)
        visible[:, self._slots] = self.tree.ancestors[new]
        return Step(
            append=append,
            commit_slots=commit_slots,
            trunk_length=self.tree.trunk_length,
            positions=self.tree.positions[new],
            tokens=self.tree.tokens[new],
            slots=self._slots[new],
            visible=visible,
            computed=computed,
            answered=_answered(append.answers, len(new)),
            alternatives=self.terms.alternatives,
            alternative_logprobs=self.terms.alternative_logprobs,
            paths=self._paths(self.tree.trunk_length, self.tree.parents, self.tree.tokens, new),
        )

    def _paths(self, length: int, parents: Indices, tokens: Indices, rows: Indices) -> RowPaths | None:
        """Return the paths of rows that end at these nodes below a trunk of `length` tokens, if the text is kept."""
        if not self.terms.keeps_text:
            return None
        if len(self._text) != length:
            raise Refused(f"{len(self._text)} of {length} tokens of the text are known", FaultCode.INTERNAL)
        return RowPaths(self._text, length, parents, tokens, rows)

    def _free_slots(self, count: int) -> NDArray[np.int64]:
        if (needed := len(self._slots) + count) > self.terms.crown_room:
            raise Refused(
                f"the crown would have {needed} rows, but only {self.terms.crown_room} were reserved",
                FaultCode.OUT_OF_ROOM,
            )
        used = np.zeros(self.terms.crown_room, np.bool_)
        used[self._slots] = True
        return np.flatnonzero(~used)[:count]

    def _computed(self, append: Append, old: int) -> NDArray[np.bool_]:
        """Return the rows to compute, bool [rows]: those that were not skipped and that have no skipped ancestor."""
        new_ids = self.tree.ids[old:]
        self._skipped.update(new_ids[append.skipped].tolist())
        if not self._skipped:
            return np.ones(append.rows, np.bool_)
        skipped = np.isin(self.tree.ids, list(self._skipped))
        missing = (self.tree.ancestors[old:] & skipped).any(axis=1)
        if (missing & ~append.skipped).any():
            self._skipped.update(new_ids[missing].tolist())
        return np.asarray(~missing)


def _credit_rows(append: Append) -> int:
    """Return the rows of credit that an append takes: at least one, so that empty appends are limited too."""
    return max(1, append.rows)


def _resumed(resumption: Resumption) -> TokenTree:
    return TokenTree(resumption.trunk_length, resumption.tip, resumption.tip + 1)


def prune(step: Step, needed: NDArray[np.bool_]) -> Step:
    """Return the step without the computed rows that are not `needed`, bool [computed rows]."""
    computed = step.computed.copy()
    computed[computed] = needed
    renumbered = np.cumsum(needed) - 1
    return replace(
        step,
        positions=step.positions[needed],
        tokens=step.tokens[needed],
        slots=step.slots[needed],
        visible=step.visible[needed],
        computed=computed,
        answered=renumbered[step.answered[needed[step.answered]]],
        paths=None if step.paths is None else step.paths.select(needed),
    )


def incoming_rows(step: Step) -> NDArray[np.int64]:
    """Return which rows of `append.hidden` belong to the step's rows: rows may have died since they were sent."""
    return np.flatnonzero(step.computed[~step.append.skipped])


def _computed_ids(step: Step) -> NDArray[np.int64]:
    return step.append.first_id + np.flatnonzero(step.computed)


def answered_ids(step: Step) -> NDArray[np.uint32]:
    """Return the ids of the tree nodes that the step's answer is about, uint32 [answered rows]."""
    return _computed_ids(step)[step.answered].astype(np.uint32)


def _answered(answers: Answers, rows: int) -> NDArray[np.int64]:
    match answers:
        case Answers.NONE:
            return np.empty(0, np.int64)
        case Answers.LAST:
            return np.arange(max(rows - 1, 0), rows)
        case Answers.ALL:
            return np.arange(rows)
