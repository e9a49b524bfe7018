"""Compute rotary position embeddings so that a session's positions do not depend on those of other sessions."""

from typing import Any

import torch
from transformers import PreTrainedModel

from treeswarm.errors import UnsupportedModel
from treeswarm_node.attention.metadata import Batch
from treeswarm_node.kv_cache.kv_store import SessionKV

# Types of rotary embeddings that depend on the largest position of a call.  Only the first can be computed so that it
# depends on the session's room instead.
ROPE_BY_ROOM, REFUSED_ROPE = "longrope", "dynamic"


class Rotary:
    """Computes rotary tables per layer kind, so that no session's table depends on another session's length."""

    def __init__(self, base: PreTrainedModel) -> None:
        rotary = getattr(base, "rotary_emb", None)
        if rotary is None:
            raise UnsupportedModel("the model has no rotary position embedding: expected base_model.rotary_emb")
        self._rotary = rotary
        config: Any = base.config
        layers: Any = base.layers
        by_layer = isinstance(getattr(rotary, "layer_types", None), list | set | tuple)
        self._kinds: list[str | None] = list(config.layer_types) if by_layer else [None] * len(layers)
        types = getattr(rotary, "rope_type", "default")
        self._types = set(types.values()) if isinstance(types, dict) else {types}
        if any(REFUSED_ROPE in str(kind) for kind in self._types):
            raise UnsupportedModel("RoPE of type 'dynamic' depends on the longest session of a batch")

    def kind_of(self, block: int) -> str | None:
        """Return the key of a block's table."""
        return self._kinds[block]

    def __call__(self, hidden: torch.Tensor, batch: Batch, sessions: list[SessionKV]) -> dict[str | None, Any]:
        """Return the table (cos, sin) of every layer kind, each over all rows of the batch."""
        return {kind: self._table(hidden, batch, sessions, kind) for kind in set(self._kinds)}

    @property
    def depends_on_room(self) -> bool:
        """Whether the factors depend on how long a session may become (longrope)."""
        return ROPE_BY_ROOM in self._types

    def _table(self, hidden: torch.Tensor, batch: Batch, sessions: list[SessionKV], kind: str | None) -> Any:
        if not self.depends_on_room:
            return self.plain(hidden, batch.positions[0], 0, kind)
        tables = [
            self.plain(hidden, segment.positions, kv.trunk_room, kind)
            for segment, kv in zip(batch.segments, sessions, strict=True)
        ]
        return tuple(torch.cat(parts, 1) for parts in zip(*tables, strict=True))

    def plain(self, hidden: torch.Tensor, positions: torch.Tensor, room: int, kind: str | None) -> Any:
        """Return the table (cos, sin) of one session's rows at `positions`, int64 [n].

        The session may grow to `room` tokens.
        """
        extra = () if kind is None else (kind,)
        if not self.depends_on_room:
            return self._rotary(hidden[None], positions[None], *extra)
        # longrope chooses its factors by the call's largest position.  The call includes the last position that the
        # session may ever reach, so that the factors are fixed when the session opens and never change.
        last = torch.tensor([room - 1], device=positions.device)
        table = self._rotary(hidden[None], torch.cat([positions, last])[None], *extra)
        return tuple(part[:, :-1] for part in table)
