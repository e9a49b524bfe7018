"""Measure the round trip to a node by pinging the node itself."""

import asyncio
import contextlib

from treeswarm.errors import NodeLost, SwarmError
from treeswarm.protocol.messages import Ping, Pong
from treeswarm.transport.seam import Stream, StreamKind, Transport

# Longer than a transport tries to connect, so that its error is raised instead of this timeout.
ANSWER_S = 8.0
END_S = 1.0


async def round_trip(transport: Transport, address: str, pings: int = 1, answer_s: float = ANSWER_S) -> float:
    """Return the shortest of `pings` round trips in seconds.

    Raises SwarmError if the node cannot be reached, and TimeoutError after `answer_s` seconds.
    """
    async with asyncio.timeout(answer_s):
        stream = await transport.connect(address, StreamKind.CONTROL)
        try:
            return min([await _ping(stream, stamp) for stamp in range(1, pings + 1)])
        finally:
            with contextlib.suppress(SwarmError, TimeoutError):
                async with asyncio.timeout(END_S):
                    await stream.end()


async def _ping(stream: Stream, stamp: int) -> float:
    loop = asyncio.get_running_loop()
    start = loop.time()
    await stream.send(Ping(stamp))
    while (message := await stream.receive()) is not None:
        if isinstance(message, Pong) and message.stamp == stamp:
            return loop.time() - start
    raise NodeLost(f"{stream.peer} ended the stream before it answered a ping", stream.peer)
