"""Who may open a session here.  Pure: a request and what is known, in; a refusal, out."""

from collections.abc import Sequence

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import Refused
from treeswarm.protocol.messages import MAX_CROWN, FaultCode, Open
from treeswarm.protocol.records import NodeState
from treeswarm_node.config import NodeLimits
from treeswarm_node.model.loaded_span import ServedSpan


def check_open(
    wanted: Open, served: ServedSpan, limits: NodeLimits, state: NodeState, guest: str, guests: Sequence[str]
) -> None:
    """Raises Refused.  `guest` is the asker's host, `guests` the hosts of all sessions open here."""
    for wrong, code, why in (
        (
            wanted.version != PROTOCOL_VERSION,
            FaultCode.WRONG_VERSION,
            f"protocol {wanted.version} is spoken, this node speaks {PROTOCOL_VERSION}: install the same release",
        ),
        (state is not NodeState.ONLINE, FaultCode.DRAINING, f"this node is {state} and opens no session"),
        (
            wanted.numerics != served.numerics,
            FaultCode.MISMATCH,
            f"this node serves {served.numerics}, not {wanted.numerics}",
        ),
        (
            wanted.span not in served.span,
            FaultCode.MISMATCH,
            f"this node serves blocks {served.span}, not {wanted.span}",
        ),
        (
            (wanted.span.end == served.blocks) != (wanted.next_hop is None),
            FaultCode.MISMATCH,
            "the last block's node, and it alone, has no next hop",
        ),
        (
            len(guests) >= limits.sessions,
            FaultCode.FULL,
            f"this node is full: {len(guests)} sessions are open",
        ),
        (
            guests.count(guest) >= limits.sessions_per_host,
            FaultCode.FULL,
            f"{guest} has {guests.count(guest)} sessions open here, and one address may have no more",
        ),
        (
            wanted.trunk_room > served.max_positions,
            FaultCode.OUT_OF_ROOM,
            f"{wanted.trunk_room} tokens were asked for, the model's context is {served.max_positions}",
        ),
        (wanted.crown_room > MAX_CROWN, FaultCode.OUT_OF_ROOM, f"a crown has at most {MAX_CROWN} rows"),
        (
            wanted.resumption is not None and wanted.resumption.trunk_length > wanted.trunk_room,
            FaultCode.OUT_OF_ROOM,
            "a session cannot go on with more tokens than it has room for",
        ),
        (
            wanted.prefix is not None and wanted.prefix.rows >= wanted.trunk_room,
            FaultCode.OUT_OF_ROOM,
            "a session cannot begin with more tokens than it has room for",
        ),
    ):
        if wrong:
            raise Refused(why, code)
