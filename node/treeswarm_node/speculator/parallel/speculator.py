"""The parallel kind: one layer guesses a block of positions in one pass (DFlash), and a light step follows the tokens.

The layer is that of the autoregressive head.  The rows of the text are its keys and values, and every position of the
block is a query: the last row's state with a learned vector that names the position.  The step between positions is a
small network that corrects a position's result by the token before it (DSpark).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from treeswarm_node.speculator.autoregressive import HeadMemory, head_shape
from treeswarm_node.speculator.files import PARALLEL, SpeculatorConfig
from treeswarm_node.speculator.guesses import (
    ConfiguredSpeculator,
    GuessScorer,
    HeadWeights,
    read_saved_head,
)
from treeswarm_node.speculator.head import EPSILON, HeadShape, SpeculatorHead
from treeswarm_node.speculator.parallel.lattice import LEVELS, CorrectScores, LatticeTree, make_lattice
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest


class ParallelHead(SpeculatorHead):
    """One layer with a query for each of the next positions."""

    def __init__(self, shape: HeadShape, levels: int = LEVELS) -> None:
        super().__init__(shape)
        self.levels = levels
        hidden = shape.hidden_size
        self.slots = torch.nn.Parameter(torch.zeros(levels, hidden))
        self.step_norm = LlamaRMSNorm(hidden, EPSILON)
        self.step_in = torch.nn.Linear(hidden, hidden // 2, bias=False)
        self.step_token = torch.nn.Linear(hidden, hidden // 2, bias=False)
        self.step_out = torch.nn.Linear(hidden // 2, hidden, bias=False)
        self.step_token_norm = LlamaRMSNorm(hidden, EPSILON)

    @classmethod
    def of(cls, config: SpeculatorConfig) -> Self:
        """Return a layer of a config's sizes, without its weights."""
        return cls(head_shape(config))

    def block(self, states: torch.Tensor, embedded: torch.Tensor, roots: slice = slice(None)) -> torch.Tensor:
        """Return the results [batch, roots, levels, hidden] below some rows of texts.

        `states` [batch, n, taps · hidden] are the target's, and `embedded` [batch, n, hidden] are the embeddings of the
        token after each row.
        """
        rows = torch.arange(states.shape[1], device=states.device)
        state = self.fused(states)
        _, keys, values = self.attention_inputs(state, embedded, rows)
        return self.block_below(state[:, roots], embedded[:, roots], keys, values, rows[roots], rows)

    def block_below(
        self,
        state: torch.Tensor,
        embedded: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        roots: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """Return the results [batch, n, levels, hidden] below rows at positions `roots` [n], given all keys and values.

        `seen` are the positions of the keys.
        """
        batch, count, _ = state.shape
        ahead = torch.arange(self.levels, device=state.device)
        queried = (state[:, :, None] + self.slots).flatten(1, 2)
        tokens = embedded[:, :, None].expand(-1, -1, self.levels, -1).flatten(1, 2)
        positions = (roots[:, None] + ahead).flatten()
        query, _, _ = self.attention_inputs(queried, tokens, positions)
        mask = (seen <= roots.repeat_interleave(self.levels)[:, None]) & (seen > positions[:, None] - self.shape.window)
        return self.result(queried, query, keys, values, mask).view(batch, count, self.levels, -1)

    def followed(self, results: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return results [..., hidden] as they are after tokens with the embeddings `previous` [..., hidden]."""
        inner = self.step_in(self.step_norm(results)) + self.step_token(self.step_token_norm(previous))
        followed: torch.Tensor = results + self.step_out(silu(inner))
        return followed


class ParallelSpeculator(ConfiguredSpeculator[ParallelHead]):
    """A trained layer that proposes trees."""

    name = PARALLEL

    def __init__(self, config: SpeculatorConfig, head: ParallelHead, weights: HeadWeights) -> None:
        self.config, self.weights = config, weights
        self.head = head.eval().requires_grad_(False)
        self.is_refined = True
        """Whether a position's scores follow the token before it."""
        self._scorer = GuessScorer(config, weights.vocabulary)

    @classmethod
    def load(cls, folder: Path, lm_head: torch.Tensor, *, is_tied: bool, dtype: torch.dtype) -> Self:
        """Load a folder; see `AutoregressiveSpeculator.load`."""
        saved = read_saved_head(folder, lm_head, is_tied=is_tied, dtype=dtype, kinds=(PARALLEL,))
        return cls(saved.config, saved.fill(ParallelHead.of(saved.config)), saved.weights)

    def new_memory(self) -> HeadMemory:
        """See `Speculator`."""
        return HeadMemory.empty(self.config, self.weights.lm_head)

    @torch.inference_mode()
    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        """See `Speculator`."""
        results = self._read(request)
        logits = self.weights.score(self.head.normed(results))
        positions = request.root_position + 1 + np.arange(len(results))
        scores = self._scorer.scores(logits, positions, request.settings)
        lattice = make_lattice(scores, self.weights.vocabulary)
        sharpness = self._scorer.sharpness(request.settings)
        places = torch.from_numpy(lattice.places).to(logits.device)
        before_step, rows = logits.gather(1, places).float(), self.weights.lm_head[places]

        @torch.inference_mode()
        def correct(levels: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.float32]:
            at = torch.from_numpy(levels).to(logits.device)
            followed = self.head.followed(results[at], self.weights.embed(before[:, 1])[0])
            normed = self.head.result_norm(followed)
            corrected = torch.einsum("nmh,nh->nm", rows[at], normed).float()
            difference: NDArray[np.float32] = (sharpness * (corrected - before_step[at])).cpu().numpy()
            return difference

        chosen: CorrectScores | None = correct if self.is_refined else None
        yield from LatticeTree(lattice, np.array([0, request.next_tokens[-1]], np.int64), chosen).grow(request.size)

    def _read(self, request: SpeculationRequest) -> torch.Tensor:
        """Add the new rows to the memory, and return the results [levels, hidden] of the block below the last one."""
        memory: HeadMemory = request.memory
        memory.cut(request.first_position)
        head, device = self.head, self.weights.lm_head.device
        first, count = request.first_position, len(request.next_tokens)
        state = head.fused(request.states.to(device))[None]
        embedded = self.weights.embed(request.next_tokens)
        _, keys, values = head.attention_inputs(state, embedded, torch.arange(first, first + count, device=device))
        memory.extend(keys[0], values[0], self.window)
        seen = torch.arange(memory.start, memory.end, device=device)
        return head.block_below(
            state[:, -1:], embedded[:, -1:], memory.keys[None], memory.values[None], seen[-1:], seen
        )[0, 0]
