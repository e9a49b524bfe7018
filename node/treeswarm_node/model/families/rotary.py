"""Compute rotary position embeddings so that a session's positions do not depend on those of other sessions."""

from dataclasses import dataclass, field
from typing import Any

import torch

from treeswarm.errors import UnsupportedModel

# Types of rotary embeddings that depend on the largest position of a call.  Only the first can be computed so that it
# depends on the session's room instead.
ROPE_BY_ROOM, REFUSED_ROPE = "longrope", "dynamic"


@dataclass
class SessionRows:
    """Says which rows of a forward are of which session."""

    rows: list[tuple[slice, int]] = field(default_factory=list)
    """Rows of each session, and the number of tokens that it may grow to; empty if nobody uses the result."""


def rotary_by_session(module: torch.nn.Module, sessions: SessionRows) -> torch.nn.Module:
    """Return a rotary embedding whose tables do not depend on other sessions: the module itself, or one around it.

    Other modules are returned as they are.  Raises UnsupportedModel if the tables depend on a batch's longest session.
    """
    types = getattr(module, "rope_type", None)
    kinds = {str(kind) for kind in (types.values() if isinstance(types, dict) else [types])}
    if any(REFUSED_ROPE in kind for kind in kinds):
        raise UnsupportedModel("RoPE of type 'dynamic' depends on the longest session of a batch")
    return _RotaryByRoom(module, sessions) if ROPE_BY_ROOM in kinds else module


class _RotaryByRoom(torch.nn.Module):
    """Computes longrope's tables session by session.

    Longrope chooses its factors by the call's largest position.  Each session's call includes the last position that
    the session may ever reach, so that its factors are fixed when it opens and never change.
    """

    def __init__(self, rotary: torch.nn.Module, sessions: SessionRows) -> None:
        super().__init__()
        self._rotary = rotary
        self._sessions = sessions

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor, *kind: Any, **options: Any) -> Any:
        tables = []
        for rows, room in self._sessions.rows:
            last = torch.tensor([room - 1], device=position_ids.device)
            positions = torch.cat([position_ids[0, rows], last])[None]
            tables.append([part[:, :-1] for part in self._rotary(hidden, positions, *kind, **options)])
        if not tables:
            return self._rotary(hidden, position_ids, *kind, **options)
        return tuple(torch.cat(parts, 1) for parts in zip(*tables, strict=True))
