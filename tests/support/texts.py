"""Model one session's text and tree, to compare the code under test with."""

from typing import Any

import numpy as np
from tests.node.conftest import append_of


class Text:
    """Holds one session's text and tree.  Ids count from 1, in the order in which rows are added."""

    def __init__(self, prompt: list[int], random: np.random.Generator, vocab: int) -> None:
        self.trunk = list(range(1, len(prompt) + 1))
        self.tokens = dict(zip(self.trunk, prompt, strict=True))
        self.parents: dict[int, int] = {i: i - 1 for i in self.trunk}
        self.random, self.vocab, self.next_id, self.seq = random, vocab, len(prompt) + 1, 0

    def prefill(self, chunk: int) -> list[Any]:
        """Return the prompt's appends, of `chunk` rows each."""
        appends = []
        for start in range(0, len(self.trunk), chunk):
            ids = self.trunk[start : start + chunk]
            tokens = [self.tokens[i] for i in ids]
            appends.append(append_of(self._next_seq(), ids[0], [i - 1 for i in ids], tokens, prefill=True))
        return appends

    def tree(self, size: int, commit: list[int]) -> tuple[Any, list[int]]:
        """Commit the path `commit`, and return an append of a random tree below the new tip, with its ids."""
        self.trunk += commit
        ids = list(range(self.next_id, self.next_id + size))
        for i in ids:
            self.parents[i] = int(self.random.choice([(self.trunk or [0])[-1], *range(self.next_id, i)]))
            self.tokens[i] = int(self.random.integers(self.vocab))
        self.next_id += size
        append = append_of(
            self._next_seq(), ids[0], [self.parents[i] for i in ids], [self.tokens[i] for i in ids], commit=commit
        )
        return append, ids

    def path(self, node: int) -> list[int]:
        """Return the ids from the first token to `node`."""
        path = []
        while node:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq - 1
