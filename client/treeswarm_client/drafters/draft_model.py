"""A draft model with a tree-shaped KV cache of its own, behind transformers' attention interface.

Rows 0 to `trunk` are the text; the rows of the nodes drafted below it follow.  When a path is walked, its rows and
those below it move up in place, so that no token is computed twice.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

from treeswarm.errors import ModelError, UnsupportedModel

IMPLEMENTATION = "treeswarm-draft"
FIRST_ROWS = 512
PREFILL_ROWS = 512
# A model of fewer parameters drafts with one thread.  Its small products gain nothing by two, and beside other programs
# each thread waits for the others to be scheduled: a tree of 32 nodes of the bundled draft took 8 ms of processor time
# with one thread and 190 ms with two (24 and 580 ms by the clock), on two cores at a load of 14 (2026-11-30).
ONE_THREAD_PARAMETERS = 50_000_000
# Positions that a draft model uses at most: K and V of so many take 1 GiB for Llama-3.2-1B in float32.
LARGEST_CONTEXT = 16_384
# Tokens from a text's beginning that are never forgotten: attention rests on them (StreamingLLM found four enough).
SINK = 4
# Tokens that are read again when the others are forgotten: half a context, and no more than a second or two of reading.
LARGEST_RECENT = 2048
# Positions kept free below a text for the levels of a tree, where the context is large enough.
LEVELS = 48
# Number of tokens whose logits are compared with those of the model's own attention, when it is loaded.
CHECKED_TOKENS = 24
# Largest difference between logits that should be equal, relative to the largest logit.
TREE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class DraftMemory:
    """Which tokens of a text a draft model remembers: all, or its first ones and those since `start`.  Pure.

    A text that outgrows the context is read anew: its first tokens and its latest ones, as if nothing had been between
    them.  Keys are so never farther away than the model was trained for (LM-Infinite, arXiv 2308.16137), whatever way
    it has of telling positions.
    """

    context: int
    """Number of positions that the model may use."""
    start: int = 0
    """Index in the text of the first token after the gap, or 0 if there is no gap."""

    @property
    def sink(self) -> int:
        """Number of the text's first tokens that are remembered."""
        return min(SINK, self.context // 8)

    @property
    def longest(self) -> int:
        """Largest number of remembered tokens; the other positions are for the tree."""
        return self.context - min(LEVELS, self.context // 4)

    def rows(self, length: int) -> int:
        """Return how many tokens of a text of that length are remembered."""
        return self.sink + length - self.start if self.start else length

    def of(self, text: list[int]) -> list[int]:
        """Return the remembered tokens of a text."""
        return [*text[: self.sink], *text[self.start :]] if self.start else text

    def for_length(self, length: int) -> "DraftMemory":
        """Return this memory if it holds a text of that length, else one with the text's latest tokens."""
        if self.start < length and self.rows(length) <= self.longest:
            return self
        if length <= self.longest:
            return replace(self, start=0)
        return replace(self, start=length - max(min(self.context // 2, LARGEST_RECENT) - self.sink, 1))


@dataclass(frozen=True)
class LocalMask:
    """Stands for the masks of transformers' layers that see only near rows: a window, or the chunk that a row is in."""

    size: int
    """Number of positions in the window, the row's own included, or in a chunk."""
    is_chunk: bool = False
    ndim = 0
    shape = (1 << 40,)
    """Numbers of rows and keys, which are never fewer than a model asks for: no mask is padded."""

    def to(self, *_: Any, **__: Any) -> "LocalMask":
        """Return the mask itself: layers convert masks to their dtype."""
        return self

    def __getitem__(self, _: Any) -> "LocalMask":
        """Return the mask itself: layers cut masks to the keys that they have."""
        return self

    def applied(self, mask: torch.Tensor) -> torch.Tensor:
        """Return `mask`, bool [new rows, rows], without the rows that are too far back.

        A row's position is the number of rows that it sees before itself: rows stand in the order of their depth.
        """
        seen = mask.cumsum(1)
        position = seen[:, -1:] - 1
        reach = position % self.size if self.is_chunk else self.size - 1
        return mask & (position + 1 - seen <= reach)


@dataclass(eq=False)
class TreeCache:
    """The K and V of each layer, [kv_heads, rows, dim] each; their room doubles when it is full."""

    trunk: int = 0
    """Number of rows of the text."""
    used: int = 0
    """Number of rows in use, trunk and crown."""
    mask: torch.Tensor | None = None
    """Mask of the present forward, bool [new rows, used], or None for a single row that sees all rows before it."""
    _local_masks: dict[LocalMask, torch.Tensor] = field(default_factory=dict)
    """Masks of the present forward in layers that see only near rows."""
    device: torch.device = torch.device("cpu")
    _layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def add_trunk(self, count: int) -> None:
        """Prepare a forward that continues the text by `count` tokens, each of which sees those before it."""
        assert self.used == self.trunk, "the crown was neither kept nor dropped"
        before = self.trunk
        self.used = self.trunk = before + count
        causal = torch.ones(count, self.used, dtype=torch.bool, device=self.device).tril(before)
        self.mask = causal if count > 1 else None
        self._local_masks = {}

    def add_crown(self, visible: NDArray[np.bool_]) -> None:
        """Prepare a forward that adds crown rows.

        `visible`, bool [new, crown rows], says which crown rows each of them sees; it sees the whole trunk too.
        """
        new, rows = visible.shape
        self.used = self.trunk + rows
        mask = np.ones((new, self.used), np.bool_)
        mask[:, self.trunk :] = visible
        self.mask = torch.from_numpy(mask).to(self.device)
        self._local_masks = {}

    def mask_in(self, local: LocalMask | None) -> torch.Tensor | None:
        """Return the forward's mask, bool [new rows, used], in layers that see near rows only if `local` says so."""
        if local is None or local.size >= self.used:
            return self.mask
        if local not in self._local_masks:
            whole = torch.ones(1, self.used, dtype=torch.bool, device=self.device) if self.mask is None else self.mask
            self._local_masks[local] = local.applied(whole)
        return self._local_masks[local]

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the forward's rows, [kv_heads, new, dim] each, at the end.  Returns views of all rows in use."""
        start, end = self.used - key.shape[1], self.used
        keys, values = self._room(layer, key, value, end)
        keys[:, start:end], values[:, start:end] = key, value
        return keys[:, :end], values[:, :end]

    @torch.inference_mode()
    def keep(self, rows: NDArray[np.int64], below: NDArray[np.int64]) -> None:
        """Append the crown rows `rows`, in order, to the trunk, and make `below`, in order, the whole crown.

        Both are numbers of crown rows; 0 is the first row of the crown.
        """
        count = len(rows) + len(below)
        if count:
            source = torch.from_numpy(self.trunk + np.concatenate([rows, below]))
            for pair in self._layers.values():
                for pool in pair:
                    pool[:, self.trunk : self.trunk + count] = pool[:, source.to(pool.device)]
        self.trunk += len(rows)
        self.used = self.trunk + len(below)

    def cut(self, length: int) -> None:
        """Forget all rows after the first `length` of the trunk."""
        self.trunk = self.used = min(self.trunk, length)

    def _room(self, layer: int, key: torch.Tensor, value: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self._layers.get(layer)
        if pair is None or pair[0].shape[1] < rows:
            size = FIRST_ROWS
            while size < rows:
                size *= 2
            grown = (
                key.new_zeros(key.shape[0], size, key.shape[2]),
                value.new_zeros(value.shape[0], size, value.shape[2]),
            )
            for old, new in zip(pair or (), grown, strict=False):
                new[:, : old.shape[1]] = old
            self._layers[layer] = pair = grown
        return pair


@dataclass(eq=False)
class DraftModel:
    """A causal language model of transformers, and the KV cache of one text and the tree below it."""

    model: Any
    vocab_size: int
    """Number of token ids whose logits are returned."""
    text: list[int] = field(default_factory=list)
    """Tokens whose K and V are the trunk of the cache."""

    def __post_init__(self) -> None:
        self._cache = TreeCache(device=self.model.device)
        self._embedded = int(self.model.get_input_embeddings().weight.shape[0])
        self._is_small = sum(weight.numel() for weight in self.model.parameters()) < ONE_THREAD_PARAMETERS

    @contextlib.contextmanager
    def fitting_threads(self) -> Iterator[None]:
        """Compute with one thread in this context if the model is small, and with torch's own number otherwise."""
        usual = torch.get_num_threads()  # of the calling thread: each thread has a number of its own
        if usual == 1 or not self._is_small:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(usual)

    def cut(self, length: int) -> None:
        """Forget the tree, and the text after its first `length` tokens."""
        self._cache.cut(length)
        del self.text[length:]

    def keep(self, path: list[int], rows: NDArray[np.int64], below: NDArray[np.int64]) -> None:
        """Add the tokens `path`, whose crown rows are `rows`, to the text; the crown rows `below` become the crown."""
        self._cache.keep(rows, below)
        self.text += path

    def feed(self, tokens: list[int]) -> torch.Tensor:
        """Add tokens to the text.

        Returns the logits after the last one, float32 [1, vocab], or [0, vocab] without tokens.
        """
        logits = torch.empty(0, self.vocab_size)
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = tokens[start : start + PREFILL_ROWS]
            before = self._cache.trunk
            self._cache.add_trunk(len(part))
            logits = self._forward(np.array(part), np.arange(before, before + len(part)), last=True)
            self.text += part
        return logits

    def add_nodes(
        self, visible: NDArray[np.bool_], tokens: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> torch.Tensor:
        """Add n rows to the crown.

        `visible`, bool [n, crown rows], says which crown rows each of them sees.  Returns their logits, float32
        [n, vocab].
        """
        self._cache.add_crown(visible)
        return self._forward(tokens, positions)

    @torch.inference_mode()
    def _forward(self, tokens: NDArray[np.int64], positions: NDArray[np.int64], *, last: bool = False) -> torch.Tensor:
        """Compute the rows last added to the cache.  Returns their logits, float32 [n, vocab], or those of the last
        row, float32 [1, vocab]."""
        device = self.model.device
        # A target of the same family may have special tokens that the draft lacks: it reads any token in their place.
        tokens = np.minimum(tokens, self._embedded - 1)
        with self.fitting_threads():
            output = self.model(
                input_ids=torch.from_numpy(tokens).to(device)[None],
                position_ids=torch.from_numpy(positions).to(device)[None],
                use_cache=False,
                logits_to_keep=1 if last else 0,
                treeswarm_cache=self._cache,
            )
        logits: torch.Tensor = output.logits[0, :, : self.vocab_size].float()
        return logits

    def check_trees(self, name: str) -> None:
        """Check that rows get the logits of the model's own attention, in a tree those of the same tokens as a text.

        Layers that keep their state elsewhere than in K and V, or compute attention in a way of their own, would draft
        wrong tokens without any error.  The text is forgotten.  Raises UnsupportedModel with the `name` of the model.
        """
        text = [(1 + 7 * i) % self.vocab_size for i in range(CHECKED_TOKENS)]
        sibling = 3 % self.vocab_size
        try:
            self.feed(text[:1])
            visible = np.array([[True, False, False], [False, True, False], [False, True, True]])
            in_tree = self.add_nodes(visible, np.array([sibling, text[1], sibling]), np.array([1, 1, 2]))[-1]
            self.cut(0)
            in_text = self.feed([*text[:2], sibling])[-1]
            self.cut(0)
            ours, own = self.feed(text)[-1], self._logits_by_own_attention(text)
        except Exception as error:  # a layer that meets our attention may raise anything
            raise UnsupportedModel(f"the draft model '{name}' cannot draft trees: {error}") from error
        finally:
            self.cut(0)
        tolerance = TREE_TOLERANCE.get(self.model.dtype, 1e-3)
        if not (difference := _difference(in_tree, in_text)) <= tolerance:
            raise UnsupportedModel(
                f"the draft model '{name}' cannot draft trees: logits in a tree differ by {difference:.1%} from "
                "those of the same text, so some layers are not plain attention: name another draft model, or none"
            )
        if not (difference := _difference(ours, own)) <= tolerance:
            raise UnsupportedModel(
                f"the draft model '{name}' cannot draft: its logits differ from transformers' own attention by "
                f"{difference:.1%}, so it has a kind of attention that is not computed here: name another draft model, "
                "or none"
            )

    @torch.inference_mode()
    def _logits_by_own_attention(self, text: list[int]) -> torch.Tensor:
        """Return the logits after a text, float32 [vocab], by transformers' eager attention."""
        self.model.set_attn_implementation("eager")
        try:
            output = self.model(input_ids=torch.tensor([text], device=self.model.device), use_cache=False)
        finally:
            self.model.set_attn_implementation(IMPLEMENTATION)
        logits: torch.Tensor = output.logits[0, -1, : self.vocab_size].float()
        return logits


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference between two rows of logits, relative to the largest expected one."""
    return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def load_weights(folder: Path, device: str, dtype: str) -> Any:
    """Load a model directory with transformers.  Raises ModelError."""
    register()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
        model.set_attn_implementation(IMPLEMENTATION)
    except Exception as error:  # transformers may raise anything that its parts raise
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"the draft model in '{folder}' cannot be loaded: {first_line}") from error
    return model.to(device).eval().requires_grad_(False)


def register() -> None:
    """Register the attention implementation with transformers; calling this again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _make_mask)


def _make_mask(
    mask_function: Callable[..., Any] | None = None, local_size: int | None = None, **_: Any
) -> LocalMask | None:
    """Return what stands for transformers' mask: None where rows see their whole path.

    Transformers says the size of windows and chunks, and builds them as an overlay over the causal mask.
    """
    return None if local_size is None else LocalMask(int(local_size), _has_chunks(mask_function))


def _has_chunks(part: Any) -> bool:
    """Return whether a mask function is that of chunks, or a combination of others with it.

    Positions of a tree look to transformers like several texts in one row, so it combines its masks once more.
    """
    if isinstance(part, tuple | list):
        return any(map(_has_chunks, part))
    is_overlay = getattr(part, "__qualname__", "").startswith("chunked_overlay.")
    return is_overlay or any(_has_chunks(cell.cell_contents) for cell in getattr(part, "__closure__", None) or ())


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LocalMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    treeswarm_cache: TreeCache | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention for transformers' layers, with soft caps of the scores and with sinks (`s_aux`) per head."""
    if treeswarm_cache is None:
        raise UnsupportedModel("its layers do not pass keyword arguments to attention")
    keys, values = treeswarm_cache.write(int(cast(int, module.layer_idx)), key[0], value[0])
    mask = treeswarm_cache.mask_in(attention_mask)
    grouped = query.shape[1] != keys.shape[0]
    if softcap is None and s_aux is None:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, keys[None], values[None], attn_mask=mask, scale=scaling, enable_gqa=grouped
        )
        return output.transpose(1, 2), None
    if grouped:
        keys, values = (rows.repeat_interleave(query.shape[1] // keys.shape[0], 0) for rows in (keys, values))
    scores = query[0] @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)[..., : keys.shape[1]]
    return (weights @ values).transpose(0, 1)[None], None
