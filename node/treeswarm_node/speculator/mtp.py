"""The multi-token prediction layer of a checkpoint as a speculator: transformers' own module, with a tree below it.

Such a layer pairs the model's last state at a row with the token after it, as a head does.  Below its own guesses it
goes on with its own result, as serving engines use a checkpoint's single layer for several tokens.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import DynamicCache
from transformers.modeling_layers import MtpModel

from treeswarm_node.speculator.files import SpeculatorConfig
from treeswarm_node.speculator.growth import grow
from treeswarm_node.speculator.guesses import GuessScorer
from treeswarm_node.speculator.seam import SpeculatedTree, SpeculationRequest

MTP = "mtp"
"""Name of this kind of speculator."""
# Number of rows, itself included, that a row attends to.  The layer attends to whole texts in training; keys and values
# of DeepSeek-V3's take 82 KB per row, and what is far away says little about the next few tokens.
WINDOW = 512


class MtpMemory:
    """Keys and values of the last rows of one session."""

    def __init__(self) -> None:
        self.cache: Any = DynamicCache()
        self.start = 0
        """Position in the text of the first row."""
        self.rows = 0
        """Number of rows of the text; the cache may have those of an earlier tree after them."""

    def cut(self, position: int) -> None:
        """Forget the rows from `position` on, and all rows if the next one would not follow on them."""
        kept = position - self.start
        if 0 < kept <= self.rows:
            layer = self.cache.layers[0]
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
            self.rows = kept
        else:
            self.cache, self.start, self.rows = DynamicCache(), position, 0

    def add(self, rows: int, window: int) -> None:
        """Take note of rows that are in the cache now, and forget those that no later row attends to."""
        self.rows += rows
        if (surplus := self.rows - window) > 0:
            layer = self.cache.layers[0]
            layer.keys, layer.values = layer.keys[:, :, surplus:].clone(), layer.values[:, :, surplus:].clone()
            self.start, self.rows = self.start + surplus, window


class MtpSpeculator:
    """Proposes trees with the first multi-token prediction layer of a checkpoint."""

    name = MTP
    agreement = 0.0
    window = WINDOW

    def __init__(
        self, config: SpeculatorConfig, model: MtpModel, norm: torch.nn.Module, embedding: torch.Tensor,
        lm_head: torch.Tensor,
    ) -> None:  # fmt: skip
        """`norm` is the target's last one, behind which the layer reads."""
        self.config, self.taps = config, config.taps
        self.model, self.norm, self.embedding, self.lm_head = model, norm, embedding, lm_head
        self._dtype: torch.dtype = model.layers[0].eh_proj.weight.dtype
        self._scorer = GuessScorer(config, torch.arange(len(lm_head), device=lm_head.device))

    def new_memory(self) -> MtpMemory:
        """See `Speculator`."""
        return MtpMemory()

    @torch.inference_mode()
    def propose(self, request: SpeculationRequest) -> Iterator[SpeculatedTree]:
        """See `Speculator`."""
        memory: MtpMemory = request.memory
        memory.cut(request.first_position)
        result = self._read(memory, request)
        tree = _MtpTree(self, memory, request, result[-1:])
        tokens, scores = self.children(result[-1:], np.array([request.root_position + 1]), request)
        yield from grow(request.size, tokens[0], scores[0], tree.expand)

    def _read(self, memory: MtpMemory, request: SpeculationRequest) -> torch.Tensor:
        """Add the new rows to the memory, and return their results [n, hidden]."""
        states = self.norm(request.states.to(self.lm_head.device, self._dtype))
        positions = torch.arange(request.first_position, request.root_position, device=states.device)
        seen = torch.arange(memory.start, request.root_position, device=states.device)
        mask = (seen <= positions[:, None]) & (seen > positions[:, None] - self.window)
        result = self.run(states, request.next_tokens, positions, mask, memory)
        memory.add(len(positions), self.window)
        return result

    def run(
        self,
        states: torch.Tensor,
        tokens: NDArray[np.int64],
        positions: torch.Tensor,
        mask: torch.Tensor,
        memory: MtpMemory,
    ) -> torch.Tensor:
        """Add rows with these states and next tokens to the cache, and return their results [n, hidden].

        `positions` int64 [n] are those of the rows; the layer counts a row by its token, which is one further on.
        `mask` is bool [n, rows in the cache and these].
        """
        ids = torch.from_numpy(tokens).to(self.embedding.device)
        embedded = self.embedding[ids].to(states.device, self._dtype)[None]
        at = positions[None] + 1
        bias = torch.zeros(mask.shape, dtype=self._dtype, device=states.device)
        bias.masked_fill_(~mask, torch.finfo(self._dtype).min)
        result: torch.Tensor = self.model.layers[0](
            embedded,
            states[None],
            position_embeddings=self.model.rotary_emb(embedded, position_ids=at),
            attention_mask=bias[None, None],
            position_ids=at,
            past_key_values=memory.cache,
        )
        return result[0]

    def children(
        self, result: torch.Tensor, positions: NDArray[np.int64], request: SpeculationRequest
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the best tokens at `positions` [n], and their log-scores, [n, WIDTH] each, best first."""
        logits = torch.nn.functional.linear(result.to(self.lm_head.dtype), self.lm_head)
        return self._scorer.children(logits, positions, request.settings)


class _MtpTree:
    """The nodes of one tree as far as they are computed; their keys and values follow the text's in the cache."""

    def __init__(
        self, speculator: MtpSpeculator, memory: MtpMemory, request: SpeculationRequest, root_result: torch.Tensor
    ) -> None:
        self._speculator, self._memory, self._request = speculator, memory, request
        self._text_rows, self._text_start = memory.rows, memory.start
        self._results = [root_result[0]]
        """Results of the root and, after it, of the computed nodes."""
        self._paths: list[tuple[int, ...]] = [()]
        """Places of the nodes that each of them sees besides the text, itself included, counted after the text."""
        self._place_of = {-1: 0}
        """Place of each computed node among the results, by its number in the tree."""

    def expand(
        self, nodes: NDArray[np.int64], parents: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `growth.ExpandNodes`."""
        above = [self._place_of[parent] for parent in parents.tolist()]
        first = len(self._results)
        paths = [(*self._paths[place], first - 1 + i) for i, place in enumerate(above)]
        depths = torch.tensor([len(path) for path in paths])
        positions = (self._request.root_position - 1 + depths).to(self._results[0].device)
        mask = torch.zeros(len(paths), self._text_rows + first - 1 + len(paths), dtype=torch.bool)
        seen = torch.arange(self._text_start, self._text_start + self._text_rows)
        mask[:, : self._text_rows] = seen > positions.cpu()[:, None] - self._speculator.window
        for row, path in enumerate(paths):
            mask[row, [self._text_rows + place for place in path]] = True
        states = torch.stack([self._results[place] for place in above])
        result = self._speculator.run(states, tokens, positions, mask.to(states.device), self._memory)
        self._place_of.update({node: first + i for i, node in enumerate(nodes.tolist())})
        self._results += list(result)
        self._paths += paths
        return self._speculator.children(result, positions.cpu().numpy() + 2, self._request)
