"""A process that sends back what it receives, over the product's own transport: what the wire alone costs."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from treeswarm.errors import NodeLost
from treeswarm.keys import Identity
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.seam import StreamKind
from treeswarm.transport.tls import Security
from treeswarm_bench.raw_codec import RAW

KEY = b"the key of this bench's swarm"
START_S = 60.0
PLAIN, TLS, PRIVATE = FORMS = ("plain", "tls", "tls and swarm key")


async def echo_s(stream: Any, data: bytes) -> float:
    """Return the seconds until bytes sent over a stream of raw bytes are back.

    Raises NodeLost if the other process sends something else back, or ends.
    """
    start = time.perf_counter()
    await stream.send(data)
    if len(await stream.receive() or b"") != len(data):
        raise NodeLost("the echo process sent something else back, or ended: see its error output above", "127.0.0.1")
    return time.perf_counter() - start


async def send_back(kind: StreamKind, stream: Any) -> None:
    """Send back every message of a stream until it ends."""
    while (data := await stream.receive()) is not None:
        await stream.send(data)


def transport_of(form: str, identity: Identity | None = None) -> GrpcTransport:
    """Return a transport with one of the FORMS of protection, whose messages are bytes."""
    security = {PLAIN: None, TLS: Security(identity), PRIVATE: Security(identity, KEY)}[form]
    return GrpcTransport(security=security, codec=RAW)


@contextlib.asynccontextmanager
async def echo_process() -> AsyncIterator[dict[str, str]]:
    """Start another process that echoes, and yield its addresses by form of protection.

    Raises NodeLost if it ends at once, and TimeoutError if it prints nothing within START_S seconds.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        if not line:
            raise NodeLost("the echo process ended at once: see its error output above", "127.0.0.1")
        yield json.loads(line)
    finally:
        process.stdin.close()
        await process.wait()


async def _serve() -> None:
    """Print the addresses, and echo until standard input ends."""
    identity = Identity.ephemeral()
    transports = {form: transport_of(form, identity) for form in FORMS}
    listeners = {form: await transport.listen("127.0.0.1:0", send_back) for form, transport in transports.items()}
    print(json.dumps({form: listener.address for form, listener in listeners.items()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for listener in listeners.values():
        await listener.close()


if __name__ == "__main__":
    asyncio.run(_serve())
