"""Route a block's attention to the node's trees: by transformers' attention interface, or by its cache and mask."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from treeswarm_node.attention.base import Attention
from treeswarm_node.attention.interface import AttentionCall, TreeMask, attend_in, attention_handled_by
from treeswarm_node.attention.latent import is_latent
from treeswarm_node.attention.metadata import Batch
from treeswarm_node.kv_cache.layer_state import KVShape
from treeswarm_node.model.families.frame import CACHES, Frame, RunLayer
from treeswarm_node.model.families.kv_shapes import latent_shape
from treeswarm_node.model.families.mask_tables import window_of

# Names by which blocks take a bias of scores by the key's position.
BIASES = ("alibi", "position_bias")


class AttentionRoute(Protocol):
    """Runs blocks so that their attention covers the trees of a batch."""

    name: str
    """Name of the route, for messages."""

    def over(self, batch: Batch, attention: Attention, run: RunLayer) -> RunLayer:
        """Return a function that runs blocks with their attention over the batch."""
        ...

    def length(self, batch: Batch) -> int:
        """Return the number of keys that a model's position biases must cover."""
        ...

    def observing(self, shapes: dict[int, KVShape], run: RunLayer) -> RunLayer:
        """Return a function that runs blocks and notes the shapes of their keys and values by attention."""
        ...


class InterfaceRoute:
    """Lets transformers' attention interface call the node's attention."""

    name = "attention interface"

    def over(self, batch: Batch, attention: Attention, run: RunLayer) -> RunLayer:
        return self._handled(attend_in(batch, attention), run)

    def length(self, _: Batch) -> int:
        return 0

    def observing(self, shapes: dict[int, KVShape], run: RunLayer) -> RunLayer:
        def note(call: AttentionCall) -> torch.Tensor:
            if is_latent(call.module):
                shapes[call.layer] = latent_shape(call.module)
                return call.query[..., : call.module.v_head_dim].transpose(0, 1)
            shapes[call.layer] = KVShape(call.key.shape[0], call.key.shape[-1], call.value.shape[-1])
            return call.value.mean(0)[:, None].expand(-1, call.query.shape[0], -1)

        return self._handled(note, run)

    def _handled(self, handle: Callable[[AttentionCall], torch.Tensor], run: RunLayer) -> RunLayer:
        def run_handled(index: int, arguments: dict[str, Any]) -> Any:
            with attention_handled_by(handle):
                return run(index, arguments)

        return run_handled


class CacheRoute:
    """Gives blocks that compute attention themselves the keys of all segments, by their cache, and a mask of the trees.

    Every row is compared with the keys of the whole batch, so this is slower than the attention interface.
    """

    name = "cache"

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def over(self, batch: Batch, _: Attention, run: RunLayer) -> RunLayer:
        def run_with_cache(index: int, arguments: dict[str, Any]) -> Any:
            mask = arguments.get("attention_mask")
            given = mask.window if isinstance(mask, TreeMask) else None
            window = window_of(self._frame.blocks.layers[index]) or given
            keys = batch.gathered(window)
            with self._computing_itself(arguments, _TreeCache(batch, keys.rows), keys.visible, keys.positions):
                return run(index, arguments)

        return run_with_cache

    def length(self, batch: Batch) -> int:
        return max((int(segment.local_positions.max()) + 1 for segment in batch.segments), default=0)

    def observing(self, shapes: dict[int, KVShape], run: RunLayer) -> RunLayer:
        def run_noting(index: int, arguments: dict[str, Any]) -> Any:
            rows = next(iter(arguments.values())).shape[1]
            visible = torch.ones(rows, rows, dtype=torch.bool, device=self._frame.device).tril()
            positions = torch.arange(rows, device=self._frame.device)
            with self._computing_itself(arguments, _NotingCache(shapes), visible, positions):
                return run(index, arguments)

        return run_noting

    @contextlib.contextmanager
    def _computing_itself(
        self, arguments: dict[str, Any], cache: Any, visible: torch.Tensor, positions: torch.Tensor
    ) -> Iterator[None]:
        """Change a block's arguments in place, and let its attention be transformers' eager one in this context."""
        mask = arguments.get("attention_mask")
        dtype = next(iter(arguments.values())).dtype
        hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        hidden.masked_fill_(~visible, torch.finfo(dtype).min)
        if isinstance(mask, TreeMask) and mask.dtype is not None:
            hidden = hidden.to(mask.dtype)
        arguments["attention_mask"] = hidden[None, None]
        arguments.update({name: cache for name in CACHES if name in self._frame.names_of_block})
        for name in BIASES:
            if isinstance(arguments.get(name), torch.Tensor):
                arguments[name] = arguments[name][..., positions]
        with self._frame.attending_by("eager"):
            yield


class _TreeCache:
    """Takes a block's new keys and values as transformers' caches do, and returns those of the whole batch."""

    def __init__(self, batch: Batch, rows: torch.Tensor) -> None:
        self._batch, self._rows = batch, rows

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self._batch.store.layers[layer]
        if self._batch.store.keeps_rows_of(layer):
            pool.write(self._batch.kv_rows, keys[0], values[0])
        return pool.keys[None, :, self._rows].to(keys.dtype), pool.values[None, :, self._rows].to(values.dtype)

    def get_seq_length(self, _: int = 0) -> int:
        return 0


class _NotingCache:
    """Notes the shapes of what a block keeps."""

    def __init__(self, shapes: dict[int, KVShape]) -> None:
        self._shapes = shapes

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._shapes[layer] = KVShape(keys.shape[1], keys.shape[-1], values.shape[-1])
        return keys, values

    def get_seq_length(self, _: int = 0) -> int:
        return 0
