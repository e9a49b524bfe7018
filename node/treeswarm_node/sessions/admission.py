"""Decide whether a client may open a session.  Pure."""

from collections.abc import Sequence

from treeswarm.errors import Refused
from treeswarm.protocol.messages import MAX_CROWN, FaultCode, Open
from treeswarm.protocol.records import NodeState
from treeswarm.protocol.version import check_version
from treeswarm_node.config import NodeLimits
from treeswarm_node.model.loaded_span import ServedSpan


def check_open(
    request: Open,
    served: ServedSpan,
    limits: NodeLimits,
    state: NodeState,
    host: str,
    session_hosts: Sequence[str],
    *,
    has_grammars: bool = False,
) -> None:
    """Raise Refused if the session cannot be opened, with the code and reason of the first rule that it breaks.

    `host` is the client's host, and `session_hosts` has the host of every session open on this node.  `has_grammars`
    says whether the node has a library that applies grammars.
    """
    check_version("the client", request.version)
    for broken, code, reason in (
        (state is not NodeState.ONLINE, FaultCode.DRAINING, f"this node is {state} and opens no session"),
        (
            request.numerics != served.numerics,
            FaultCode.MISMATCH,
            "this node serves another numerics class than the client asks for: "
            f"{served.numerics.difference(request.numerics)}",
        ),
        (
            request.span not in served.span,
            FaultCode.MISMATCH,
            f"this node serves blocks {served.span}, not {request.span}",
        ),
        (
            (request.span.end == served.blocks) != (request.next_hop is None),
            FaultCode.MISMATCH,
            "the node with the last block, and only that node, has no next hop",
        ),
        (
            request.rules is not None and request.next_hop is not None,
            FaultCode.MISMATCH,
            "rules are for the tail, and this node is not the tail of the session",
        ),
        (
            request.rules is not None and request.rules.rules.grammar is not None and not has_grammars,
            FaultCode.MISMATCH,
            "this node applies no grammars: its owner installs them with the extra `grammar`",
        ),
        (
            len(session_hosts) >= limits.sessions,
            FaultCode.FULL,
            f"this node is full: {len(session_hosts)} sessions are open",
        ),
        (
            session_hosts.count(host) >= limits.sessions_per_host,
            FaultCode.FULL,
            f"{host} has {session_hosts.count(host)} sessions open here, the most that one address may have",
        ),
        (
            request.trunk_room > served.max_positions,
            FaultCode.OUT_OF_ROOM,
            f"{request.trunk_room} tokens were requested, but the model's context is {served.max_positions}",
        ),
        (
            request.crown_room > MAX_CROWN,
            FaultCode.OUT_OF_ROOM,
            f"a crown of {request.crown_room} rows was requested, but a crown has at most {MAX_CROWN}",
        ),
        (
            request.resumption is not None and request.resumption.trunk_length > request.trunk_room,
            FaultCode.OUT_OF_ROOM,
            "a session cannot resume with more tokens than it has room for",
        ),
        (
            request.prefix is not None and request.prefix.rows >= request.trunk_room,
            FaultCode.OUT_OF_ROOM,
            "a session cannot begin with more tokens than it has room for",
        ),
    ):
        if broken:
            raise Refused(reason, code)
