"""What rules do to logits, as a pure function of the path to each row.

Only the tokens that some path or rule names are touched: the columns of `LogitEdits`.  What a text's trunk adds to them
is counted as it grows; each row of a tree adds the nodes on its own path.  Formulas and their order are transformers'
own, and those of OpenAI and vLLM where transformers has none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from treeswarm.protocol.text_rules import RulesRequest, TextRules
from treeswarm.session.paths import END, RowPaths

Bans = list[tuple[int, int]]
"""Pairs of a row and a token that it must not choose."""


@dataclass(frozen=True, eq=False)
class LogitEdits:
    """What rules change in n rows of logits."""

    rules: TextRules
    tokens: NDArray[np.int64]
    """Token of each column, all different, int64 [m]."""
    bias: NDArray[np.float32]
    """What is added to each column, float32 [m]."""
    seen: NDArray[np.bool_]
    """Whether the row's prompt or output has the token, bool [n, m]."""
    counts: NDArray[np.int32]
    """Number of times that the row's output has the token, int32 [n, m]."""
    banned: NDArray[np.bool_]
    """Whether the row must not choose the token, bool [n, m]."""
    masks: NDArray[np.uint32] | None = None
    """Which tokens a grammar allows after each row, as packed bits (`grammars.py`), or None without a grammar."""

    def within(self, vocab_size: int) -> "LogitEdits":
        """Return the edits of a model that has fewer tokens."""
        kept = self.tokens < vocab_size
        if kept.all():
            return self
        columns = (self.tokens[kept], self.bias[kept], self.seen[:, kept], self.counts[:, kept], self.banned[:, kept])
        return LogitEdits(self.rules, *columns, self.masks)

    def edited(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return what the columns' logits become, float32 [n, m]; masks are for the caller to apply."""
        rules, edited = self.rules, logits
        if rules.logit_bias:
            edited = edited + self.bias
        if rules.repetition_penalty != 1.0:
            penalty = np.float32(rules.repetition_penalty)
            penalised = np.where(edited < 0, edited * penalty, edited / penalty)
            edited = np.where(self.seen, penalised, edited)
        if rules.frequency_penalty:
            edited = edited - np.float32(rules.frequency_penalty) * self.counts.astype(np.float32)
        if rules.presence_penalty:
            edited = edited - np.float32(rules.presence_penalty) * (self.counts > 0).astype(np.float32)
        if self.banned.any():
            edited = np.where(self.banned, np.float32(-np.inf), edited)
        return np.asarray(edited, np.float32)


@dataclass(eq=False)
class RuledText:
    """One text and its rules.  It counts what the text's trunk has; one thread at a time uses it."""

    request: RulesRequest
    _text: Sequence[int] = ()
    """Text whose first `_length` tokens are counted."""
    _length: int = 0
    _column: dict[int, int] = field(default_factory=dict)
    """Column of each token that the counted text or a rule names."""
    _seen: list[bool] = field(default_factory=list)
    """Whether the counted text has the token of each column."""
    _counts: list[int] = field(default_factory=list)
    """Number of times that the counted output has it."""
    _followers: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    """Last token of each n-gram in the counted text, by the tokens before it."""

    def __post_init__(self) -> None:
        rules = self.rules
        self._penalises = bool(rules.repetition_penalty != 1.0 or rules.presence_penalty or rules.frequency_penalty)
        self._never = [word[0] for word in rules.bad_words if len(word) == 1]
        self._words: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for word in rules.bad_words:
            if len(word) > 1:
                self._words.setdefault(word[-2], []).append((word[:-1], word[-1]))
        self._begin(())

    @property
    def rules(self) -> TextRules:
        """The rules of the text."""
        return self.request.rules

    def edits(self, paths: RowPaths, masks: NDArray[np.uint32] | None = None) -> LogitEdits:
        """Return what the rules change after each path; `masks` are what a grammar allows there.

        A grammar that allows nothing but end tokens is stronger than `min_tokens`.
        """
        self._count(paths)
        bans = self._bans(paths, masks)
        column, extra = self._column, dict[int, int]()
        named = paths.tokens.tolist() if self._penalises else []
        for token in (*named, *(token for _, token in bans)):
            if token not in column and token not in extra:
                extra[token] = len(column) + len(extra)
        width = len(column) + len(extra)
        place_of = column | extra
        counts, seen = self._counted(paths, [place_of[token] for token in named], width)
        banned = np.zeros((len(paths), width), np.bool_)
        banned[:, [column[token] for token in self._never]] = True
        for row, token in bans:
            banned[row, place_of[token]] = True
        bias = np.zeros(width, np.float32)
        for token, added in self.rules.logit_bias:
            bias[column[token]] = added
        return LogitEdits(self.rules, np.array([*column, *extra], np.int64), bias, seen, counts, banned, masks)

    def allowed(self, paths: RowPaths, tokens: Sequence[int], masks: NDArray[np.uint32] | None = None) -> list[bool]:
        """Return which tokens may follow the path of a single row."""
        self._count(paths)
        banned = {*self._never, *(token for _, token in self._bans(paths, masks))}
        if masks is None:
            return [token not in banned for token in tokens]
        words = masks[0].tolist()
        return [
            token not in banned and token // 32 < len(words) and bool(words[token // 32] >> token % 32 & 1)
            for token in tokens
        ]

    def _counted(
        self, paths: RowPaths, places: Sequence[int], width: int
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return how often the output of each row's path has the token of each column, and which tokens it has at all.

        `places` are the columns of the nodes' tokens, or empty if nothing counts them.  Each node adds its own token to
        what its parent has, so that a deep tree costs no more than a broad one.
        """
        nodes = len(places)
        counts, seen = np.zeros((nodes + 1, width), np.int32), np.zeros((nodes + 1, width), np.bool_)
        counts[-1, : len(self._counts)], seen[-1, : len(self._seen)] = self._counts, self._seen
        first_output = self.request.prompt_length - paths.length
        depths: list[int] = []
        for node, (parent, place) in enumerate(zip(paths.parents.tolist()[:nodes], places, strict=True)):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            counts[node], seen[node] = counts[parent], seen[parent]  # The last row is the text's own end, END.
            seen[node, place] = True
            counts[node, place] += depths[node] >= first_output
        rows = paths.rows if nodes else np.full(len(paths), END)
        return counts[rows], seen[rows]

    def _count(self, paths: RowPaths) -> None:
        """Count the tokens by which the common text has grown; count anew after a repair."""
        if paths.length < self._length or (self._text is not paths.text and not self._continues(paths)):
            self._begin(paths.text)
        self._text = paths.text
        size = self.rules.no_repeat_ngram_size
        new = range(self._length, paths.length)
        if self._penalises:
            for position in new:
                place = self._place(paths.text[position])
                self._seen[place] = True
                self._counts[place] += position >= self.request.prompt_length
        for end in new if size else ():
            if end + 1 >= size:
                gram = tuple(paths.text[end + 1 - size : end])
                self._followers.setdefault(gram, []).append(paths.text[end])
        self._length = paths.length

    def _continues(self, paths: RowPaths) -> bool:
        return list(paths.text[: self._length]) == list(self._text[: self._length])

    def _begin(self, text: Sequence[int]) -> None:
        self._text, self._length = text, 0
        self._column, self._seen, self._counts, self._followers = {}, [], [], {}
        for token in (*self._never, *(token for token, _ in self.rules.logit_bias)):
            self._place(token)

    def _place(self, token: int) -> int:
        """Return the column of a token, a new one if it has none."""
        place = self._column.setdefault(token, len(self._column))
        if place == len(self._seen):
            self._seen.append(False)
            self._counts.append(0)
        return place

    def _bans(self, paths: RowPaths, masks: NDArray[np.uint32] | None) -> Bans:
        rules = self.rules
        if not (rules.no_repeat_ngram_size or rules.bad_words or rules.min_tokens):
            return []
        below = paths.below()
        context = max(rules.no_repeat_ngram_size, *map(len, rules.bad_words), 1)
        end = list(paths.text[max(0, paths.length - context) : paths.length])
        ends_alone = self._allows_only_ends(masks, len(below))
        bans: Bans = []
        for row, path in enumerate(below):
            bans += ((row, token) for token in self._banned_after(end, path))
            generated = paths.length + len(path) - self.request.prompt_length
            if generated < rules.min_tokens and not ends_alone[row]:
                bans += ((row, token) for token in rules.end_tokens)
        return bans

    def _banned_after(self, end: list[int], path: Sequence[int]) -> list[int]:
        """Return the tokens that n-grams and longer bad words exclude after the text's `end` and a path below it."""
        tokens, size = [*end, *path], self.rules.no_repeat_ngram_size
        banned: list[int] = []
        for prefix, last in self._words.get(tokens[-1], ()) if tokens else ():
            if tuple(tokens[-len(prefix) :]) == prefix:
                banned.append(last)
        if size and len(tokens) >= size - 1:
            gram = tokens[len(tokens) + 1 - size :]
            banned += self._followers.get(tuple(gram), ())
            for last in range(max(len(end), size - 1), len(tokens)):
                if tokens[last + 1 - size : last] == gram:
                    banned.append(tokens[last])
        return banned

    def _allows_only_ends(self, masks: NDArray[np.uint32] | None, rows: int) -> NDArray[np.bool_]:
        """Return the rows after which a grammar allows end tokens alone, bool [rows]."""
        if masks is None:
            return np.zeros(rows, np.bool_)
        ends = np.zeros(masks.shape[1], np.uint32)
        for token in self.rules.end_tokens:
            if token // 32 < len(ends):
                ends[token // 32] |= np.uint32(1 << token % 32)
        return np.asarray(~(masks & ~ends).any(axis=1))
