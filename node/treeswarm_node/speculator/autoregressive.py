"""The autoregressive kind of speculator: `head.py` with a window of keys and values per session."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from treeswarm_node.engine.tap_slice import TapSlice, head_digest
from treeswarm_node.speculator.files import AUTOREGRESSIVE, SpeculatorConfig
from treeswarm_node.speculator.growth import grow
from treeswarm_node.speculator.guesses import (
    ConfiguredSpeculator,
    GuessScorer,
    HeadWeights,
    read_saved_head,
)
from treeswarm_node.speculator.head import EPSILON, FIRST_MATRIX, HeadShape, SpeculatorHead
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest


@dataclass(eq=False)
class HeadMemory:
    """Keys and values of the last rows of one session, [kv_heads, rows, dim] each."""

    keys: torch.Tensor
    values: torch.Tensor
    start: int = 0
    """Position in the text of the first row."""

    @classmethod
    def empty(cls, config: SpeculatorConfig, like: torch.Tensor) -> Self:
        """Return a memory without rows, of the dtype and on the device of `like`."""
        rows = like.new_empty(config.kv_heads, 0, config.head_dim)
        return cls(rows, rows)

    @property
    def end(self) -> int:
        """Position in the text after the last row."""
        return self.start + self.keys.shape[1]

    def cut(self, position: int) -> None:
        """Forget the rows from `position` on, and all rows if the next one would not follow on them."""
        kept = position - self.start if self.start <= position <= self.end else 0
        self.start = position - kept
        self.keys, self.values = self.keys[:, :kept], self.values[:, :kept]

    def extend(self, keys: torch.Tensor, values: torch.Tensor, window: int) -> None:
        """Add rows, and forget those that no later row attends to."""
        self.keys = torch.cat([self.keys, keys], 1)
        self.values = torch.cat([self.values, values], 1)
        if (surplus := self.keys.shape[1] - window) > 0:
            self.start += surplus
            # Copies, because a view would keep the whole of what it is a part of.
            self.keys, self.values = self.keys[:, surplus:].clone(), self.values[:, surplus:].clone()


class AutoregressiveSpeculator(ConfiguredSpeculator[SpeculatorHead]):
    """A head that proposes trees: one that was trained here, or a published one."""

    def __init__(
        self,
        config: SpeculatorConfig,
        head: SpeculatorHead,
        weights: HeadWeights,
        digest: str = "",
        hosted: range | None = None,
    ) -> None:
        """`hosted` are the places, in the config's taps, of those that this node hosts; None is for all.

        `digest` is that of the head's first matrix, by which nodes with other taps know it.
        """
        self.config = config
        self.name = config.kind
        self.head = head.eval().requires_grad_(False)
        self.weights = weights
        self._scorer = GuessScorer(config, weights.vocabulary)
        hosted = range(len(config.taps)) if hosted is None else hosted
        columns = dict(zip((config.taps[i] for i in hosted), head.keep_columns(hosted), strict=True))
        self.tap_slice = TapSlice(digest, config.taps, columns, config.hidden_size, config.window, EPSILON)

    @classmethod
    def load(
        cls, folder: Path, lm_head: torch.Tensor, *, is_tied: bool, dtype: torch.dtype, hosted: range | None = None
    ) -> Self:
        """Load a folder that `swarm train-speculator` wrote, for a target with this LM head [vocabulary, hidden].

        `hosted` are the places of the taps that this node hosts, or None for all.  Raises ModelError.
        """
        saved = read_saved_head(folder, lm_head, is_tied=is_tied, dtype=dtype, kinds=(AUTOREGRESSIVE,))
        head = saved.fill(SpeculatorHead(head_shape(saved.config)))
        digest = head_digest(saved.tensors[FIRST_MATRIX], saved.config.taps, EPSILON)
        return cls(saved.config, head, saved.weights, digest, hosted)

    def new_memory(self) -> HeadMemory:
        """See `Speculator`."""
        return HeadMemory.empty(self.config, self.weights.lm_head)

    @torch.inference_mode()
    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        """See `Speculator`."""
        memory: HeadMemory = request.memory
        memory.cut(request.first_position)
        result = self._read(memory, request)
        tree = _GrowingTree(self, memory, request, result[-1:])
        tokens, scores = self.children(result[-1:], np.array([request.root_position + 1]), request)
        yield from grow(request.size, tokens[0], scores[0], tree.expand)

    def _read(self, memory: HeadMemory, request: SpeculationRequest) -> torch.Tensor:
        """Add the new rows to the memory, and return their results [n, hidden]."""
        device, sums = self.weights.lm_head.device, request.sums
        states, first, tokens = request.states.to(device), request.first_position, request.next_tokens
        if sums is None:
            return self._read_rows(memory, self.head.fused(states), first, tokens)
        fused = sums.values.to(device) + self.tap_slice.contribution(states, sums.blocks)
        fused = fused.to(self.weights.lm_head.dtype)
        results: list[torch.Tensor] = []
        for start, end in known_runs(sums.known):
            # A row without a sum takes the result of the row before for its state, as a node below the root does.
            state = fused[start:end] if sums.known[start] else results[-1][-1:]
            results.append(self._read_rows(memory, state, first + start, tokens[start:end]))
        return torch.cat(results)

    def _read_rows(
        self, memory: HeadMemory, fused: torch.Tensor, first: int, next_tokens: NDArray[np.int64]
    ) -> torch.Tensor:
        """Add rows with these states [n, hidden] to the memory, from position `first` on, and return their results."""
        head, device, state = self.head, fused.device, fused[None]
        positions = torch.arange(first, first + len(next_tokens), device=device)
        query, key, value = head.attention_inputs(state, self.weights.embed(next_tokens), positions)
        keys, values = torch.cat([memory.keys, key[0]], 1), torch.cat([memory.values, value[0]], 1)
        seen = torch.arange(memory.start, memory.start + keys.shape[1], device=device)
        mask = (seen <= positions[:, None]) & (seen > positions[:, None] - self.window)
        result = head.result(state, query, keys[None], values[None], mask)[0]
        memory.extend(key[0], value[0], self.window)
        return result

    def children(
        self, result: torch.Tensor, positions: NDArray[np.int64], request: SpeculationRequest
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best tokens at `positions` [n], and their log-scores, [n, WIDTH] each, best first."""
        logits = self.weights.score(self.head.normed(result))
        return self._scorer.children(logits, positions, request.settings)

    def attend(
        self,
        state: torch.Tensor,
        tokens: NDArray[np.int64],
        positions: NDArray[np.int64],
        memory: HeadMemory,
        crown: "_Crown",
    ) -> torch.Tensor:
        """Compute nodes below a root, add them to the crown, and return their results [n, hidden].

        `crown.visible` must have a row for each of them already.
        """
        device = state.device
        at = torch.from_numpy(positions).to(device)
        query, key, value = self.head.attention_inputs(state[None], self.weights.embed(tokens), at)
        crown.keys.append(key[0])
        crown.values.append(value[0])
        seen = torch.arange(memory.start, memory.end, device=device)
        trunk = seen > at[:, None] - self.window
        mask = torch.cat([trunk, torch.from_numpy(crown.visible[-len(tokens) :]).to(device)], 1)
        keys, values = torch.cat([memory.keys, *crown.keys], 1), torch.cat([memory.values, *crown.values], 1)
        return self.head.result(state[None], query, keys[None], values[None], mask)[0]


