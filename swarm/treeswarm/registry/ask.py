"""Ask one node for its own newest record, which the registry may show only later."""

import asyncio
import contextlib

from treeswarm import PROTOCOL_VERSION
from treeswarm.errors import NodeLost, SwarmError
from treeswarm.protocol.messages import Records, Watch
from treeswarm.transport.ping import END_S
from treeswarm.transport.seam import StreamKind, Transport


async def ask_record(transport: Transport, address: str, answer_s: float) -> bytes:
    """Return the sealed record of the node at `address`, unread.

    Raises SwarmError if it cannot be reached or refuses, and TimeoutError after `answer_s` seconds.
    """
    async with asyncio.timeout(answer_s):
        stream = await transport.connect(address, StreamKind.CONTROL)
        try:
            await stream.send(Watch(PROTOCOL_VERSION, everyone=False))
            message = await stream.receive()
            if not isinstance(message, Records) or not message.sealed:
                raise NodeLost(f"{stream.peer} did not answer with its record", stream.peer)
            return message.sealed[0]
        finally:
            with contextlib.suppress(SwarmError, TimeoutError):
                async with asyncio.timeout(END_S):
                    await stream.end()
