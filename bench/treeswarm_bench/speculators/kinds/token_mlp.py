"""The MLP kind: a small network goes on from the target's state and the sampled token (arXiv 2404.19124).

It attends to nothing, so it reads one row of a text and has no memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import gelu, linear, rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from treeswarm_node.speculator.files import SpeculatorConfig
from treeswarm_node.speculator.growth import grow
from treeswarm_node.speculator.guesses import ConfiguredSpeculator, GuessScorer, HeadWeights, read_saved_head
from treeswarm_node.speculator.head import EPSILON
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest

MLP = "mlp"


class TokenMlp(torch.nn.Module):
    """A step from one state and the token after it to the next state."""

    def __init__(self, hidden: int, taps: int, width: int) -> None:
        super().__init__()
        self.taps = taps
        self.fuse = torch.nn.Linear(taps * hidden, hidden, bias=False)
        self.state_norm = LlamaRMSNorm(hidden, EPSILON)
        self.token_norm = LlamaRMSNorm(hidden, EPSILON)
        self.state_in = torch.nn.Linear(hidden, width, bias=False)
        self.token_in = torch.nn.Linear(hidden, width, bias=False)
        self.out = torch.nn.Linear(width, hidden, bias=False)
        self.result_norm = LlamaRMSNorm(hidden, EPSILON)

    @classmethod
    def of(cls, config: SpeculatorConfig) -> Self:
        """Return a network of a config's sizes, without its weights."""
        return cls(config.hidden_size, len(config.taps), config.intermediate_size)

    def fused(self, states: torch.Tensor) -> torch.Tensor:
        """Return one state [..., hidden] of the states of all taps [..., taps · hidden], each normed by itself."""
        each = states.to(self.fuse.weight.dtype).view(*states.shape[:-1], self.taps, -1)
        fused: torch.Tensor = self.fuse(rms_norm(each, each.shape[-1:], eps=EPSILON).flatten(-2))
        return fused

    def step(self, state: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Return the results [..., hidden] of rows with these states and the embeddings of the tokens after them."""
        inner = gelu(self.state_in(self.state_norm(state)) + self.token_in(self.token_norm(embedded)))
        result: torch.Tensor = state + self.out(inner)
        return result

    def logits(self, result: torch.Tensor, lm_head: torch.Tensor) -> torch.Tensor:
        """Return the scores [..., tokens] of the token after each row's next one, by an LM head [tokens, hidden]."""
        return linear(self.result_norm(result), lm_head)

    def unroll(self, states: torch.Tensor, embedded: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Return the results of `steps` steps over whole texts; see `SpeculatorHead.unroll`."""
        state, results = self.fused(states), []
        for _ in range(steps):
            results.append(self.step(state, embedded))
            state = torch.nn.functional.pad(results[-1][:, :-1], (0, 0, 1, 0))
        return results


class MlpSpeculator(ConfiguredSpeculator[TokenMlp]):
    """A trained network that proposes trees."""

    name = MLP

    def __init__(self, config: SpeculatorConfig, head: TokenMlp, weights: HeadWeights) -> None:
        self.config, self.weights = config, weights
        self.head = head.eval().requires_grad_(False)
        self._scorer = GuessScorer(config, weights.vocabulary)

    @classmethod
    def load(cls, folder: Path, lm_head: torch.Tensor, *, is_tied: bool, dtype: torch.dtype) -> Self:
        """Load a folder; see `AutoregressiveSpeculator.load`."""
        saved = read_saved_head(folder, lm_head, is_tied=is_tied, dtype=dtype, kinds=(MLP,))
        return cls(saved.config, saved.fill(TokenMlp.of(saved.config)), saved.weights)

    @property
    def window(self) -> int:
        """See `Speculator`: the last row alone."""
        return 1

    def new_memory(self) -> None:
        """See `Speculator`: there is none."""
        return

    @torch.inference_mode()
    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        """See `Speculator`."""
        device = self.weights.lm_head.device
        state = self.head.fused(request.states[-1:].to(device))
        results = self.head.step(state, self.weights.embed(request.next_tokens[-1:])[0])
        depths, row_of = [0], {-1: 0}

        def expand(
            nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64]
        ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            nonlocal results
            above = [row_of[parent] for parent in parents.tolist()]
            row_of.update({node: len(depths) + i for i, node in enumerate(nodes.tolist())})
            depths.extend(depths[row] + 1 for row in above)
            new = self.head.step(results[above], self.weights.embed(tokens)[0])
            results = torch.cat([results, new])
            return children(new, depths[-len(nodes) :])

        def children(result: torch.Tensor, depth: list[int]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
            logits = self.head.logits(result, self.weights.lm_head)
            return self._scorer.children(logits, request.root_position + 1 + np.array(depth), request.settings)

        tokens, scores = children(results, [0])
        yield from grow(request.size, tokens[0], scores[0], expand)
