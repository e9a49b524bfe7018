"""A toy head whose taps lie on several toy nodes: its sums can be computed from a text alone, and so checked."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from treeswarm.protocol.spans import Span
from treeswarm_node.engine.tap_slice import TapSlice
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest

TAPS = (0, 2, 3)
"""One tapped block of each of the toy swarm's three spans."""
HIDDEN, SIZE = 6, 8
# Two roundings to 127 levels, and numbers of up to some dozens.
TOLERANCE = 0.5


def tap_state(block: int, context: Sequence[int]) -> list[float]:
    """Return what a tapped block returns for a row that sees `context`, itself included."""
    digest = hashlib.blake2b(bytes([block, *context]), digest_size=HIDDEN).digest()
    return [byte % 13 - 6.0 for byte in digest]


def tap_states(blocks: Sequence[int], contexts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return what tapped blocks return, side by side, [rows, blocks · hidden]."""
    rows = [[value for block in blocks for value in tap_state(block, context)] for context in contexts]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(contexts), len(blocks) * HIDDEN)


def toy_slice(span: Span, window: int = 64) -> TapSlice:
    """Return the part of the toy head that a node with these blocks has."""
    matrix = torch.randn(len(TAPS), SIZE, HIDDEN, generator=torch.Generator().manual_seed(1))
    columns = {tap: matrix[i] for i, tap in enumerate(TAPS) if span.start <= tap < span.end}
    return TapSlice("01" * 8, TAPS, columns, SIZE, window)


@dataclass
class ToyTapSpeculator:
    """Guesses the text that it is given, and checks the sums of all rows that it reads."""

    text: Sequence[int]
    """Prompt and the whole answer: every walk follows it."""
    window: int = 64
    taps: tuple[int, ...] = TAPS
    name: str = "toy"
    agreement: float = 0.0
    rows_read: list[list[bool]] = field(default_factory=list)
    """Which of the rows that each proposal read had sums."""
    first_positions: list[int] = field(default_factory=list)
    """Position of the first row that each proposal read."""

    def __post_init__(self) -> None:
        self.tap_slice = toy_slice(Span(3, 4), self.window)
        self._whole = toy_slice(Span(0, 4))

    def new_memory(self) -> None:
        return None

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        first, sums = request.first_position, request.sums
        assert sums is not None
        assert sums.known[0]
        assert sums.blocks == (3,)
        contexts = [self.text[: first + i + 1] for i in range(len(request.next_tokens))]
        assert [*self.text[first + 1 :]][: len(contexts)] == request.next_tokens.tolist()
        whole = self._whole.contribution(tap_states(TAPS, contexts), TAPS)
        fused = sums.values + self.tap_slice.contribution(request.states, sums.blocks)
        known = torch.from_numpy(sums.known)
        assert torch.allclose(fused[known], whole[known], atol=TOLERANCE)
        assert not sums.values[~known].any()
        self.rows_read.append(sums.known.tolist())
        self.first_positions.append(first)
        tokens = np.array(self.text[request.root_position + 1 :][: min(request.size, 6)], np.int64)
        yield SpeculatedTree(np.arange(-1, len(tokens) - 1), tokens, -np.arange(len(tokens), dtype=np.float32))
