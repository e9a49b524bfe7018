"""A TCP relay in front of a node whose connections can be cut, as a home router cuts those of a volunteer."""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

CHUNK = 1 << 16
# Below the ports that Linux, macOS and Windows assign to outgoing connections: a node may listen minutes later.
LASTING_PORTS = range(20000, 32000)


@dataclass(eq=False)
class CuttableRelay:
    """A relay on loopback: other programs connect to `port`, and the node listens on `inner`."""

    port: int
    inner: int
    _streams: set[asyncio.StreamWriter] = field(default_factory=set)

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection in both directions until either end closes it."""
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.inner)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, inner_writer}
        self._streams |= ends
        pumps = [asyncio.ensure_future(_pump(*way)) for way in ((reader, inner_writer), (inner_reader, writer))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for end in ends:
                end.transport.abort()
            self._streams -= ends

    def cut(self, dialled_from: Collection[int] | None = None) -> int:
        """Break all connections, or those from the given ports, and return their number.

        New connections are still accepted.
        """
        streams = [s for s in self._streams if s.get_extra_info("sockname")[1] == self.port]
        cut = [s for s in streams if dialled_from is None or s.get_extra_info("peername")[1] in dialled_from]
        for stream in cut:
            stream.transport.abort()
        return len(cut)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()


@contextlib.asynccontextmanager
async def cuttable_relay() -> AsyncIterator[CuttableRelay]:
    """Run a relay to a port that no program listens on yet."""
    relay = CuttableRelay(0, free_port())
    server = await asyncio.start_server(relay.relay, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        relay.cut()


def free_port() -> int:
    """Return a port of loopback that is free now, and that no system assigns by itself before a node listens on it.

    Raises OSError if there is none.
    """
    for port in random.sample(LASTING_PORTS, len(LASTING_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port from {LASTING_PORTS.start} to {LASTING_PORTS.stop - 1} is free on loopback")
