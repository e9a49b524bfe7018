"""Masks of one text: which tokens its grammar allows after every path of a tree.

One matcher moves through the tree, path by path: back to where the next path leaves the last one, then on.  Going back
takes a microsecond, and memory does not grow with the tree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from time import thread_time

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from treeswarm.errors import BadRequest
from treeswarm.grammar.bits import Mask, clear_token, has_token, mask_words, only_token, set_token
from treeswarm.session.paths import RowPaths

# Processor time of masks that a text may use at first, and per row on average: 64 rows of a schema over 151k tokens
# take 1.6 ms.  A grammar that needs more would hold up the sessions of others.
FIRST_S, ROW_S = 2.0, 0.010
MOST_ERROR_CHARACTERS = 300


@dataclass(eq=False)
class TextMasks:
    """Follows one text and the tree below it.  Calls from several threads take turns."""

    matcher: LLMatcher
    """Matcher at the beginning of the text."""
    vocab_size: int
    end: int
    """Id of the token that stands for the end of the text in the matcher's own masks."""
    ends: tuple[int, ...]
    """Tokens that end the text where it is complete, and are allowed nowhere else."""
    prompt_length: int = 0
    """Number of tokens before the text in the paths of `allowed`."""
    on_failure: Callable[[], None] = lambda: None
    """Called before an error of the matcher is raised."""
    _path: list[int] = field(default_factory=list)
    """Tokens that the matcher has taken, from the text's beginning."""
    _spent_s: float = 0.0
    _rows: int = 0
    _lock: Lock = field(default_factory=Lock)
    _words: NDArray[np.uint32] = field(init=False)
    """The matcher's own mask of one row."""

    def __post_init__(self) -> None:
        self._words = np.zeros(mask_words(max(self.vocab_size, self.end + 1)), np.uint32)

    def allowed(self, paths: RowPaths) -> Mask:
        """Return the masks after each path; see `GrammarPaths`."""
        prompt = self.prompt_length
        if paths.length >= prompt:
            return self.after(paths.text[prompt : paths.length], paths.below())
        return self.after((), [path[prompt - paths.length :] for path in paths.below()])

    def after(self, text: Sequence[int], branches: Sequence[Sequence[int]]) -> Mask:
        """Return the masks after each branch of a tree below a text, uint32 [branches, words].

        `text` is what was generated so far, without the prompt.  After a branch that the grammar does not allow, and
        after the end of a text, no token is.  Raises BadRequest if the text itself does not follow the grammar, or if
        the grammar has become too large or too slow.
        """
        masks = np.zeros((len(branches), mask_words(self.vocab_size)), np.uint32)
        with self._lock:
            start = thread_time()
            if not self._move(0, text):
                if any(token in self.ends for token in text):
                    return masks
                raise BadRequest("the text does not follow its grammar")
            for row in sorted(range(len(branches)), key=lambda row: tuple(branches[row])):
                if self._move(len(text), branches[row]):
                    masks[row] = self._mask()
            self._count(thread_time() - start, len(branches))
        return masks

    def forced_run(self, text: Sequence[int], most: int) -> list[int]:
        """Return the tokens that must follow a text, each the only one that the grammar allows: at most `most`."""
        run: list[int] = []
        while len(run) < most and (token := only_token(self.after(text, [run])[0])) is not None:
            run.append(token)
            if token in self.ends:
                break
        return run

    def follows(self, text: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many of `tokens` the grammar allows one after the other below a text, an end token included."""
        with self._lock:
            self._move(0, text)
            if self._move(len(text), tokens):
                return len(tokens)
            taken = len(self._path) - len(text)
            if tokens[taken] in self.ends and has_token(self._mask(), tokens[taken]):
                return taken + 1
            return taken

    def _move(self, start: int, branch: Sequence[int]) -> bool:
        """Move the matcher to the end of a branch of its path, and return whether the grammar allows all of it.

        The branch begins after the first `start` tokens of the path.
        """
        same = start + common_length(self._path[start:], branch)
        if len(self._path) > same:
            self._check(self.matcher.rollback(len(self._path) - same))
            del self._path[same:]
        rest = list(branch[same - start :])
        # The token for the end is none of the model's, although a padded vocabulary may have its id.
        known = rest.index(self.end) if self.end in rest else len(rest)
        taken = self.matcher.try_consume_tokens(rest[:known]) if known else 0
        self._path += rest[:taken]
        self._check(True)
        return taken == len(rest)

    def _mask(self) -> Mask:
        """Return the mask where the matcher is, uint32 [words]."""
        self.matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check(True)
        is_complete = has_token(self._words, self.end)
        mask = self._words[: mask_words(self.vocab_size)].copy()
        if self.end < self.vocab_size:
            clear_token(mask, self.end)
        if self.vocab_size % 32:
            mask[-1] &= np.uint32((1 << self.vocab_size % 32) - 1)
        for token in self.ends:
            (set_token if is_complete else clear_token)(mask, token)
        return mask

    def _check(self, succeeded: bool) -> None:
        """Raise BadRequest if the matcher has failed: its masks would allow nothing but the end."""
        if not succeeded or self.matcher.is_error():
            self.on_failure()
            reason = " ".join(self.matcher.get_error().split())
            raise BadRequest(f"the grammar has become too large: {reason[:MOST_ERROR_CHARACTERS]}")

    def _count(self, seconds: float, rows: int) -> None:
        """Raise BadRequest if the masks so far took too long."""
        self._spent_s += seconds
        self._rows += rows
        if self._spent_s > FIRST_S + ROW_S * self._rows:
            raise BadRequest(
                f"the grammar is too slow: its masks took {self._spent_s / self._rows * 1e3:.0f} ms per token, at most "
                f"{ROW_S * 1e3:.0f} ms are taken: use a simpler one"
            )


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two texts have in common from the beginning."""
    shorter = min(len(one), len(other))
    if list(one[:shorter]) == list(other[:shorter]):
        return shorter
    return next(i for i in range(shorter) if one[i] != other[i])
