"""What TLS costs: the same echo between two processes on loopback, plain and protected in turn."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from rich.table import Table

from treeswarm.errors import NodeLost
from treeswarm.keys import Identity
from treeswarm.transport.grpc import GrpcTransport
from treeswarm.transport.grpc_streams import RAW
from treeswarm.transport.seam import Stream, StreamKind
from treeswarm.transport.tls import Security
from treeswarm_client.bench.common import provenance_of_machine, spread

SIZES = (8 << 10, 64 << 10, 1 << 20)
ECHOES = {8 << 10: 400, 64 << 10: 300, 1 << 20: 100}
CONNECTS = 30
KEY = b"the key of this bench's swarm"
START_S = 60.0
FORMS = ("plain", "tls", "tls and swarm key")


async def bench_tls() -> dict[str, Any]:
    """Round trips of one message up and the same one down, and the time until a first small one is back."""
    async with _echo_process() as addresses:
        transports = {name: _transport(name) for name in addresses}
        streams = {name: await transports[name].connect(addresses[name], StreamKind.LINK) for name in addresses}
        rows = [await _echo_row(size, streams) for size in SIZES]
        for transport in transports.values():
            await transport.close()
        connects = await _connects(addresses)
    return {"bench": "tls", "echo_ms": rows, "connect_ms": connects, "provenance": provenance_of_machine()}


def table(result: dict[str, Any]) -> Table:
    """Medians, for people."""
    made = Table(title="loopback, two processes: median ms", title_justify="left")
    for column in ("", "plain", "TLS", "TLS and swarm key", "TLS / plain"):
        made.add_column(column, justify="right" if column else "left")
    for row in result["echo_ms"]:
        medians = [f"{row[name]['median']:.2f}" for name in FORMS]
        made.add_row(f"echo of {row['bytes'] >> 10} KiB", *medians, f"{row['ratio_tls_to_plain']['median']:.2f}")
    for which in ("first", "next"):
        plain, tls, private = (result["connect_ms"][f"{name}, {which}"]["median"] for name in FORMS)
        made.add_row(f"{which} connection", f"{plain:.2f}", f"{tls:.2f}", f"{private:.2f}", f"{tls / plain:.2f}")
    return made


async def _echo_row(size: int, streams: dict[str, Any]) -> dict[str, Any]:
    data = bytes(size)
    times: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(ECHOES[size]):
        for name, stream in streams.items():
            times[name].append(1e3 * await _echo_s(stream, data))
    figures = {name: spread(values) for name, values in times.items()}
    ratios = spread([tls / plain for plain, tls in zip(times["plain"], times["tls"], strict=True)])
    return {"bytes": size, **figures, "ratio_tls_to_plain": ratios}


async def _connects(addresses: dict[str, str]) -> dict[str, Any]:
    """`first` fetches the certificate, `next` knows it and opens one connection more."""
    times: dict[str, list[float]] = {}
    for _ in range(CONNECTS):
        for name, address in addresses.items():
            transport = _transport(name)
            for which, kind in (("first", StreamKind.CONTROL), ("next", StreamKind.LINK)):
                start = time.perf_counter()
                stream = await transport.connect(address, kind)
                await _echo_s(stream, b"x")
                times.setdefault(f"{name}, {which}", []).append(1e3 * (time.perf_counter() - start))
            await transport.close()
    return {name: spread(values) for name, values in times.items()}


async def _echo_s(stream: Any, data: bytes) -> float:
    start = time.perf_counter()
    await stream.send(data)
    assert len(await stream.receive()) == len(data)
    return time.perf_counter() - start


def _transport(name: str, identity: Identity | None = None) -> GrpcTransport:
    security = {"plain": None, "tls": Security(identity), "tls and swarm key": Security(identity, KEY)}[name]
    return GrpcTransport(security=security, codec=RAW)


async def _echo(kind: StreamKind, stream: Stream) -> None:
    while (data := await stream.receive()) is not None:
        await stream.send(data)


@contextlib.asynccontextmanager
async def _echo_process() -> AsyncIterator[dict[str, str]]:
    """Another process that echoes; its addresses by form of protection."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_S)
        if not line:
            raise NodeLost("the echo process ended at once: see what it wrote above", "127.0.0.1")
        yield json.loads(line)
    finally:
        process.stdin.close()
        await process.wait()


async def _serve() -> None:
    """Until standard input ends."""
    identity = Identity.ephemeral()
    transports = {name: _transport(name, identity) for name in FORMS}
    listeners = {name: await transport.listen("127.0.0.1:0", _echo) for name, transport in transports.items()}
    print(json.dumps({name: listener.address for name, listener in listeners.items()}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for listener in listeners.values():
        await listener.close()


if __name__ == "__main__":
    asyncio.run(_serve())