@dataclass(eq=False)
class _Crown:
    """Keys, values and ancestors of the nodes computed below a root."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    visible: NDArray[np.bool_] = field(default_factory=lambda: np.empty((0, 0), np.bool_))
    """Nodes that each node sees, itself included, bool [nodes, nodes]."""

    def add(self, rows: NDArray[np.int64]) -> None:
        """Add nodes below the computed nodes `rows`, int64 [n]; -1 is the root."""
        old, new = len(self.visible), len(rows)
        visible = np.zeros((old + new, old + new), np.bool_)
        visible[:old, :old] = self.visible
        visible[old:, :old] = np.where(rows[:, None] >= 0, self.visible[rows], False) if old else False
        visible[old:, old:] = np.eye(new, dtype=np.bool_)
        self.visible = visible


class _GrowingTree:
    """The nodes of one tree as far as they are computed."""

    def __init__(
        self,
        speculator: AutoregressiveSpeculator,
        memory: HeadMemory,
        request: SpeculationRequest,
        root_result: torch.Tensor,
    ) -> None:
        self._speculator, self._memory, self._request = speculator, memory, request
        self._crown = _Crown()
        self._results = root_result
        """Results of the root and, after it, of the computed nodes, [1 + nodes, hidden]."""
        self._row_of = {-1: -1}
        """Row of each computed node, by its number in the tree."""

    def expand(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `growth.ExpandNodes`."""
        above = np.array([self._row_of[parent] for parent in parents.tolist()], np.int64)
        self._row_of.update({node: len(self._results) - 1 + i for i, node in enumerate(nodes.tolist())})
        self._crown.add(above)
        depth = self._crown.visible[-len(nodes) :].sum(1)
        # The head's row of a node stands one position before the node: it pairs a state with the token after it.
        positions = self._request.root_position - 1 + depth
        state = self._results[torch.from_numpy(above + 1).to(self._results.device)]
        result = self._speculator.attend(state, tokens, positions, self._memory, self._crown)
        self._results = torch.cat([self._results, result])
        return self._speculator.children(result, positions + 2, self._request)


def known_runs(known: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the rows that are read in one forward each: runs of known rows, and every other row by itself."""
    starts = [i for i in range(len(known)) if not i or not known[i] or not known[i - 1]]
    return list(zip(starts, [*starts[1:], len(known)], strict=True))


def head_shape(config: SpeculatorConfig) -> HeadShape:
    """Return the sizes of a config's head."""
    return HeadShape(
        hidden_size=config.hidden_size,
        taps=len(config.taps),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        window=config.window,
    )
