"""A TCP relay in front of a node, whose connections can be cut: what a home router does to a volunteer."""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field

CHUNK = 1 << 16
# Below what Linux, macOS and Windows take for outgoing connections: a node may come minutes later.
LASTING_PORTS = range(20000, 32000)


@dataclass(eq=False)
class Cuttable:
    """Strangers dial `port`, the node listens on `inner`, both on loopback."""

    port: int
    inner: int
    _streams: set[asyncio.StreamWriter] = field(default_factory=set)

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways, until either end is over."""
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
        """Break every connection there is, or those from these ports; returns how many.  New ones are welcome."""
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
async def cuttable() -> AsyncIterator[Cuttable]:
    """A relay to a port that nobody listens on yet."""
    line = Cuttable(0, free_port())
    server = await asyncio.start_server(line.relay, "127.0.0.1", 0)
    line.port = server.sockets[0].getsockname()[1]
    try:
        yield line
    finally:
        server.close()
        line.cut()


def free_port() -> int:
    """One that nobody has at the moment, and that no system hands out by itself before a node listens on it."""
    for port in random.sample(LASTING_PORTS, len(LASTING_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free on loopback")
