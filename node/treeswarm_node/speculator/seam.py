"""The seam between a session at the tail and what guesses its next tokens there.

A session gives a speculator the states of its rows, and asks for the tree below the end of its walk.  The speculator
keeps a memory per session.  `autoregressive.py` is the first kind; every kind is one file behind `Speculator`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm.protocol.sampling import SamplingSettings
from treeswarm_node.engine.tap_slice import TapSlice


@dataclass(frozen=True, eq=False)
class SpeculatedTree:
    """Guesses below a root, best first: parents come before their children, and scores never rise along the array."""

    parents: NDArray[np.int64]
    """Index of each node's parent, or -1 for the root, int64 [n]."""
    tokens: NDArray[np.int64]
    """Token of each node, int64 [n]."""
    scores: NDArray[np.float32]
    """Log of the probability that the target's choices follow the path to each node, float32 [n]."""

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class SpeculationRequest:
    """Everything that one proposal needs.  It is complete, so that the session may go on meanwhile."""

    memory: Any
    """The session's memory, as `Speculator.new_memory` made it."""
    first_position: int
    """Position in the text of the first new row; the memory forgets what it has from there on."""
    states: torch.Tensor
    """States of the new rows, float [n, taps · hidden], n at least 1.  Where sums came with the rows, these are the
    taps of `blocks` alone."""
    next_tokens: NDArray[np.int64]
    """Token after each of these rows, int64 [n].  The last one is the root of the tree."""
    settings: SamplingSettings
    size: int
    """Largest number of nodes of the tree."""
    sums: "RowSums | None" = None
    """What other nodes' taps add up to at these rows, or None if this node taps all blocks itself."""

    @property
    def root_position(self) -> int:
        """Position in the text of the tree's root."""
        return self.first_position + len(self.next_tokens)


@dataclass(frozen=True, eq=False)
class RowSums:
    """What the taps of other nodes add up to at some rows of a text."""

    values: torch.Tensor
    """Sums of the rows, float32 [n, size]; 0 where none came."""
    known: NDArray[np.bool_]
    """Rows whose sums came, bool [n].  The first one is among them.  The speculator does without the others' states."""
    blocks: tuple[int, ...]
    """Tapped blocks of this node, which are to be added, rising."""


class Speculator(Protocol):
    """Proposes trees.  It is used in the device thread, by one proposal at a time."""

    @property
    def name(self) -> str:
        """Name of the kind, which the node's record and its clients show, or an empty string if it proposes no more."""
        ...

    @property
    def agreement(self) -> float:
        """Share of held-out tokens that its first guess names, or 0 if that is not known."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """Indices of the blocks whose results are the states, rising."""
        ...

    @property
    def window(self) -> int:
        """Number of rows before the root that matter: sessions keep no more states than that."""
        ...

    def new_memory(self) -> Any:
        """Return the memory of a new session."""
        ...

    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        """Read the new rows, and yield the tree as it grows: after each step a better one.

        Each step is one small forward.  Between two steps other sessions may compute, and the caller may stop.
        """
        ...


@runtime_checkable
class ReadsTapSums(Speculator, Protocol):
    """A speculator whose taps may lie on several nodes, as it takes `SpeculationRequest.sums`."""

    @property
    def tap_slice(self) -> TapSlice:
        """The part of its first matrix that belongs to this node."""
        ...


def can_tap(taps: Collection[int], start: int, end: int) -> bool:
    """Return whether a span of blocks start up to, not including, end computes all the tapped blocks."""
    return all(start <= tap < end for tap in taps)
