"""How long an answer may become whose request names no length.  Pure.

Nodes reserve room for a text before it begins, so a long limit keeps other texts out even if the answer is short.
"""

from collections.abc import Sequence

from treeswarm.protocol.records import NodeRecord

# Part of the room that is free on the nodes for one answer.  Of 131,072 tokens a single answer gets 16,384, and
# 28 answers that begin at once all get 1,024 or more.
SHARE = 8
# Number of tokens that an answer gets even where nodes are nearly full; they refuse it if they are.
LEAST = 1024


def free_room(records: Sequence[NodeRecord], blocks: int, reserved: int) -> int:
    """Return the number of tokens for which the fullest part of a swarm has room.

    Records are up to a minute old: `reserved` tokens of one's own may be missing in them.
    """
    rooms = []
    for block in range(blocks):
        serving = [record for record in records if record.span.start <= block < record.span.end]
        free = max((record.free_tokens for record in serving), default=0)
        rooms.append(min(free, sum(record.total_tokens for record in serving) - reserved))
    return max(0, min(rooms, default=0))


def default_length(context_left: int, free: int) -> int:
    """Return the number of new tokens for an answer, where the model's context has room for `context_left` more."""
    return max(1, min(context_left, max(LEAST, free // SHARE)))
