"""Report nodes that do not answer to a node that may take their blocks over."""

import asyncio
import contextlib
from collections.abc import Sequence

from treeswarm.errors import SwarmError
from treeswarm.protocol.messages import MAX_LOST, ReportLost
from treeswarm.transport.ping import ANSWER_S
from treeswarm.transport.seam import StreamKind, Transport


async def report_lost(transport: Transport, address: str, nodes: Sequence[str]) -> None:
    """Report `nodes` (ids) to the node at `address`, on a stream of its own.  A failure is ignored."""
    with contextlib.suppress(SwarmError, TimeoutError):
        async with asyncio.timeout(ANSWER_S):
            stream = await transport.connect(address, StreamKind.CONTROL)
            try:
                await stream.send(ReportLost(tuple(nodes[:MAX_LOST])))
            finally:
                await stream.end()
